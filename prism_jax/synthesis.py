"""The engine: images optimised against a pool of teachers.

    x~   = view(x; crop, flip, roll)                                   one view per batch
    L(x) = CE(z_primary(x~), y)
           + alpha_BN * mean_{t drawn} sum_l w_l (||mu_l - mu^_l|| + ||v_l - v^_l||)

Each teacher is an independent energy of the same viewed images. Its value and gradient are
taken *inside* ``lax.cond``, so that a teacher that is not drawn costs nothing and the memory is
that of one teacher; the gradients are summed and pulled back through the view once. One
compiled program serves every subset, unit and iteration count.

Everything random has coordinates (slot, block, step), so a step knows nothing of what ran
before it, of devices, or of interruptions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from prism_jax import parallel, rng, sampling
from prism_jax.core import losses, pixels, schedules, statistics, views
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.teachers import Teacher, TeacherPool
from prism_jax.types import Array, Draw, Normalisation, PyTree, SynthState

# A method is who supervises; everything else is a number in the recipe.
METHODS: dict[str, sampling.Sampler] = {
    "prism": sampling.SAMPLERS["subset"],
    "sre2l": sampling.SAMPLERS["fixed"],
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of the objective and the optimiser; static in the trace.

    Defaults are PRISM's (supplement, table 1b). ``primary`` is an index into the pool.
    """

    method: str = "prism"
    primary: int = 0
    granularity: str = "per_slot"
    alpha_bn: float = 0.01
    first_bn_multiplier: float = 10.0
    count_no_bn: bool = False
    learning_rate: float = 0.05
    betas: tuple[float, float] = (0.5, 0.9)
    crop_min: float = 0.08
    flip: bool = True
    roll: int = 32


class UnitBatch(NamedTuple):
    """What makes one image batch itself: its coordinates, its budget and its labels."""

    slot: Array  # () int32, first slot of the group
    block: Array  # () int32
    budget: Array  # () int32, iterations in all
    labels_B: Array  # int32


class Terms(NamedTuple):
    """One iteration's loss, unweighted, per teacher; NaN for a teacher that was not read."""

    step: Array  # () int32; -1: no such iteration
    loss: Array  # () weighted total
    ce_T: Array
    bn_T: Array
    draw: Draw


class ChunkReport(NamedTuple):
    """The first and last iterations of a chunk, and the first with a loss that is not finite."""

    first: Terms
    last: Terms
    failed: Terms


# --- the heart ------------------------------------------------------------------------------


def teacher_gradient(recipe: Recipe, teacher: Teacher, normalisation: Normalisation) -> Callable:
    """The energy of one teacher, as ``f(variables, viewed, labels, logit_w, statistic_w)``.

    Returns:
      A function to ``((ce, bn), gradient_BHWC)``: unweighted cross entropy and BN alignment,
      and the gradient of ``logit_w * ce + alpha_bn * statistic_w * bn`` by the viewed images.
    """
    align = recipe.alpha_bn > 0 and teacher.has_batch_norm

    def energy(viewed_BHWC, variables, labels_B, logit_weight, statistic_weight):
        logits_BK, moments = teacher.read(variables, viewed_BHWC, normalisation, statistics=align)
        ce = losses.cross_entropy(logits_BK, labels_B)
        bn = jnp.zeros_like(ce)
        if align:
            bn = statistics.bn_alignment(
                moments,
                variables["batch_stats"],
                first=teacher.first_bn,
                first_multiplier=recipe.first_bn_multiplier,
            )
        return logit_weight * ce + recipe.alpha_bn * statistic_weight * bn, (ce, bn)

    def gradient(variables, viewed_BHWC, labels_B, logit_weight, statistic_weight):
        (_, terms), gradient_BHWC = jax.value_and_grad(energy, has_aux=True)(
            viewed_BHWC, variables, labels_B, logit_weight, statistic_weight
        )
        return terms, gradient_BHWC

    return gradient


def draw_teachers(
    recipe: Recipe, teachers: tuple[Teacher, ...], key: Array, unit: UnitBatch, step: Array
) -> Draw:
    """Who supervises this iteration; ``granularity`` says which coordinates the draw has.

    A teacher without BatchNorm supervises no statistics. With ``count_no_bn`` it still counts
    in the mean (the released code's AlexNet), otherwise the mean is over the others.
    """
    coordinates = {
        "per_slot": (unit.slot,),
        "per_batch": (unit.slot, unit.block),
        "per_iteration": (unit.slot, unit.block, step),
    }[recipe.granularity]
    draw_key = rng.stream(key, f"recover/draw/{recipe.granularity}", *coordinates)
    draw = METHODS[recipe.method](draw_key, len(teachers), recipe.primary)
    if all(teacher.has_batch_norm for teacher in teachers):
        return draw
    has_bn_T = jnp.asarray([teacher.has_batch_norm for teacher in teachers], jnp.float32)
    weights_T = draw.statistic_weights_T * has_bn_T
    if not recipe.count_no_bn:
        weights_T = weights_T / jnp.maximum(weights_T.sum(), jnp.finfo(jnp.float32).tiny)
    return Draw(draw.logit_weights_T, weights_T)


