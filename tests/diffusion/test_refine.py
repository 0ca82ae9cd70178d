"""Latents refined by CaO2's steps: beside Adam by hand, image by image, and refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import only_fast_programs

from prism_jax import rng
from prism_jax.diffusion import generate, noise, refine
from prism_jax.diffusion.generate import Generator, Places, Weights
from prism_jax.diffusion.refine import Refining
from prism_jax.errors import UserError

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

SHAPE = (3, 2, 2)
DISCRETE = Refining(noise.DIT, sampled=50, steps=6, learning_rate=0.02, maximum=3.0)
CONTINUOUS = dataclasses.replace(DISCRETE, schedule=noise.COSINE)


class Linear:
    """A denoiser that says ``(params + class / 10) noisy + time``, and a variance beside it."""

    def predict(self, params, noisy_BHWC, time_B, labels_B):
        slope, shift = (params + labels_B / 10, time_B.astype(jnp.float32) / 1000)
        said = slope[:, None, None, None] * noisy_BHWC + shift[:, None, None, None]
        return jnp.concatenate([said, jnp.full_like(said, 7.0)], -1)

    def of_labels(self, params, labels_B):
        return labels_B

    def null(self, params, batch):
        raise AssertionError("latents are refined without guidance")


PLACES = Places(*(np.array(x, np.int32) for x in ([0, 1, 2], [4, 4, 5], [0, 1, 2])))
GENERATOR = Generator(None, Linear(), Linear())


@functools.cache
def program(refining: Refining):
    return jax.jit(functools.partial(generate.refine, GENERATOR, refining))


def latents(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


def refined(refining: Refining, places: Places = PLACES, begun: np.ndarray | None = None):
    begun = latents() if begun is None else begun
    weights = Weights({}, jnp.float32(0.4), {})
    return np.asarray(program(refining)(weights, np.uint32(3), places, begun))


def levels(refining: Refining, number: int) -> tuple[float, float, float]:
    """(time, alpha, sigma) where the numbered step of the sampler begins."""
    if refining.schedule is noise.COSINE:
        time = (number + 1) / refining.sampled
        angle = 0.9975 * np.pi / 2 * time + 0.002
        return time, np.cos(angle), np.sin(angle)
    time = round(number * 999 / 49)
    signal = np.prod(1 - np.linspace(1e-4, 2e-2, 1000)[: time + 1])
    return time, np.sqrt(signal), np.sqrt(1 - signal)


def by_hand(
    refining: Refining, *, corrected: bool = True, one_noise: bool = True, window=None
) -> np.ndarray:
    """The same in NumPy, float64: gradients of the formula, and Adam's own lines."""
    found, key = [], rng.root(3)
    first, last = window or refining.window
    for latent, cls, slot in zip(latents(), PLACES.classes_B, PLACES.slots_B, strict=True):
        x = latent.astype(np.float64)
        moment, square = np.zeros(SHAPE), np.zeros(SHAPE)
        for step in range(refining.steps):
            at = (cls, slot) if one_noise else (cls, slot, step)
            address = rng.stream(key, "diffusion/refine/noise", *at)
            added = np.asarray(jax.random.normal(address, SHAPE), np.float64)
            address = rng.stream(key, "diffusion/refine/step", cls, slot, step)
            number = int(jax.random.randint(address, (), first, last + 1))
            time, alpha, sigma = levels(refining, number)
            noisy, slope = alpha * x + sigma * added, 0.4 + cls / 10
            said, inner = slope * noisy + time / 1000, alpha * slope
            if refining.schedule is noise.COSINE:  # v says the noise: sigma noisy + alpha v
                said, inner = sigma * noisy + alpha * said, sigma * alpha + alpha * inner
            error = said - added
            largest = np.zeros(SHAPE)
            at = np.unravel_index(np.abs(error).argmax(), SHAPE)
            largest[at] = np.sign(error[at])
            gradient = inner * (2 * error / error.size + refining.maximum * largest)
            moment = 0.9 * moment + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            seen = (1 - 0.9 ** (step + 1), 1 - 0.999 ** (step + 1)) if corrected else (1, 1)
            x -= refining.learning_rate * (moment / seen[0]) / (np.sqrt(square / seen[1]) + 1e-8)
        found.append(x)
    return np.stack(found)


@pytest.mark.parametrize("refining", [DISCRETE, CONTINUOUS], ids=["epsilon", "v"])
def test_steps_by_hand(refining):
    found = refined(refining)
    np.testing.assert_allclose(found, by_hand(refining), atol=5e-6)
    assert np.abs(found - latents()).max() > 0.05
    no_largest = dataclasses.replace(refining, maximum=0.0)
    for other in (
        by_hand(no_largest),
        by_hand(refining, corrected=False),
        by_hand(refining, one_noise=False),
        by_hand(refining, window=(0, 11)),
    ):
        assert np.abs(found - other).max() > 1e-4


def test_an_image_depends_on_no_other():
    whole = refined(DISCRETE)
    for at in range(3):
        one = Places(*(x[at : at + 1] for x in PLACES))
        alone = refined(DISCRETE, one, latents()[at : at + 1])
        np.testing.assert_allclose(alone[0], whole[at], atol=1e-6)
    twin = refined(DISCRETE, PLACES._replace(slots_B=PLACES.slots_B + 1))
    assert np.abs(twin - whole).max() > 1e-3


def test_the_denoiser_explains_better_what_was_added():
    refining = dataclasses.replace(DISCRETE, steps=100)
    added = np.random.default_rng(5).normal(size=(3, *SHAPE)).astype(np.float32)
    numbers = np.full((100, 3), 6)

    def predict(*noisy):
        return Linear().predict(jnp.float32(0.4), *noisy, PLACES.labels_B)

    def loss(seen):
        return np.asarray(refine.loss(refining, predict, seen, added, numbers[0]))

    moved = jax.jit(functools.partial(refine.refine, refining, predict))(latents(), added, numbers)
    assert loss(latents()).shape == (3,) and (loss(moved) < loss(latents())).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window": (0, 50)}, "of steps 0 to 50, but the steps are numbered 0"),
        ({"window": (12, 11)}, "of steps 12 to 11"),
        ({"learning_rate": 0.0}, "at learning rate 0, and"),
        ({"maximum": -1.0}, "the largest error counts -1"),
        ({"steps": 0}, "refined in 0 steps"),
    ],
)
def test_refused(changes, said):
    refine.check(DISCRETE)
    with pytest.raises(UserError, match=said):
        refine.check(dataclasses.replace(DISCRETE, **changes))
