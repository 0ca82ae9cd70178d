"""Samplers step by step: the cases, a denoiser of one line, and what ours makes of them.

The denoiser is no network: it is written down alike in both libraries, so that a difference is
the sampler's. What diffusers makes of the cases is in ``trajectories.npz``
(``python tests/diffusion/by_diffusers.py`` makes it anew).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from diffusion import parity
from helpers.compiling import FAST
from jax import lax

from prism_jax.diffusion import guidance, huggingface, noise, samplers
from prism_jax.diffusion.samplers import Sampling

GOLDEN = pathlib.Path(__file__).parent / "trajectories.npz"
SHAPE = (2, 3, 2, 3)  # BHWC
BOUND = 0.5  # of clipped estimates

SD, DIT = noise.STABLE_DIFFUSION, noise.DIT
V = dataclasses.replace(SD, prediction="v")
TRAILING = dataclasses.replace(SD, spacing="trailing")
LEADING = dataclasses.replace(DIT, spacing="leading", offset=0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A sampler to compare; ``clip``: estimates are clipped to ``BOUND``."""

    name: str
    sampling: Sampling
    clip: bool = False


CASES = [
    Case("pndm_50_released", Sampling(SD, "pndm", 50, 0.7, slip=True)),
    Case("pndm_20_released", Sampling(SD, "pndm", 20, 0.5, slip=True)),
    Case("pndm_50_second", Sampling(SD, "pndm", 50, 0.98, slip=True)),
    Case("pndm_50_v", Sampling(V, "pndm", 50, 0.75, slip=True)),
    Case("pndm_50", Sampling(SD, "pndm", 50, 1.0)),
    Case("pndm_50_last", Sampling(SD, "pndm", 50, 0.02, slip=True)),
    Case("ddim_50", Sampling(SD, "ddim", 50, 0.7)),
    Case("ddim_20_noise", Sampling(SD, "ddim", 20, 1.0)),
    Case("ddim_50_v", Sampling(V, "ddim", 50, 0.5)),
    Case("ddim_30_eta", Sampling(SD, "ddim", 30, 0.8, eta=0.6)),
    Case("ddim_20_clip", Sampling(SD, "ddim", 20, 1.0), clip=True),
    Case("ddim_50_trailing", Sampling(TRAILING, "ddim", 50, 0.5)),
    Case("ddpm_50_small", Sampling(LEADING, "ddpm", 50, 1.0)),
    Case("ddpm_50_large", Sampling(LEADING, "ddpm", 50, 0.6, variance="large")),
    Case("ddpm_50_learned", Sampling(LEADING, "ddpm", 50, 1.0, variance="learned")),
    Case("ddpm_50_even", Sampling(DIT, "ddpm", 50, 1.0, variance="learned")),
]
BY_NAME = {case.name: case for case in CASES}


def drawn() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Anchors, starting noise, and noise by the number of a step."""
    rows = np.random.default_rng(0).normal(size=(53, *SHAPE)).astype(np.float32)
    return rows[0], rows[1], rows[2:]


def denoise(library, noisy, time):
    """A prediction."""
    return library.tanh(0.8 * noisy + 0.5 * library.cos(3 * time)) - 0.1 * noisy


def spread(library, noisy, time):
    """What stands for a learned variance's channels, within [-1, 1]."""
    return library.sin(3 * noisy + time)


def ours(case: Case) -> np.ndarray:
    """The latents after each step, (evaluations, B, H, W, C)."""
    anchors, first, fresh = drawn()

    def predict(noisy_BHWC, time):
        time = time.astype(jnp.float32) / 1000
        found = denoise(jnp, noisy_BHWC, time)
        if case.sampling.variance != "learned":
            return found
        return jnp.concatenate([found, spread(jnp, noisy_BHWC, time)], -1)

    bounds = noise.Bounds(np.float32(-BOUND), np.float32(BOUND)) if case.clip else None
    sight = samplers.Sight(predict, lambda step: jnp.asarray(fresh)[step], anchors, bounds)

    @jax.jit
    def run(anchors, first):
        start = samplers.start(case.sampling, anchors, first)
        course = samplers.SAMPLERS[case.sampling.sampler](case.sampling, sight, start)

        def step(carry, row):
            carry = course.step(carry, row)
            return carry, course.latents(carry)

        return lax.scan(step, course.carry, course.table)[1]

    return np.asarray(run(anchors, first))


def apart(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two trajectories differ by more than rounding does."""
    if found.shape != expected.shape:
        return True
    return bool(np.abs(found - expected).max() > 1e-4 * np.abs(expected).max())


# --- the whole pipeline ---------------------------------------------------------------------

NETWORKS = ("unet_1", "vae_decode")  # of the parity tests
PIPELINE = Sampling(SD, "pndm", 10, 0.7, guidance=3.0, slip=True)


def seen() -> tuple[np.ndarray, ...]:
    """Anchors, starting noise, what is told of two classes, and what says nothing."""
    draw = np.random.default_rng(1)
    return tuple(draw.normal(size=shape) for shape in [(2, 8, 12, 4)] * 2 + [(2, 5, 12)] * 2)


def pipeline(folder: pathlib.Path, sampling: Sampling = PIPELINE) -> dict[str, np.ndarray]:
    """What ours makes of the networks that diffusers' pipeline is given, in float64."""
    unet, vae = (
        huggingface.load(str(folder / name), parity.BY_NAME[name].part) for name in NETWORKS
    )
    anchors, first, told, untold = seen()
    with jax.enable_x64(True):
        networks = [loaded.module.clone(dtype=jnp.float64) for loaded in (unet, vae)]
        weights = [jax.tree.map(jnp.float64, loaded.params) for loaded in (unet, vae)]

        def predict(noisy_BHWC, time):
            return guidance.classifier_free(
                lambda *shown: networks[0].predict(weights[0], *shown),
                noisy_BHWC, jnp.broadcast_to(time, (2,)), told, untold,
                guidance=sampling.guidance, channels=4,
            )  # fmt: skip

        @functools.partial(jax.jit, compiler_options=FAST)
        def run(anchors, first):
            sight = samplers.Sight(predict, lambda step: first, anchors)
            start = samplers.start(sampling, anchors, first)
            latents = samplers.run(samplers.SAMPLERS[sampling.sampler](sampling, sight, start))
            return latents, networks[1].decode(weights[1], latents)

        latents, images = (np.asarray(x) for x in run(anchors, first))
    return {"pipeline_latents": latents, "pipeline_images": np.clip(images / 2 + 0.5, 0, 1)}