def synthesis_step(
    recipe: Recipe,
    teachers: tuple[Teacher, ...],
    normalisation: Normalisation,
    variables: tuple[PyTree, ...],
    seed: Array,
    unit: UnitBatch,
    state: SynthState,
) -> tuple[SynthState, Terms]:
    """One iteration on one image batch: pure, and the same on every device."""
    key, step = rng.root(seed), state.step
    image_size = state.images_BHWC.shape[1:3]
    view = views.sample_view(
        rng.stream(key, "recover/view", unit.slot, unit.block, step),
        image_size,
        crop_scale=(recipe.crop_min, 1.0),
        flip=recipe.flip,
        roll=recipe.roll,
    )  # Reference: one crop, flip and roll for the whole batch.
    draw = draw_teachers(recipe, teachers, key, unit, step)
    viewed_BHWC, pull_back = jax.vjp(lambda x: views.apply_view(x, view), state.images_BHWC)

    # Every teacher is read, with its weight of zero, at both ends, for the log.
    report_all = (step == 0) | (step == unit.budget - 1)
    not_read = jnp.full((), jnp.nan, viewed_BHWC.dtype)
    gradient_BHWC = jnp.zeros_like(viewed_BHWC)
    ce, bn = [], []
    for t, teacher in enumerate(teachers):
        weights = draw.logit_weights_T[t], draw.statistic_weights_T[t]
        supervises = (weights[0] > 0) | (weights[1] > 0)
        (ce_t, bn_t), gradient_t = lax.cond(
            supervises | report_all,
            teacher_gradient(recipe, teacher, normalisation),
            lambda _, x, *__: ((not_read, not_read), jnp.zeros_like(x)),
            variables[t], viewed_BHWC, unit.labels_B, *weights,
        )  # fmt: skip
        # Zero times a gradient is zero only where it is finite.
        gradient_BHWC += jnp.where(supervises, gradient_t, 0.0)
        ce.append(ce_t)
        bn.append(bn_t)

    (image_gradient_BHWC,) = pull_back(gradient_BHWC)
    rate = recipe.learning_rate * schedules.SCHEDULES["cosine"](step, unit.budget)
    direction, opt_state = image_optimiser(recipe).update(image_gradient_BHWC, state.opt_state)
    images_BHWC = pixels.clip(state.images_BHWC - rate * direction, normalisation)
    terms = total(recipe, step, jnp.stack(ce), jnp.stack(bn), draw)
    return SynthState(images_BHWC, opt_state, step + 1), terms


# --------------------------------------------------------------------------------------------


def total(recipe: Recipe, step: Array, ce_T: Array, bn_T: Array, draw: Draw) -> Terms:
    """The weighted loss beside its unweighted terms; a teacher of weight zero adds nothing."""
    ce = jnp.where(draw.logit_weights_T > 0, draw.logit_weights_T * ce_T, 0.0)
    bn = jnp.where(draw.statistic_weights_T > 0, draw.statistic_weights_T * bn_T, 0.0)
    return Terms(step, ce.sum() + recipe.alpha_bn * bn.sum(), ce_T, bn_T, draw)


def image_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Adam without its learning rate, which is a cosine over each unit's own budget."""
    return optax.scale_by_adam(b1=recipe.betas[0], b2=recipe.betas[1], eps=1e-8)


def initial_state(recipe: Recipe, images_BHWC: Array) -> SynthState:
    """The state before the first iteration, for float32 images in the normalised space."""
    images_BHWC = jnp.asarray(images_BHWC)
    return SynthState(
        images_BHWC, image_optimiser(recipe).init(images_BHWC), jnp.zeros((), jnp.int32)
    )


def synthesis_chunk(
    recipe: Recipe,
    teachers: tuple[Teacher, ...],
    normalisation: Normalisation,
    variables: tuple[PyTree, ...],
    seed: Array,
    unit: UnitBatch,
    state: SynthState,
    count: Array,
) -> tuple[SynthState, ChunkReport]:
    """``count`` iterations in one dispatch; ``count`` is an argument, not a constant.

    A short last chunk, a resume in the middle and a single iteration are the same executable,
    and so the same bits: a step compiled outside the loop differs in the last one.
    """

    def body(i, carry):
        state, report = carry
        state, terms = synthesis_step(recipe, teachers, normalisation, variables, seed, unit, state)
        first = select(i == 0, terms, report.first)
        failing = (report.failed.step < 0) & ~jnp.isfinite(terms.loss)
        return state, ChunkReport(first, terms, select(failing, terms, report.failed))

    variables = tuple(layers.with_flipped_kernels(v) for v in variables)  # once, not every step
    blank = no_terms(len(teachers), state.images_BHWC.dtype)
    return lax.fori_loop(0, count, body, (state, ChunkReport(blank, blank, blank)))


