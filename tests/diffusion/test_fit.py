"""A small denoiser's training: by hand, resumed, and on digits to the end."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import drawn_digits
from helpers.compiling import only_fast_programs

from prism_jax import rng
from prism_jax.diffusion import fit, noise
from prism_jax.diffusion.fit import Fitting
from prism_jax.errors import UserError

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

SHAPE = (2, 2, 1)
SHORT = Fitting(steps=12, batch_size=8, warmup=3)


class Toy(nn.Module):
    """Its prediction is a multiple of what it sees, and a number per class (two, and none)."""

    @nn.compact
    def __call__(self, noisy_BHWC, time_B, labels_B):
        scale = self.param("scale", nn.initializers.constant(0.5), (), jnp.float32)
        table = self.param("table", nn.initializers.zeros, (3,), jnp.float32)
        return scale * noisy_BHWC + table[labels_B][:, None, None, None]

    @nn.nowrap
    def predict(self, params, noisy_BHWC, time_B, labels_B):
        return self.apply({"params": params}, noisy_BHWC, time_B, labels_B)

    @nn.nowrap
    def of_labels(self, params, labels_B):
        return labels_B

    @nn.nowrap
    def null(self, params, batch):
        return jnp.full((batch,), 2, jnp.int32)


def data(count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, count).astype(np.int32)
    latents = draw.normal(size=(count, *SHAPE)) * 0.1 + 3 * labels[:, None, None, None]
    return latents.astype(np.float32), labels


def steps(fitting: Fitting, state: fit.FitState, until: int, seed: int = 0) -> fit.FitState:
    going = fit.fit(Toy(), fitting, *data(), seed=seed, begun=fit.Progress(state))
    for now in itertools.islice(going, until - int(state.step)):
        last = now.state
    return jax.device_get(last)


def fresh(fitting: Fitting = SHORT) -> fit.FitState:
    return fit.initial_state(Toy(), fitting, 0, SHAPE)


def differing(one, other) -> list[str]:
    leaves = jax.tree.leaves_with_path(one)
    pairs = zip(leaves, jax.tree.leaves(other), strict=True)
    return [str(p) for (p, a), b in pairs if np.asarray(a).tobytes() != np.asarray(b).tobytes()]


def test_a_state_that_was_kept_goes_on_to_the_bit():
    whole = steps(SHORT, fresh(), 12)
    kept = steps(SHORT, fresh(), 5)
    back = jax.tree.unflatten(jax.tree.structure(kept), [np.copy(x) for x in jax.tree.leaves(kept)])
    assert differing(steps(SHORT, back, 12), whole) == []
    forgotten = back._replace(opt_state=jax.tree.map(np.zeros_like, back.opt_state))
    assert differing(steps(SHORT, forgotten, 12), whole)
    assert differing(steps(SHORT, fresh(), 12, seed=1), whole)


@pytest.mark.parametrize("schedule", [noise.COSINE, noise.DIT])
def test_the_loss_by_hand(schedule):
    fitting = dataclasses.replace(SHORT, schedule=schedule)
    latents, labels = data(8)
    state = fresh(fitting)._replace(step=jnp.int32(4))
    _, loss = fit.jitted_step(fitting, Toy())(np.uint32(0), state, latents, labels)
    key = rng.root(0)
    drawn = np.asarray(
        jax.random.normal(rng.stream(key, "diffusion/fit/noise", 4), latents.shape, jnp.float32)
    )
    uniform = fit.stratified(rng.stream(key, "diffusion/fit/time", 4), 8)
    total = 0.0
    for latent, added, u in zip(latents, drawn, np.asarray(uniform, np.float64), strict=True):
        if schedule is noise.COSINE:
            angle = 0.9975 * np.pi / 2 * u + 0.002
            alpha, sigma = np.cos(angle), np.sin(angle)
            target = alpha * added - sigma * latent
        else:
            betas = np.linspace(1e-4, 2e-2, 1000)[: int(np.float32(u) * 1000) + 1]
            alpha, sigma = np.sqrt(np.prod(1 - betas)), np.sqrt(1 - np.prod(1 - betas))
            target = added
        total += ((0.5 * (alpha * latent + sigma * added) - target) ** 2).mean()
    np.testing.assert_allclose(loss, total / 8, rtol=1e-5)


def test_times_are_stratified():
    found = np.asarray(fit.stratified(rng.root(0), 64))
    assert np.array_equal(np.floor(found * 64), np.arange(64))
    plain = np.asarray(jax.random.uniform(rng.root(0), (64,), jnp.float32))  # twin
    assert not np.array_equal(np.sort(np.floor(plain * 64)), np.arange(64))


def test_a_dropped_class_teaches_the_null_and_only_then():
    for dropout, taught in ((0.0, False), (0.5, True)):
        fitting = dataclasses.replace(SHORT, class_dropout=dropout)
        table = steps(fitting, fresh(fitting), 12).params["table"]
        assert (table[2] != 0) == taught and (table[:2] != 0).all()


def test_the_average_begins_fast():
    first = fresh()
    start = jax.device_get(first.params)["table"]
    one = steps(SHORT, first, 1)
    two = steps(SHORT, jax.tree.map(jnp.asarray, one), 2)
    after = 0.1 * start + 0.9 * one.params["table"]  # (1 + 0) / (10 + 0)
    np.testing.assert_allclose(one.average["table"], after, atol=1e-7)
    after = 2 / 11 * after + 9 / 11 * two.params["table"]
    np.testing.assert_allclose(two.average["table"], after, atol=1e-7)


def test_the_rate_rises_and_falls_to_a_share():
    fitting = Fitting(steps=110, warmup=10, learning_rate=2.0, last_rate=0.05)
    at = [float(fit.rate(fitting, jnp.int32(step))) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(at, [0, 1, 2, 2 * (0.05 + 0.95 / 2), 0.1], rtol=1e-5)


def test_the_gradient_is_limited_before_adam_sees_it():
    first = fresh()
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e3), first.params)
    _, state = fit.optimiser(SHORT).update(huge, first.opt_state, first.params)
    moments = [x for x in jax.tree.leaves(state) if x.ndim == 1]
    np.testing.assert_allclose(moments[0], 0.1 / 2, rtol=1e-5)  # 0.1 of a norm of 1 over 4 numbers


def test_training_finds_the_classes():
    latents, labels = data(200)
    fitting = Fitting(steps=300, batch_size=32, warmup=10, learning_rate=3e-2)
    begun = fit.Progress(fresh(fitting))
    *_, last = found = list(fit.fit(Toy(), fitting, latents, labels, seed=0, begun=begun))
    looked = [number for number, now in enumerate(found, 1) if not now.losses]
    assert len(found) == 300 and looked == [100, 200, 300]
    assert last.mean < 0.7 * np.mean(found[19].losses)
    average = last.state.average
    # v is -sigma x0 at large: the class of 3 is told from the class of 0.
    assert average["table"][0] - average["table"][1] > 0.5


@pytest.mark.parametrize("changes, said", [
    (dict(steps=0), "0 steps"),
    (dict(warmup=12), "shorter than the steps"),
    (dict(batch_size=0), "of 0 images"),
    (dict(class_dropout=1.0), "class_dropout is 1.0"),
    (dict(average=1.0), "average is 1.0"),
    (dict(average=-0.1), "allowed: 0 .* to below 1"),
    (dict(schedule=noise.Schedule("steep")), "scaled_linear"),
])  # fmt: skip
def test_refused(changes, said):
    with pytest.raises(UserError, match=said):
        fit.check(dataclasses.replace(SHORT, **changes))


def test_a_loss_that_is_not_finite_is_told_when_it_is_looked_at():
    latents, labels = data()
    latents[:] = np.nan
    begun = fit.Progress(fresh(), losses=(1.0,), mean=2.0)
    going = fit.fit(Toy(), SHORT, latents, labels, seed=0, begun=begun)
    before = list(itertools.islice(going, 11))
    assert len(before[-1].losses) == 12 and before[-1].mean == 2.0
    with pytest.raises(UserError, match="loss is nan up to step 12; lower generate.fit.learning"):
        next(going)


@pytest.mark.slow
def test_digits_are_recognised_and_are_no_copies():
    weights, losses = drawn_digits.trained(Fitting())
    assert np.mean(losses[-2:]) < 0.2
    made = drawn_digits.drawn(weights, 100)
    found = drawn_digits.measured(made)
    assert found.faults == (), found
    # A sampler that gives back what it was trained on is better recognised, and fails.
    train = drawn_digits.digits("train")
    copies = drawn_digits.measured(drawn_digits.Digits(train.images[:1000], train.labels[:1000]))
    assert copies.recognised > 0.95 and len(copies.faults) == 2
    # A generator that was stopped early is not told its faults by the judge alone.
    barely, _ = drawn_digits.trained(Fitting(steps=150))
    assert drawn_digits.measured(drawn_digits.drawn(barely, 100)).faults
    # From anchors, less and less of them is left.
    codec = weights.codec
    anchors = np.repeat((train.images[:10] / 127.5 - 1 - codec["mean_C"]) / codec["deviation_C"],
                        100, 0)  # fmt: skip
    left = [
        np.abs(
            drawn_digits.drawn(
                weights, 100,
                dataclasses.replace(drawn_digits.SAMPLING, strength=strength), anchors,
            ).images.astype(int) - np.repeat(train.images[:10], 100, 0).astype(int)
        ).mean()
        for strength in (0.0, 0.3, 0.7, 1.0)
    ]  # fmt: skip
    assert left[0] == 0 and left == sorted(left) and left[1] < left[3] / 2, left
