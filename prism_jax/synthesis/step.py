"""One iteration: images optimised against a pool of teachers.

Each teacher is an independent energy of the same viewed images. Its value and gradient are
taken *inside* ``lax.cond``, so that a teacher that is not drawn costs nothing and the memory is
that of one teacher; the gradients are summed and pulled back through the view once. One
compiled program serves every subset, unit and iteration count.

Everything random has coordinates (slot, block, step), so a step knows nothing of what ran
before it, of devices, or of interruptions.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax import lax

from prism_jax import rng
from prism_jax.core import pixels, schedules, statistics, views
from prism_jax.models import layers
from prism_jax.synthesis import sampling
from prism_jax.synthesis.guide import Guide, guide_gradient
from prism_jax.synthesis.objective import (
    GUIDED,
    alignment_scales,
    has_statistics,
    no_terms,
    not_read,
    of_group,
    prior_terms,
    statistic_targets,
    teacher_gradient,
    total,
)
from prism_jax.synthesis.parametrisation import PARAMETRISATIONS
from prism_jax.synthesis.recipe import (
    FLATNESS_MOMENTUM,
    METHODS,
    ChunkReport,
    Memory,
    Recipe,
    Shown,
    Terms,
    UnitBatch,
)
from prism_jax.teachers import Teacher, TeacherPool
from prism_jax.types import AnyArray, Array, Draw, Integer, Normalisation, PyTree, SynthState, View


def synthesis_step(
    recipe: Recipe,
    teachers: tuple[Teacher, ...],
    normalisation: Normalisation,
    variables: tuple[PyTree, ...],
    seed: Array,
    unit: UnitBatch,
    state: SynthState,
    guide: Guide | None = None,
) -> tuple[SynthState, Terms]:
    """One iteration on one image batch: pure, and the same on every device."""
    key, step = rng.root(seed), state.step
    view = view_of(recipe, key, unit, step, state.images_BHWC.shape[1:3])
    draw = draw_teachers(recipe, teachers, key, unit, step)
    if recipe.alpha_bn and recipe.alignment_scale != "none":
        scale_T = alignment_scales(recipe, teachers, variables)
        draw = draw._replace(statistic_weights_T=draw.statistic_weights_T * scale_T)
    viewed_BHWC, pull_back = jax.vjp(lambda x: views.apply_view(x, view), state.images_BHWC)
    if recipe.view_noise:
        viewed_BHWC += noise_of(recipe, normalisation, key, unit, step, viewed_BHWC)
    shown = Shown(unit.labels_B[: len(viewed_BHWC)], *draw)
    if recipe.flatness:
        shown = shown._replace(average_BHWC=views.apply_view(state.memory.images_BHWC, view))

    # Every teacher is read, with its weight of zero, at both ends, for the log.
    report_all = (step == 0) | (step == unit.budget - 1)
    gradient_BHWC = jnp.zeros_like(viewed_BHWC)
    memories, reads = [], []
    for t, teacher in enumerate(teachers):
        weights = draw.logit_weights_T[t], draw.statistic_weights_T[t]
        supervises = (weights[0] > 0) | (weights[1] > 0)
        shown = shown._replace(logit_weight=weights[0], statistic_weight=weights[1])
        if recipe.drop:
            drop_key = rng.stream(key, "recover/drop", unit.slot, unit.block, step, t)
            shown = shown._replace(drop_key=drop_key)
        read, memory, gradient_t = lax.cond(
            supervises | report_all,
            teacher_gradient(recipe, teacher, normalisation),
            lambda _, x, shown, memory: (not_read(recipe, x.dtype), memory, jnp.zeros_like(x)),
            variables[t], viewed_BHWC, shown, state.memory.statistics_T[t],
        )  # fmt: skip
        # Zero times a gradient is zero only where it is finite.
        gradient_BHWC += jnp.where(supervises, gradient_t, 0.0)
        reads.append(read)
        memories.append(select(weights[1] > 0, memory, state.memory.statistics_T[t]))

    prior_values, prior_gradient_BHWC = prior_terms(recipe, viewed_BHWC)
    if prior_gradient_BHWC is not None:
        gradient_BHWC += prior_gradient_BHWC
    if guide is not None:
        value, guide_gradient_BHWC = guide_gradient(
            recipe, guide, normalisation, viewed_BHWC, shown.labels_B
        )
        gradient_BHWC += guide_gradient_BHWC
        prior_values = {**prior_values, GUIDED: value}
    (image_gradient_BHWC,) = pull_back(gradient_BHWC)
    if unit.probes_BHWC is not None:
        image_gradient_BHWC += jnp.where(step == 0, unit.probes_BHWC, 0.0)
    rate = recipe.learning_rate * schedules.SCHEDULES[recipe.schedule](step, unit.budget)
    direction, opt_state = image_optimiser(recipe).update(image_gradient_BHWC, state.opt_state)
    images_BHWC = pixels.clip(state.images_BHWC - rate * direction, normalisation)
    average_BHWC = state.memory.images_BHWC
    if recipe.flatness:
        assert average_BHWC is not None
        old, new = FLATNESS_MOMENTUM * average_BHWC, (1 - FLATNESS_MOMENTUM) * state.images_BHWC
        average_BHWC = old + new
    terms = total(recipe, step, jax.tree.map(lambda *x: jnp.stack(x), *reads), prior_values, draw)
    memory = Memory(tuple(memories), average_BHWC)
    return SynthState(images_BHWC, opt_state, step + 1, memory), terms


# --- what an iteration draws ----------------------------------------------------------------


def view_of(
    recipe: Recipe, key: Array, unit: UnitBatch, step: Integer, image_size: tuple[int, ...]
) -> View:
    """The view of one iteration. Reference: one crop, flip and roll for the whole batch."""
    smallest = schedules.smallest_crop(
        recipe.crop_curriculum, recipe.crop_min, step, unit.budget, milestone=recipe.crop_milestone
    )
    view = views.sample_view(
        rng.stream(key, "recover/view", unit.slot, unit.block, step),
        image_size,
        crop_scale=(smallest, 1.0),
        crop_pad=recipe.crop_pad,
        flip=recipe.flip,
        roll=2 * recipe.roll if recipe.roll_centred else recipe.roll,
    )
    return view._replace(roll=view.roll - recipe.roll) if recipe.roll_centred else view


def noise_of(
    recipe: Recipe,
    normalisation: Normalisation,
    key: Array,
    unit: UnitBatch,
    step: Integer,
    like_BHWC: Array,
) -> Array:
    """What is added to the view of one iteration, for the deviation of pixels in [0, 1]."""
    noise_key = rng.stream(key, "recover/view_noise", unit.slot, unit.block, step)
    std_C = jnp.asarray(normalisation.std, like_BHWC.dtype)
    noise_BHWC = jax.random.normal(noise_key, like_BHWC.shape, like_BHWC.dtype)
    return recipe.view_noise / std_C * noise_BHWC


def draw_teachers(
    recipe: Recipe, teachers: tuple[Teacher, ...], key: Array, unit: UnitBatch, step: Integer
) -> Draw:
    """Who supervises this iteration; ``granularity`` says which coordinates the draw has.

    A teacher without the statistics that are matched supervises none. With ``count_no_bn`` it
    still counts in the mean (the released code's AlexNet), otherwise the mean is over the others.
    """
    coordinates = {
        "per_slot": (unit.slot,),
        "per_batch": (unit.slot, unit.block),
        "per_iteration": (unit.slot, unit.block, step),
    }[recipe.granularity]
    draw_key = rng.stream(key, f"recover/draw/{recipe.granularity}", *coordinates)
    place = sampling.Place(unit.slot, unit.before + step)
    roles = sampling.Roles(
        len(teachers), recipe.primary, recipe.subset_others, recipe.subset_probability,
        recipe.committee, recipe.priors, recipe.prior_temperature,
    )  # fmt: skip
    method = METHODS[recipe.method]
    weights_T = sampling.SAMPLERS[recipe.logits_by or method.logits](draw_key, place, roles)
    if recipe.alpha_ce != 1.0:
        weights_T = recipe.alpha_ce * weights_T
    if not (recipe.alpha_ce or recipe.alpha_bn):
        return Draw(weights_T, jnp.zeros_like(weights_T))  # nobody is read
    if recipe.statistic_primary is not None:
        roles = dataclasses.replace(roles, primary=recipe.statistic_primary)
    sampler = sampling.SAMPLERS[recipe.statistics_by or method.statistics]
    draw = Draw(weights_T, sampler(draw_key, place, roles))
    if all(has_statistics(recipe, teacher) for teacher in teachers):
        return draw
    has_T = jnp.asarray([has_statistics(recipe, teacher) for teacher in teachers], jnp.float32)
    weights_T = draw.statistic_weights_T * has_T
    if not recipe.count_no_bn:
        weights_T = weights_T / jnp.maximum(weights_T.sum(), jnp.finfo(jnp.float32).tiny)
    return Draw(draw.logit_weights_T, weights_T)


# --- the state and the loop -----------------------------------------------------------------


def image_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """From the gradient by the images to the direction of their step."""
    return PARAMETRISATIONS[recipe.parametrisation](recipe)


def initial_state(pool: TeacherPool, recipe: Recipe, images_BHWC: AnyArray) -> SynthState:
    """The state before the first iteration, for float32 images in the normalised space."""
    images_BHWC = jnp.asarray(images_BHWC)
    remembered: list[statistics.Memory | None] = [None] * len(pool)
    if recipe.ema and recipe.alpha_bn:  # else nothing is matched, nor were targets measured
        remembered = [
            statistics.Memory.blank(
                statistic_targets(recipe, teacher, variables), from_zero=recipe.ema_from_zero
            )
            for teacher, variables in zip(pool.teachers, pool.variables, strict=True)
        ]
    memory = Memory(tuple(remembered), images_BHWC if recipe.flatness else None)
    opt_state = image_optimiser(recipe).init(images_BHWC)
    return SynthState(images_BHWC, opt_state, jnp.zeros((), jnp.int32), memory)


def synthesis_chunk(
    recipe: Recipe,
    teachers: tuple[Teacher, ...],
    normalisation: Normalisation,
    variables: tuple[PyTree, ...],
    seed: Array,
    unit: UnitBatch,
    state: SynthState,
    count: Array,
    guide: Guide | None = None,
) -> tuple[SynthState, ChunkReport]:
    """``count`` iterations in one dispatch; ``count`` is an argument, not a constant.

    A short last chunk, a resume in the middle and a single iteration are the same executable,
    and so the same bits: a step compiled outside the loop differs in the last one.
    """

    def body(i, carry):
        state, report = carry
        state, terms = synthesis_step(
            recipe, teachers, normalisation, variables, seed, unit, state, guide
        )
        first = select(i == 0, terms, report.first)
        failing = (report.failed.step < 0) & ~jnp.isfinite(terms.loss)
        return state, ChunkReport(first, terms, select(failing, terms, report.failed))

    if unit.weights is not None:
        perturbed = {**variables[recipe.primary], "params": unit.weights}
        variables = (*variables[: recipe.primary], perturbed, *variables[recipe.primary + 1 :])
    if recipe.targets == "groups":
        pairs = zip(teachers, variables, strict=True)
        variables = tuple(of_group(t, v, unit.slot) for t, v in pairs)
    variables = tuple(  # once, not every step
        layers.freeze(v, layers.computes_in(t.module))
        for t, v in zip(teachers, variables, strict=True)
    )
    blank = no_terms(recipe, len(teachers), state.images_BHWC.dtype)
    return lax.fori_loop(0, count, body, (state, ChunkReport(blank, blank, blank)))


def select(condition: Array, this: PyTree, that: PyTree) -> PyTree:
    """One of two trees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), this, that)
