"""How much noise there is at which time, and what a prediction says of the clean latent.

    noisy = alpha x0 + sigma epsilon,   alpha^2 + sigma^2 = 1

Tables are NumPy's, in float64: they depend on the schedule alone and are constants in a trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prism_jax.errors import UserError
from prism_jax.types import Array

TRAINED = 1000  # steps of the schedules that are tables of betas
# The cosine's angle is SLOPE t + FIRST_ANGLE: never quite clean, never quite noise.
FIRST_ANGLE, SLOPE = 0.002, 0.9975 * np.pi / 2


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What a denoiser was trained with, and how its times are spaced; static in a trace.

    Defaults are Stable Diffusion's.

    Attributes:
      name: a row of ``BETAS``, or "cosine", whose time is continuous.
      first, last: betas of the first and the last trained step; no use of them in "cosine".
      spacing: a row of ``SPACINGS``; no use of it in "cosine".
      offset: added to the times of "leading" (diffusers' ``steps_offset``).
      ends_clean: the last step goes to no noise at all, otherwise to the first trained step
        (diffusers' ``set_alpha_to_one``).
      prediction: a row of ``PREDICTIONS``.
    """

    name: str = "scaled_linear"
    first: float = 0.00085
    last: float = 0.012
    spacing: str = "leading"
    offset: int = 1
    ends_clean: bool = False
    prediction: str = "epsilon"


STABLE_DIFFUSION = Schedule()
DIT = Schedule("linear", 1e-4, 2e-2, spacing="even", ends_clean=True)
COSINE = Schedule("cosine", ends_clean=True, prediction="v")


class Bounds(NamedTuple):
    """What a clean latent lies between, per channel."""

    low_C: Array
    high_C: Array


class Grid(NamedTuple):
    """The S steps of a sampler, from noise to image, whatever the strength.

    Attributes:
      time_S: what the denoiser is told where each step begins.
      alpha_N, sigma_N: signal and noise there, and (N = S + 1) where the last one ends.
    """

    time_S: np.ndarray
    alpha_N: np.ndarray
    sigma_N: np.ndarray


def scaled_linear(schedule: Schedule) -> np.ndarray:
    """Betas whose roots are linear (latent diffusion)."""
    return np.linspace(schedule.first**0.5, schedule.last**0.5, TRAINED) ** 2


def linear(schedule: Schedule) -> np.ndarray:
    """Betas that are linear (DDPM, DiT)."""
    return np.linspace(schedule.first, schedule.last, TRAINED)


BETAS: dict[str, Callable[[Schedule], np.ndarray]] = {
    "scaled_linear": scaled_linear,
    "linear": linear,
}


