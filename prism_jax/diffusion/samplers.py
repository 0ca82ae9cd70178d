"""Samplers: from noise, or from an anchor under noise, to a latent.

A sampler is a :class:`Course`: what is carried, one step, and a table with a row per step. The
tables are worked out beforehand, so a course is one ``lax.scan`` of a static number of steps.

Where a course begins is its *strength*: of the S steps of the grid the last ``int(S * strength)``
are run, as diffusers counts them. At strength 1 a sample begins as noise alone and does not
depend on the anchor (diffusers leaves a trace of it); at strength 0 nothing is run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from prism_jax.diffusion import guidance, noise
from prism_jax.diffusion.guidance import Term
from prism_jax.errors import UserError
from prism_jax.types import Array, PyTree

SMALLEST = 1e-20  # variance, before its logarithm is taken
VARIANCES = ("small", "large", "learned")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a latent is sampled; static in a trace. The defaults are D4M's.

    Attributes:
      sampler: a row of ``SAMPLERS``.
      steps: of the whole grid.
      strength: which part of them is run, from 0 (the anchor itself) to 1 (no anchor).
      guidance: classifier-free; 1 is none.
      guided_channels: the first so many; None: all of the latent's.
      eta: noise of DDIM, from 0 (none) to 1 (as much as DDPM's).
      variance: of DDPM's noise, one of ``VARIANCES``; "learned" is the denoiser's own, between
        the logarithms of the two others.
      slip: PNDM from an anchor as released: the first step is not taken twice, but the second
        prediction counts as if it had been, and from then on a latent is one step noisier than
        the time that the denoiser is told.
      terms: beside classifier-free guidance.
    """

    schedule: noise.Schedule = noise.STABLE_DIFFUSION
    sampler: str = "pndm"
    steps: int = 50
    strength: float = 0.7
    guidance: float = 8.0
    guided_channels: int | None = None
    eta: float = 0.0
    variance: str = "small"
    slip: bool = False
    terms: tuple[Term, ...] = ()


class Sight(NamedTuple):
    """What a course is given beside its start.

    Attributes:
      predict: (noisy_BHWC, time ()) -> prediction, guided; its variance's channels come second.
      draw: step () -> standard normal noise (B, H, W, C).
      anchors_BHWC: what terms draw towards.
      bounds: what estimates are clipped to, or None.
    """

    predict: Callable[[Array, Array], Array]
    draw: Callable[[Array], Array]
    anchors_BHWC: Array
    bounds: noise.Bounds | None = None


class Course(NamedTuple):
    """A loop: ``lax.scan(step, carry, table)``; ``latents`` takes the latents from a carry."""

    carry: PyTree
    step: Callable[[PyTree, Any], PyTree]
    table: dict[str, np.ndarray]
    latents: Callable[[PyTree], Array]


def begun(sampling: Sampling) -> int:
    """How many steps the strength leaves."""
    return min(int(sampling.steps * sampling.strength), sampling.steps)


