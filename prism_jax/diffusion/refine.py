"""Refine latents: the second half of CaO2 (arXiv 2506.22637).

A latent is moved by a few steps of Adam until the denoiser, told the class, explains better what
noise was added to it. Each image has one noise for all of its steps, and a time at each of them:

    loss = mean (noise - predicted)^2 + maximum * max |noise - predicted|
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from prism_jax.diffusion import noise
from prism_jax.errors import UserError
from prism_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Refining:
    """How latents are refined; static in a trace. The defaults are CaO2's.

    Attributes:
      sampled: steps of the sampler, whose times are looked at.
      steps: of Adam.
      maximum: what the largest error counts beside the mean of the squares.
      window: the first and the last step of the sampler at whose times latents are looked at, both
        included; numbered down to 0, as in ``guidance.Term``.
    """

    schedule: noise.Schedule = noise.DIT
    sampled: int = 50
    steps: int = 100
    learning_rate: float = 6e-4
    maximum: float = 10.0
    window: tuple[int, int] = (1, 11)


def check(refining: Refining) -> None:
    """Refuse numbers that refine nothing.

    Raises:
      UserError: what was given, and what is allowed; before any work.
    """
    first, last = refining.window
    if not 0 <= first <= last < refining.sampled:
        raise UserError(
            f"latents are refined at the times of steps {first} to {last}, but the steps are "
            f"numbered 0 (the last one) to {refining.sampled - 1}; choose a window among them"
        )
    if refining.steps < 1 or refining.learning_rate <= 0 or refining.maximum < 0:
        raise UserError(
            f"latents are refined in {refining.steps} steps at learning rate "
            f"{refining.learning_rate:g}, and the largest error counts {refining.maximum:g}; there "
            f"is at least one step, the rate is positive, and the error counts zero or more"
        )


def loss(
    refining: Refining,
    predict: Callable[[Array, Array], Array],
    latents_BHWC: Array,
    noise_BHWC: Array,
    number_B: Array,
) -> Array:
    """The loss of each image, (B,).

    Args:
      predict: (noisy_BHWC, time_B) -> prediction; a variance's channels come second.
      number_B: the step of the sampler at whose time an image is looked at.
    """
    grid = noise.grid(refining.schedule, refining.sampled)
    at_B = refining.sampled - 1 - number_B
    alpha, sigma = (
        jnp.asarray(levels_N, jnp.float32)[at_B][:, None, None, None]
        for levels_N in (grid.alpha_N, grid.sigma_N)
    )
    discrete = np.issubdtype(grid.time_S.dtype, np.integer)
    time_B = jnp.asarray(grid.time_S, jnp.int32 if discrete else jnp.float32)[at_B]
    noisy_BHWC = alpha * latents_BHWC + sigma * noise_BHWC
    prediction = predict(noisy_BHWC, time_B)[..., : noisy_BHWC.shape[-1]]
    predicted = noise.PREDICTIONS[refining.schedule.prediction]
    error = predicted.estimate(noisy_BHWC, prediction, alpha, sigma).noise - noise_BHWC
    size_BD = jnp.abs(error).reshape(len(error), -1)
    return jnp.mean(error**2, (1, 2, 3)) + refining.maximum * _largest(size_BD)


def _largest(values_BD: Array) -> Array:
    """The maximum of each row, (B,); the first where there are several.

    The gradient of ``jnp.max`` looks for what equals it and divides by how many there are. XLA may
    have computed those values anew with another last bit: then there are none, and it is NaN.
    """
    at_B = jnp.argmax(values_BD, 1)
    chosen_BD = jnp.arange(values_BD.shape[1]) == at_B[:, None]
    return jnp.sum(jnp.where(chosen_BD, values_BD, 0.0), 1)


def refine(
    refining: Refining,
    predict: Callable[[Array, Array], Array],
    latents_BHWC: Array,
    noise_BHWC: Array,
    numbers_TB: Array,
) -> Array:
    """The refined latents; no image depends on another.

    Args:
      numbers_TB: of each of T steps, as in :func:`loss`.
    """
    adam = optax.adam(refining.learning_rate)

    def total(latents_BHWC: Array, number_B: Array) -> Array:
        return loss(refining, predict, latents_BHWC, noise_BHWC, number_B).sum()

    def step(carry, number_B):
        latents_BHWC, state = carry
        updates, state = adam.update(jax.grad(total)(latents_BHWC, number_B), state)
        return (optax.apply_updates(latents_BHWC, updates), state), None

    (refined_BHWC, _), _ = lax.scan(step, (latents_BHWC, adam.init(latents_BHWC)), numbers_TB)
    return refined_BHWC
