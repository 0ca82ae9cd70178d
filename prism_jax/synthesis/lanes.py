"""The step compiled for devices, and what is said of its results."""

from __future__ import annotations

import functools
from typing import TypeAlias

import jax
import numpy as np

from prism_jax import parallel, rng
from prism_jax.errors import UserError
from prism_jax.synthesis.guide import Guide
from prism_jax.synthesis.guide import check as check_guide
from prism_jax.synthesis.objective import has_statistics
from prism_jax.synthesis.recipe import Recipe, Terms, UnitBatch
from prism_jax.synthesis.step import draw_teachers, synthesis_chunk
from prism_jax.teachers import Teacher, TeacherPool

# What runs the step: a batch per device, or per several devices.
Engine: TypeAlias = parallel.LaneMap | parallel.SpanMap


def engine(
    pool: TeacherPool,
    recipe: Recipe,
    *,
    devices: list[jax.Device] | None = None,
    how: str = "shard_map",
    span: int = 1,
    guide: Guide | None = None,
) -> Engine:
    """The chunk, compiled for one image batch per device, or per ``span`` devices.

    Args:
      pool: the teachers; their weights are replicated and passed as arguments.
      recipe: the numbers; ``recipe.primary`` is an index into the pool.
      devices: one lane each; by default the first local device alone.
      how: "shard_map" or "pmap"; where a batch has one device.
      span: devices that share a batch; statistics and gradients are those of the whole batch, up
        to the order in which sums are added.
      guide: the encoder whose weight is ``recipe.clip``, where that is above zero.

    Returns:
      A map of lanes ``(unit, state, count)`` to ``(state, ChunkReport)``;
      ``state`` is donated.
    """
    if recipe.alpha_bn > 0 and not any(has_statistics(recipe, t) for t in pool.teachers):
        raise UserError(
            f"no teacher of the pool ({', '.join(pool.names)}) has BatchNorm, so there are no "
            f"statistics to align; add one that has, or set alpha_bn=0"
        )

    check_guide(recipe, guide)

    def chunk(shared, seed, unit, state, count):
        variables, guide = shared
        return synthesis_chunk(
            recipe, pool.teachers, pool.normalisation, variables, seed, unit, state, count, guide
        )

    devices, shared = devices or parallel.devices()[:span], (pool.variables, guide)
    if span > 1:
        return parallel.SpanMap(chunk, shared, devices=devices, span=span, donate=(1,))
    return parallel.lane_map(
        chunk, shared, arity=3, devices=devices, how=how, donate=(1,),
        key=("synthesis", recipe, pool.teachers, pool.normalisation),
    )  # fmt: skip


def drawn_share(
    recipe: Recipe, teachers: tuple[Teacher, ...], seed: int, unit: UnitBatch
) -> np.ndarray:
    """The share of a unit's iterations in which each teacher's statistics counted, (T,)."""
    steps = np.arange(int(unit.budget), dtype=np.int32)
    nothing = np.zeros(0, np.int32)  # no draw reads labels or weights
    place = unit._replace(labels_B=nothing, weights=None, probes_BHWC=None)
    return np.asarray(_drawn(recipe, teachers)(np.uint32(seed), place, steps)).mean(0)


@functools.lru_cache(maxsize=8)
def _drawn(recipe: Recipe, teachers: tuple[Teacher, ...]) -> jax.stages.Wrapped:
    """Whose statistics count in each of some iterations; one program for all units."""

    def drawn(seed, unit, step):
        draw = draw_teachers(recipe, teachers, rng.root(seed), unit, step)
        return draw.statistic_weights_T > 0

    return jax.jit(jax.vmap(drawn, (None, None, 0)))


def explain_failure(failed: Terms, names: tuple[str, ...]) -> str | None:
    """The step, term and teacher of a loss that was not finite; None where all were finite."""
    if failed.step < 0:
        return None
    for term, values, weights in (
        ("cross entropy", failed.ce_T, failed.draw.logit_weights_T),
        ("BN alignment", failed.bn_T, failed.draw.statistic_weights_T),
    ):
        for name, value, weight in zip(names, values, weights, strict=True):
            if weight > 0 and not np.isfinite(value):
                return f"the {term} of teacher {name} is {float(value)} at step {int(failed.step)}"
    for name, value in failed.others.items():
        if not np.ndim(value) and not np.isfinite(value):
            return f"the term {name} is {float(value)} at step {int(failed.step)}"
    return f"the weighted loss is {float(failed.loss)} at step {int(failed.step)}"