def select(condition: Array, this: PyTree, that: PyTree) -> PyTree:
    """One of two trees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), this, that)


def no_terms(pool_size: int, dtype: jnp.dtype) -> Terms:
    """The terms of no iteration at all."""
    nan_T = jnp.full((pool_size,), jnp.nan, dtype)
    none_T = jnp.zeros((pool_size,), jnp.float32)
    return Terms(
        jnp.full((), -1, jnp.int32), jnp.full((), jnp.nan, dtype), nan_T, nan_T,
        Draw(none_T, none_T),
    )  # fmt: skip


def engine(
    pool: TeacherPool,
    recipe: Recipe,
    *,
    devices: list[jax.Device] | None = None,
    how: str = "shard_map",
) -> parallel.LaneMap:
    """The chunk, compiled for one image batch per device.

    Args:
      pool: the teachers; their weights are replicated and passed as arguments.
      recipe: the numbers; ``recipe.primary`` is an index into the pool.
      devices: one lane each; by default the first local device alone.
      how: "shard_map" or "pmap".

    Returns:
      A ``parallel.LaneMap`` of lanes ``(unit, state, count)`` to ``(state, ChunkReport)``;
      ``state`` is donated.
    """
    no_alignment = not any(t.has_batch_norm for t in pool.teachers)
    if recipe.alpha_bn > 0 and no_alignment:
        raise UserError(
            f"no teacher of the pool ({', '.join(pool.names)}) has BatchNorm, so there are no "
            f"statistics to align; add one that has, or set alpha_bn=0"
        )

    def chunk(variables, seed, unit, state, count):
        return synthesis_chunk(
            recipe, pool.teachers, pool.normalisation, variables, seed, unit, state, count
        )

    devices = devices or jax.local_devices()[:1]
    return parallel.LaneMap(chunk, pool.variables, arity=3, devices=devices, how=how, donate=(1,))


def drawn_share(
    recipe: Recipe, teachers: tuple[Teacher, ...], seed: int, unit: UnitBatch
) -> np.ndarray:
    """The share of a unit's iterations in which each teacher's statistics counted, (T,)."""

    def drawn(step):
        draw = draw_teachers(recipe, teachers, rng.root(np.uint32(seed)), unit, step)
        return draw.statistic_weights_T > 0

    steps = jnp.arange(int(unit.budget), dtype=jnp.int32)
    return np.asarray(jax.jit(jax.vmap(drawn))(steps)).mean(0)


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
    return f"the weighted loss is {float(failed.loss)} at step {int(failed.step)}"


def synthesise(
    pool: TeacherPool,
    images_uint8_BHWC: np.ndarray,
    labels_B: np.ndarray,
    *,
    iterations: int = 4000,
    primary: str | None = None,
    seed: int = 0,
    slot: int = 0,
    steps_per_dispatch: int = 50,
    rounding: str = "nearest",
    on_chunk: Callable[[ChunkReport], None] = lambda report: None,
    **recipe: float,
) -> np.ndarray:
    """Optimise one batch of images against a pool, from the images given.

    Args:
      pool: the teachers.
      images_uint8_BHWC: where to start: real images, or anything of their shape.
      labels_B: their classes.
      iterations: the budget; the learning rate decays to zero over it.
      primary: whose logits supervise; by default the pool's first teacher.
      seed, slot: the random draws' coordinates: another slot, other views and teachers.
      steps_per_dispatch: iterations between two calls of ``on_chunk``; changes no bit.
      rounding: "nearest", or "truncate" as the released code.
      on_chunk: called with each chunk's report.
      **recipe: any field of ``Recipe``.

    Returns:
      uint8 images of the same shape.

    Raises:
      UserError: a pool without statistics to align, or a loss that is not finite.
    """
    numbers = Recipe(primary=pool.index(primary) if primary else 0, **recipe)
    run = engine(pool, numbers)
    start = pixels.normalise(jnp.asarray(images_uint8_BHWC), pool.normalisation)
    unit = UnitBatch(
        np.int32(slot), np.int32(0), np.int32(iterations), np.asarray(labels_B, np.int32)
    )
    lane_unit, state = run.place(unit, 0), run.place(initial_state(numbers, start), 0)
    for done in range(0, iterations, steps_per_dispatch):
        count = min(steps_per_dispatch, iterations - done)
        [(state, report)] = run(seed, [(lane_unit, state, run.place(np.int32(count), 0))])
        report = run.fetch(report)
        if reason := explain_failure(report.failed, pool.names):
            raise UserError(f"synthesis stopped: {reason}; lower the learning rate or alpha_bn")
        on_chunk(report)
    images = run.fetch(state).images_BHWC
    return np.asarray(pixels.to_uint8(images, pool.normalisation, rounding=rounding))
