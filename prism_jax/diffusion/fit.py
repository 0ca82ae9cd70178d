"""Train a small denoiser from nothing: a pure step, and a state that can be kept.

One jitted step per batch, at top level, as in ``training``. What a step draws has the coordinate
of the step, and so has the batch it reads: a state that was kept goes on as if nothing had been.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prism_jax import rng
from prism_jax.core import schedules
from prism_jax.data.pipeline import continuous_index
from prism_jax.diffusion import noise
from prism_jax.errors import UserError
from prism_jax.types import Array, PyTree

LOOKED = 100  # steps after which losses are looked at


@dataclasses.dataclass(frozen=True)
class Fitting:
    """How a denoiser is trained; static in a trace. The defaults learn the digits at 16 px.

    Attributes:
      steps: the whole budget; the learning rate's schedule ends with it.
      warmup: steps in which the learning rate rises linearly, to fall along a cosine to
        ``last_rate`` of itself.
      class_dropout: how often a class is not told, for classifier-free guidance.
      average: decay of the weights that are kept in the end; less at first, ``(1 + i) / (10 + i)``.
    """

    schedule: noise.Schedule = noise.COSINE
    steps: int = 3500
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    last_rate: float = 0.05
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    class_dropout: float = 0.1
    average: float = 0.998


class FitState(NamedTuple):
    """A denoiser in training; ``average`` is what it is in the end."""

    step: Array
    params: PyTree
    opt_state: PyTree
    average: PyTree


class Progress(NamedTuple):
    """A training under way.

    Attributes:
      losses: of the steps since they were looked at; empty where they just were.
      mean: of those that were looked at last; NaN: none were.
    """

    state: FitState
    losses: tuple[Array | float, ...] = ()
    mean: float = math.nan


def check(fitting: Fitting) -> None:
    """Refuse numbers that train nothing.

    Raises:
      UserError: what was given, and what is allowed.
    """
    noise.check(fitting.schedule, 1)
    if fitting.steps < 1 or fitting.batch_size < 1 or not 0 <= fitting.warmup < fitting.steps:
        raise UserError(
            f"a denoiser is trained for {fitting.steps} steps of {fitting.batch_size} images with "
            f"{fitting.warmup} steps of warm-up; steps and images are at least 1, and the warm-up "
            f"is shorter than the steps"
        )
    if not 0 <= fitting.class_dropout < 1:
        raise UserError(
            f"class_dropout is {fitting.class_dropout}; allowed: 0 to below 1, of which the class "
            f"would never be told"
        )
    if not 0 <= fitting.average < 1:
        raise UserError(
            f"average is {fitting.average}, the decay of the weights that are kept; allowed: 0 "
            f"(the last ones) to below 1, at which no training would count"
        )


def optimiser(fitting: Fitting) -> optax.GradientTransformation:
    """Adam behind a limit of the gradient's norm, without its learning rate."""
    return optax.chain(optax.clip_by_global_norm(fitting.clip), optax.scale_by_adam(*fitting.betas))


def rate(fitting: Fitting, step: Array) -> Array:
    """The learning rate of a step."""
    share = schedules.warmed_up(
        "cosine", step, jnp.int32(fitting.steps), warmup=fitting.warmup, warmup_start=0.0
    )
    rising = step < fitting.warmup
    falling = fitting.last_rate + (1 - fitting.last_rate) * share
    return fitting.learning_rate * jnp.where(rising, share, falling)


def initial_state(
    module: nn.Module, fitting: Fitting, seed: int, latent_shape: tuple[int, int, int]
) -> FitState:
    """Fresh weights from the stream "diffusion/init" of ``seed``.

    Args:
      module: a ``protocols.Denoiser``, called with noisy latents, times and labels, that is its
        own condition.
    """
    seen = jnp.zeros((1, *latent_shape), jnp.float32), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    params = jax.jit(module.init)(rng.stream(rng.root(seed), "diffusion/init"), *seen)["params"]
    opt_state = jax.jit(optimiser(fitting).init)(params)
    # A copy of the weights: a step may reuse the memory of both.
    average = jax.tree.map(jnp.copy, params)
    return FitState(jnp.zeros((), jnp.int32), params, opt_state, average)


