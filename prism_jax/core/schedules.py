"""Learning rates, crop curricula and iteration budgets."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import jax.numpy as jnp

from prism_jax.types import Array, Integer

KNEE = 5 / 6  # where the "decayed cosine" turns linear
SIDE = 1e-6  # of a run: a step that lies on a knee or milestone is on its intended side


def _progress(step: Integer, total: Integer) -> Array:
    return jnp.asarray(step, jnp.float32) / jnp.asarray(total, jnp.float32)


def _cosine(s: Array, period: float = 1.0) -> Array:
    return 0.5 * (1.0 + jnp.cos(jnp.float32(jnp.pi / period) * s))


def constant(step: Integer, total: Integer) -> Array:
    """1."""
    return jnp.ones_like(_progress(step, total))


def cosine(step: Integer, total: Integer, *, zeta: float = 1.0) -> Array:
    """``(1 + cos(pi s / zeta)) / 2`` with s = step / total: 1 to 0; zeta = 2 ends at 0.5."""
    return _cosine(_progress(step, total), zeta)


def half_cosine(step: Integer, total: Integer) -> Array:
    """``cosine`` with zeta = 2: 1 to 0.5 (RDED, DELT)."""
    return cosine(step, total, zeta=2.0)


def cos2(step: Integer, total: Integer, *, zeta: float = 2.5) -> Array:
    """The decayed cosine as released: ``(1 + cos(pi s / zeta)) / 2``, after s = 5/6 linear.

    The linear branch is ``c (1 - s)`` with c the cosine's value at the knee (0.75 for PRISM's
    zeta of 2.5), which makes the rate drop sixfold there.
    """
    s = _progress(step, total)
    at_knee = _cosine(jnp.float32(KNEE), zeta)
    # Reference: (6E - 6s) / 6E, where a continuous schedule has (6E - 6s) / E.
    return jnp.where(s <= jnp.float32(KNEE) + SIDE, _cosine(s, zeta), at_knee * (1.0 - s))


def cos2_continuous(step: Integer, total: Integer, *, zeta: float = 2.5) -> Array:
    """The decayed cosine without the jump: from the knee straight to 0."""
    s = _progress(step, total)
    at_knee = _cosine(jnp.float32(KNEE), zeta)
    return jnp.where(s <= jnp.float32(KNEE), _cosine(s, zeta), at_knee * 6.0 * (1.0 - s))


def linear(step: Integer, total: Integer, *, zeta: float = 1.0) -> Array:
    """``1 - s / zeta``."""
    return 1.0 - _progress(step, total) / zeta


def half_linear(step: Integer, total: Integer) -> Array:
    """``linear`` with zeta = 2 (what EDC's released code does)."""
    return 1.0 - 0.5 * _progress(step, total)


def multistep(
    step: Integer, total: Integer, *, milestones: tuple[float, ...] = (), gamma: float = 0.1
) -> Array:
    """Times ``gamma`` at each milestone, a fraction of the run (PyTorch's MultiStepLR)."""
    s = _progress(step, total)
    passed = [s + SIDE >= jnp.float32(milestone) for milestone in milestones]
    return jnp.float32(gamma) ** sum((p.astype(jnp.float32) for p in passed), jnp.zeros_like(s))


SCHEDULES: dict[str, Callable[..., Array]] = {
    "constant": constant,
    "cosine": cosine,
    "half_cosine": half_cosine,
    "cos2": cos2,
    "cos2_continuous": cos2_continuous,
    "linear": linear,
    "half_linear": half_linear,
    "multistep": multistep,
}


# How much of the image the smallest crop still shows while it falls (CDA, section 3.3).
CURRICULA: dict[str, Callable[[Integer, Integer], Array]] = {
    "step": constant,
    "linear": linear,
    "cosine": cosine,
}


def smallest_crop(
    curriculum: str, lowest: float, step: Integer, total: Integer, *, milestone: float
) -> float | Array:
    """The lower bound of the crop's share of the area, which falls from 1 to ``lowest``.

        lowest + (1 - lowest) f(step, milestone * total)    before milestone * total, then lowest

    Args:
      curriculum: a row of ``CURRICULA``, or "constant": always ``lowest``.
      milestone: the part of the run in which it falls; 0 is "constant".
    """
    if curriculum == "constant" or milestone == 0:
        return lowest
    until = jnp.float32(milestone) * jnp.asarray(total, jnp.float32)
    share = CURRICULA[curriculum](step, until)
    falling = jnp.float32(lowest) + jnp.float32(1.0 - lowest) * share
    return jnp.where(jnp.asarray(step, jnp.float32) < until, falling, jnp.float32(lowest))


def values_of(name: str) -> tuple[str, ...]:
    """The names of the values that a schedule takes beside step and total."""
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def warmed_up(
    name: str, step: Integer, total: Integer, *, warmup: int, warmup_start: float, **values
) -> Array:
    """A schedule after a linear warm-up, as PyTorch's LinearLR and SequentialLR make it.

    Args:
      name: of the schedule, which gets the ``total - warmup`` steps that follow.
      warmup: steps from ``warmup_start`` to 1; 0 is none.
      **values: the schedule's own.
    """
    if not warmup:
        return SCHEDULES[name](step, total, **values)
    rise = _progress(step, jnp.int32(warmup))
    after = SCHEDULES[name](jnp.maximum(step - warmup, 0), total - warmup, **values)
    return jnp.where(rise < 1.0, warmup_start + (1.0 - warmup_start) * rise, after)


def same_budget(iterations: int, slot: int) -> int:
    """Every slot gets all iterations (paper)."""
    del slot
    return iterations


def mod8_budget(iterations: int, slot: int) -> int:
    """``iterations - iterations/8 (slot mod 8)``: 4000, 3500, ..., 500 (released code)."""
    return iterations - iterations // 8 * (slot % 8)


# Iterations of the batch that holds a slot.
BUDGETS: dict[str, Callable[[int, int], int]] = {
    "constant": same_budget,
    "mod8": mod8_budget,
    "early_late": same_budget,  # of the first images; the others join later, see `joined`
}


def joined(slots: int, rounds: int) -> tuple[int, ...]:
    """How many slots of a batch are optimised in each round (DELT's early-late).

    The slots divide into ``rounds`` groups, the first ``slots mod rounds`` of them larger by
    one; group g joins at round g: 10 slots in 8 rounds are 2, 4, 5, 6, 7, 8, 9, 10.
    """
    return tuple((g + 1) * (slots // rounds) + min(g + 1, slots % rounds) for g in range(rounds))