def least_strength(steps: int) -> float:
    """The least strength that leaves a step to run, in a few digits: rounded up, never down."""
    scale = 10 ** (len(str(steps)) + 1)
    return -(-scale // steps) / scale


def evaluations(sampling: Sampling) -> int:
    """How often the denoiser reads an image, each half of guidance counted as one."""
    if sampling.sampler != "pndm" or not begun(sampling):
        return begun(sampling)
    return len(_twice(sampling)[0])


def check(sampling: Sampling) -> None:
    """Refuse what cannot be sampled.

    Raises:
      UserError: what was given, and what is allowed; before any work.
    """
    for what, value, allowed in (
        ("the sampler", sampling.sampler, tuple(SAMPLERS)),
        ("the variance", sampling.variance, VARIANCES),
    ):
        if value not in allowed:
            raise UserError(f"{what} is {value!r}; allowed: {', '.join(allowed)}")
    if not 0 <= sampling.strength <= 1:
        raise UserError(f"strength is {sampling.strength}; allowed: 0 (the anchor) to 1 (noise)")
    if not 0 <= sampling.eta <= 1:
        raise UserError(f"eta is {sampling.eta}; allowed: 0 (no noise) to 1 (DDPM's)")
    for what, given, owner in (
        ("eta", sampling.eta != 0, "ddim"),
        ("variance", sampling.variance != "small", "ddpm"),
        ("slip", sampling.slip, "pndm"),
    ):
        if given and sampling.sampler != owner:
            raise UserError(
                f"{what} belongs to the sampler {owner!r}, but the sampler is "
                f"{sampling.sampler!r}, which has no use for it; leave it out"
            )
    noise.check(sampling.schedule, sampling.steps)
    count = begun(sampling)
    if sampling.strength > 0 and count == 0:
        raise UserError(
            f"strength {sampling.strength} of {sampling.steps} steps leaves no step to run; "
            f"choose at least {least_strength(sampling.steps):g}, more steps, or strength 0 for "
            f"the anchors as they are"
        )
    if sampling.strength > 0:
        guidance.check(sampling.terms, sampling.steps, count)


def start(sampling: Sampling, anchors_BHWC: Array, noise_BHWC: Array) -> Array:
    """The latents that the first step begins with."""
    if begun(sampling) == sampling.steps:
        return noise_BHWC
    grid, at = noise.grid(sampling.schedule, sampling.steps), sampling.steps - begun(sampling)
    if sampling.sampler == "pndm":
        at = _twice(sampling)[0][0]
    alpha, sigma = np.float32(grid.alpha_N[at]), np.float32(grid.sigma_N[at])
    return alpha * anchors_BHWC + sigma * noise_BHWC


def run(course: Course) -> Array:
    """The latents at a course's end."""
    carry, _ = lax.scan(lambda c, row: (course.step(c, row), None), course.carry, course.table)
    return course.latents(carry)


# --- the samplers ---------------------------------------------------------------------------


def ddim(sampling: Sampling, sight: Sight, start_BHWC: Array) -> Course:
    """Towards the clean latent along its own noise, with ``eta`` of it fresh (arXiv 2010.02502)."""
    rows = _rows(sampling, *_straight(sampling), eta=sampling.eta)

    def step(noisy_BHWC, row):
        prediction = _of_latent(sight.predict(noisy_BHWC, row["time"]), noisy_BHWC)
        moved = _moved(sampling, sight, noisy_BHWC, prediction, row, row["posterior"])
        if sampling.eta == 0:
            return moved
        return moved + sampling.eta * row["posterior"] * sight.draw(row["step"])

    return Course(start_BHWC, step, rows, lambda noisy_BHWC: noisy_BHWC)


def ddpm(sampling: Sampling, sight: Sight, start_BHWC: Array) -> Course:
    """A draw from the posterior (arXiv 2006.11239); the last step is its mean, and clean."""
    clean = dataclasses.replace(sampling.schedule, ends_clean=True)
    sampling = dataclasses.replace(sampling, schedule=clean)
    rows = _rows(sampling, *_straight(sampling), eta=1.0)

    def step(noisy_BHWC, row):
        prediction = sight.predict(noisy_BHWC, row["time"])
        deviation = _deviation(sampling, prediction, noisy_BHWC.shape[-1], row)
        deviation = jnp.where(row["step"] > 0, deviation, 0.0)
        prediction = _of_latent(prediction, noisy_BHWC)
        moved = _moved(sampling, sight, noisy_BHWC, prediction, row, deviation)
        return moved + deviation * sight.draw(row["step"])

    return Course(start_BHWC, step, rows, lambda noisy_BHWC: noisy_BHWC)


# How PNDM mixes a prediction with earlier ones, at its first calls and ever after.
MIXTURES = np.array([
    [1, 0, 0, 0],
    [1 / 2, 1 / 2, 0, 0],  # the first step again
    [3 / 2, -1 / 2, 0, 0],
    [23 / 12, -16 / 12, 5 / 12, 0],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
], np.float32)  # fmt: skip


class Past(NamedTuple):
    """What PNDM carries: the latents, where the last step began, the three last predictions."""

    noisy_BHWC: Array
    held_BHWC: Array
    predictions_3BHWC: Array


def pndm(sampling: Sampling, sight: Sight, start_BHWC: Array) -> Course:
    """A linear multistep method (arXiv 2202.09778, without its Runge-Kutta steps).

    The first step is taken twice, the second time with the mean of the predictions at both of
    its ends: one evaluation more than there are steps.
    """
    told, left = _twice(sampling)
    rows = _rows(sampling, told, left, left + 1, eta=0.0)
    calls = np.arange(len(told))
    rows["mixture"] = MIXTURES[np.minimum(calls, len(MIXTURES) - 1)]
    rows["again"] = calls == 1

    def step(past: Past, row):
        prediction = _of_latent(sight.predict(past.noisy_BHWC, row["time"]), past.noisy_BHWC)
        recent = jnp.concatenate([prediction[None], past.predictions_3BHWC])
        mixed = sum(row["mixture"][i] * recent[i] for i in range(len(recent)))
        held = jnp.where(row["again"], past.held_BHWC, past.noisy_BHWC)
        moved = _moved(sampling, sight, held, mixed, row, row["posterior"])
        kept = jnp.where(row["again"], past.predictions_3BHWC, recent[:3])
        return Past(moved, held, kept)

    nothing = jnp.zeros((3, *start_BHWC.shape), start_BHWC.dtype)
    return Course(Past(start_BHWC, start_BHWC, nothing), step, rows, lambda past: past.noisy_BHWC)


SAMPLERS: dict[str, Callable[[Sampling, Sight, Array], Course]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
}


# --- which steps ----------------------------------------------------------------------------


def _straight(sampling: Sampling) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nodes that are told, left and reached, one after the other."""
    nodes = np.arange(sampling.steps - begun(sampling), sampling.steps)
    return nodes, nodes, nodes + 1


def _twice(sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The nodes that PNDM tells and leaves."""
    at = sampling.steps - begun(sampling)
    nodes = np.arange(0 if sampling.slip else at, sampling.steps)
    told = np.concatenate([nodes[:2], nodes[1:]])
    if sampling.slip:  # Reference: the list of all steps is cut, wherever its double then is.
        told = told[at:]
    left = told.copy()
    left[1:2] -= 1
    return told, left


def _rows(sampling: Sampling, told: np.ndarray, left: np.ndarray, reached: np.ndarray, eta: float):
    """The numbers of steps that leave nodes of the grid for others.

    Args:
      told: the nodes whose time the denoiser is told.
      eta: which part of the posterior's deviation is fresh noise.

    Returns:
      float32 rows; ``step`` numbers them down to 0, and ``posterior`` is the deviation of the
      next latent, given this one and the clean one (arXiv 2006.11239, equation 7).
    """
    grid = noise.grid(sampling.schedule, sampling.steps)
    alpha, sigma = grid.alpha_N[left], grid.sigma_N[left]
    next_alpha, next_sigma = grid.alpha_N[reached], grid.sigma_N[reached]
    beta = 1 - (alpha / next_alpha) ** 2
    posterior = next_sigma / sigma * np.sqrt(beta)
    table = {
        "alpha": alpha,
        "sigma": sigma,
        "clean_share": next_alpha,
        "noise_share": np.sqrt(next_sigma**2 - (eta * posterior) ** 2),
        "posterior": posterior,
        "large": np.sqrt(beta),
    }
    table = {name: values.astype(np.float32) for name, values in table.items()}
    discrete = np.issubdtype(grid.time_S.dtype, np.integer)
    table["time"] = grid.time_S[told].astype(np.int32 if discrete else np.float32)
    table["step"] = (sampling.steps - 1 - left).astype(np.int32)
    for index, term in enumerate(sampling.terms):
        table[f"term {index}"] = guidance.weights(term, table["step"])
    return table


# --- one step -------------------------------------------------------------------------------


def _of_latent(prediction_BHWC: Array, noisy_BHWC: Array) -> Array:
    """A prediction without the channels of its variance."""
    return prediction_BHWC[..., : noisy_BHWC.shape[-1]]


def _moved(
    sampling: Sampling,
    sight: Sight,
    noisy_BHWC: Array,
    prediction_BHWC: Array,
    row: dict[str, Array],
    deviation: Array,
) -> Array:
    """The mean of the next latents, drawn by the terms."""
    levels = row["alpha"], row["sigma"]
    predicted = noise.PREDICTIONS[sampling.schedule.prediction]
    estimate = predicted.estimate(noisy_BHWC, prediction_BHWC, *levels)
    if sight.bounds is not None:
        estimate = noise.within(sight.bounds, estimate, noisy_BHWC, *levels)
    moved = row["clean_share"] * estimate.clean + row["noise_share"] * estimate.noise
    for index, term in enumerate(sampling.terms):
        weight = row[f"term {index}"]
        direction = lax.cond(
            weight != 0, guidance.TERMS[term.name], lambda clean, _: jnp.zeros_like(clean),
            estimate.clean, sight.anchors_BHWC,
        )  # fmt: skip
        moved -= weight * deviation * direction
    return moved


def _deviation(
    sampling: Sampling, prediction_BHWC: Array, channels: int, row: dict[str, Array]
) -> Array:
    """DDPM's; a learned one lies between the two others' logarithms (arXiv 2102.09672)."""
    if sampling.variance == "small":
        return row["posterior"]
    if sampling.variance == "large":
        return row["large"]
    share = (prediction_BHWC[..., channels:] + 1) / 2
    if share.shape[-1] != channels:
        raise UserError(
            f"the variance is 'learned', but the denoiser returns {prediction_BHWC.shape[-1]} "
            f"channels for latents of {channels}, not twice as many; choose 'small' or 'large'"
        )
    small, large = (jnp.log(jnp.maximum(row[n] ** 2, SMALLEST)) for n in ("posterior", "large"))
    return jnp.exp(0.5 * (share * large + (1 - share) * small))