def leading(schedule: Schedule, steps: int) -> np.ndarray:
    """Multiples of ``1000 // steps``, and an offset."""
    return np.arange(steps)[::-1] * (TRAINED // steps) + schedule.offset


def trailing(schedule: Schedule, steps: int) -> np.ndarray:
    """From the last trained step down."""
    del schedule
    return np.round(TRAINED - np.arange(steps) * (TRAINED / steps)) - 1


def even(schedule: Schedule, steps: int) -> np.ndarray:
    """Evenly from the last trained step to the first (DiT's respacing)."""
    del schedule
    return np.round(np.linspace(0, TRAINED - 1, steps))[::-1]


SPACINGS: dict[str, Callable[[Schedule, int], np.ndarray]] = {
    "leading": leading,
    "trailing": trailing,
    "even": even,
}


def levels(schedule: Schedule, time: np.ndarray | Array):
    """Signal and noise (alpha, sigma) at times that the denoiser is told.

    Args:
      time: a continuous time in [0, 1] for "cosine", otherwise integers, of the trained steps;
        NumPy's give float64, traced ones float32.
    """
    library: Any = np if isinstance(time, np.ndarray) else jnp
    if schedule.name == "cosine":
        angle = SLOPE * time + FIRST_ANGLE
        return library.cos(angle), library.sin(angle)
    signal = np.cumprod(1 - BETAS[schedule.name](schedule))
    tables: Any = np.sqrt(signal), np.sqrt(1 - signal)
    if library is jnp:
        tables = tuple(jnp.asarray(table, jnp.float32) for table in tables)
    alphas, sigmas = tables
    return alphas[time], sigmas[time]


def times(schedule: Schedule, uniform_B: Array) -> Array:
    """Times to train at, from numbers in [0, 1)."""
    if schedule.name == "cosine":
        return uniform_B
    return (uniform_B * TRAINED).astype(jnp.int32)


def grid(schedule: Schedule, steps: int) -> Grid:
    """The steps of a sampler.

    Raises:
      UserError: as ``check``.
    """
    check(schedule, steps)
    if schedule.name == "cosine":
        time_S = np.arange(steps, 0, -1) / steps
        first = np.zeros(1)
    else:
        time_S = SPACINGS[schedule.spacing](schedule, steps).astype(np.int64)
        first = np.zeros(1, np.int64)
    alpha_N, sigma_N = levels(schedule, np.concatenate([time_S, first]))
    if schedule.ends_clean:
        alpha_N[-1], sigma_N[-1] = 1.0, 0.0
    return Grid(time_S, alpha_N, sigma_N)


def check(schedule: Schedule, steps: int) -> None:
    """Refuse names that are in no table and steps that the schedule cannot give.

    Raises:
      UserError: what was given, and what is allowed.
    """
    for what, value, allowed in (
        ("the noise schedule", schedule.name, (*BETAS, "cosine")),
        ("the spacing of steps", schedule.spacing, tuple(SPACINGS)),
        ("the kind of prediction", schedule.prediction, tuple(PREDICTIONS)),
    ):
        if value not in allowed:
            raise UserError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if steps < 1:
        raise UserError(f"a sampler of {steps} steps makes nothing; give it at least one")
    if schedule.name == "cosine":
        return
    if steps > TRAINED:
        raise UserError(
            f"a sampler of {steps} steps needs more than the {TRAINED} that its denoiser was "
            f"trained with; choose at most {TRAINED}"
        )
    last = SPACINGS[schedule.spacing](schedule, steps)[0]
    if not 0 <= last < TRAINED:
        raise UserError(
            f"{steps} steps that are spaced {schedule.spacing!r} with offset {schedule.offset} "
            f"begin at time {int(last)}, but the denoiser knows 0 to {TRAINED - 1}; choose fewer "
            f"steps or offset 0"
        )


class Estimate(NamedTuple):
    """What a prediction says of a noisy latent: the clean one, and the noise.

    No array is divided by a number, but multiplied by its inverse: where a program is for several
    devices XLA does so itself, and bits would depend on them.
    """

    clean: Array
    noise: Array


class Prediction(NamedTuple):
    """A kind of prediction, from which the estimate follows, and which training aims at.

    ``estimate`` takes the noisy latent, the prediction, alpha and sigma; ``target`` the clean
    latent, the noise, alpha and sigma.
    """

    estimate: Callable[[Array, Array, Array, Array], Estimate]
    target: Callable[[Array, Array, Array, Array], Array]


def from_epsilon(noisy: Array, prediction: Array, alpha: Array, sigma: Array) -> Estimate:
    """The prediction is the noise."""
    return Estimate((noisy - sigma * prediction) * (1 / alpha), prediction)


def from_v(noisy: Array, prediction: Array, alpha: Array, sigma: Array) -> Estimate:
    """The prediction is ``alpha epsilon - sigma x0`` (arXiv 2202.00512)."""
    return Estimate(alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction)


PREDICTIONS: dict[str, Prediction] = {
    "epsilon": Prediction(from_epsilon, lambda clean, noise, alpha, sigma: noise),
    "v": Prediction(from_v, lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean),
}


def within(bounds: Bounds, estimate: Estimate, noisy: Array, alpha: Array, sigma: Array):
    """The clean latent within bounds, and the noise that then explains the noisy one."""
    clean = jnp.clip(estimate.clean, bounds.low_C, bounds.high_C)
    return Estimate(clean, (noisy - alpha * clean) * (1 / sigma))