def batch_index(fitting: Fitting, seed: int, count: int, step: int) -> np.ndarray:
    """Which of ``count`` latents a step reads."""
    return continuous_index(
        step, count=count, batch_size=fitting.batch_size, seed=seed, name="diffusion/order"
    )


def stratified(key: Array, batch: int) -> Array:
    """One number in each of ``batch`` equal parts of [0, 1), whose images are in random order."""
    within_B = jax.random.uniform(key, (batch,), jnp.float32)
    return (jnp.arange(batch, dtype=jnp.float32) + within_B) / batch


def fit_step(
    fitting: Fitting,
    module: nn.Module,
    seed: Array,
    state: FitState,
    latents_BHWC: Array,
    labels_B: Array,
) -> tuple[FitState, Array]:
    """One optimiser step; the loss is the mean square error of the prediction."""
    key, batch = rng.root(seed), len(labels_B)

    def draw(name: str) -> Array:
        return rng.stream(key, f"diffusion/fit/{name}", state.step)

    time_B = noise.times(fitting.schedule, stratified(draw("time"), batch))
    alpha, sigma = (x[:, None, None, None] for x in noise.levels(fitting.schedule, time_B))
    noise_BHWC = jax.random.normal(draw("noise"), latents_BHWC.shape, jnp.float32)
    noisy_BHWC = alpha * latents_BHWC + sigma * noise_BHWC
    predicted = noise.PREDICTIONS[fitting.schedule.prediction]
    target_BHWC = predicted.target(latents_BHWC, noise_BHWC, alpha, sigma)
    untold_B = jax.random.bernoulli(draw("class"), jnp.float32(fitting.class_dropout), (batch,))

    def loss_of(params):
        told, null = module.of_labels(params, labels_B), module.null(params, batch)
        condition_B = jnp.where(untold_B, null, told)
        prediction = module.predict(params, noisy_BHWC, time_B, condition_B)
        return jnp.mean(jnp.square(prediction[..., : target_BHWC.shape[-1]] - target_BHWC))

    loss, gradient = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimiser(fitting).update(gradient, state.opt_state, state.params)
    now = rate(fitting, state.step)
    params = jax.tree.map(lambda p, u: p - now * u, state.params, updates)
    seen = state.step.astype(jnp.float32)
    decay = jnp.minimum(fitting.average, (1 + seen) / (10 + seen))
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, params)
    return FitState(state.step + 1, params, opt_state, average), loss


@functools.cache
def jitted_step(fitting: Fitting, module: nn.Module) -> Callable:
    """``fit_step`` of (seed, state, latents, labels), compiled; the state is donated."""
    return jax.jit(functools.partial(fit_step, fitting, module), donate_argnums=(1,))


def fit(
    module: nn.Module,
    fitting: Fitting,
    latents_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    seed: int,
    begun: Progress,
) -> Iterator[Progress]:
    """Train a denoiser on latents in memory, from where it is to its last step.

    Args:
      fitting: already found good by ``check``.
      begun: its state is given away with the first step, and so is each that is yielded.

    Yields:
      After each step how far it is.

    Raises:
      UserError: a loss that is not finite, when it is looked at.
    """
    state, losses, mean = begun
    step = jitted_step(fitting, module)
    for number in range(int(state.step) + 1, fitting.steps + 1):
        index = batch_index(fitting, seed, len(labels_N), number - 1)
        state, loss = step(np.uint32(seed), state, latents_NHWC[index], labels_N[index])
        losses = (*losses, loss)
        if number % LOOKED == 0 or number == fitting.steps:
            mean, losses = mean_loss(fitting, number, losses), ()
        yield Progress(state, losses, mean)


def mean_loss(fitting: Fitting, number: int, losses: Sequence[Array | float]) -> float:
    """Of the last steps up to a number.

    Raises:
      UserError: it is not finite.
    """
    mean = float(np.mean(np.array(jax.device_get(losses), np.float32)))
    if not math.isfinite(mean):
        raise UserError(
            f"the generator's loss is {mean} up to step {number}; lower "
            f"generate.fit.learning_rate={fitting.learning_rate:g}, in another workdir"
        )
    return mean
