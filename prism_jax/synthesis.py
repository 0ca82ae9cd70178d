"""The engine: images optimised against a pool of teachers.

    x~   = view(x; crop, flip, roll)                                   one view per batch
    L(x) = sum_t a_t CE(z_t(x~), y)
           + alpha_BN * sum_t b_t sum_l w_l sum_s ||s_l,t(x~) - s^_l,t||
           + terms of the images alone

A method is who supervises (the weights a and b of every iteration), which statistics s are
matched, and numbers. PRISM: a is the primary's, b the mean over the drawn teachers, s the mean
and variance of BatchNorms' inputs.

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
from prism_jax.core import losses, pixels, priors, schedules, statistics, views
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.teachers import Teacher, TeacherPool
from prism_jax.types import Array, Draw, Normalisation, PyTree, Reading, SynthState, View


class Supervision(NamedTuple):
    """Rows of ``sampling.SAMPLERS``: whose logits, and whose statistics."""

    logits: str
    statistics: str


# A method is who supervises; everything else is a number in the recipe.
METHODS: dict[str, Supervision] = {
    "prism": Supervision("fixed", "subset"),
    "sre2l": Supervision("fixed", "fixed"),
    "cda": Supervision("fixed", "fixed"),
    "dwa": Supervision("fixed", "fixed"),
    "delt": Supervision("fixed", "fixed"),
    "rded": Supervision("fixed", "fixed"),
    "gvbsm": Supervision("round_robin", "round_robin"),
    "edc": Supervision("round_robin", "round_robin"),
    "fadrm": Supervision("round_robin", "round_robin"),
    "cvdd": Supervision("committee", "committee"),
}

# Kinds of statistics: BatchNorms' inputs; convolutions' inputs by channel and by patch.
KINDS = ("bn", "conv", "patch")
FLATNESS_MOMENTUM = 0.99  # of the average images that flatness looks at (EDC)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The numbers of the objective and the optimiser; static in the trace.

    Defaults are PRISM's (supplement, table 1b). The fields are those of the config's section
    ``recover``, with teachers as indices into the pool; ``slots`` are the images of a class in
    a batch, and ``rounds`` is 1 unless slots join early and late.
    """

    method: str = "prism"
    logits_by: str | None = None
    statistics_by: str | None = None
    primary: int = 0
    statistic_primary: int | None = None
    granularity: str = "per_slot"
    subset_others: int = 3
    subset_probability: float = 0.5
    committee: str = "random"
    priors: tuple[float, ...] | None = None
    prior_temperature: float = 5.0

    alpha_bn: float = 0.01
    first_bn_multiplier: float = 10.0
    first_layer: str = "bn"
    count_no_bn: bool = False
    match: tuple[str, ...] = ("bn",)
    variance_weight: float = 1.0
    statistic_patch: int = 16
    class_share: float = 0.0
    class_patch_swapped: bool = False
    ema: float = 0.0
    ema_from_zero: bool = False
    drop: float = 0.0
    alignment_scale: str = "none"

    total_variation: float = 0.0
    image_l2: float = 0.0
    densification: float = 0.0
    flatness: float = 0.0

    learning_rate: float = 0.05
    schedule: str = "cosine"
    betas: tuple[float, float] = (0.5, 0.9)
    crop_min: float = 0.08
    crop_curriculum: str = "constant"
    crop_milestone: float = 1.0
    crop_pad: int | None = None
    flip: bool = True
    roll: int = 32
    roll_centred: bool = False

    perturb_rho: float = 0.0
    perturb_steps: int = 0
    perturb_probes: bool = False
    slots: int = 1
    rounds: int = 1
    phase_sizes: tuple[int, ...] = ()
    inject: float = 0.0


class UnitBatch(NamedTuple):
    """What makes one image batch itself: its coordinates, its budget and its labels.

    Attributes:
      before: iterations of all batches before it in the set's order, whenever they run.
      weights: the primary's parameters where they are perturbed for this batch (DWA).
      probes_BHWC: what the perturbation left in the images' first gradient, where that counts.
    """

    slot: Array  # () int32, first slot of the group
    block: Array  # () int32
    budget: Array  # () int32, iterations in all
    labels_B: Array  # int32
    before: Array = np.int32(0)
    weights: PyTree = None
    probes_BHWC: Array | None = None


class Memory(NamedTuple):
    """What is remembered of earlier iterations; None where the recipe has no use for it."""

    statistics_T: tuple[statistics.Memory | None, ...] = ()
    images_BHWC: Array | None = None  # their moving average


class Terms(NamedTuple):
    """One iteration's loss, unweighted, per teacher; NaN for a teacher that was not read.

    ``others`` are terms that only some recipes have: of every teacher (T,), or of the images ().
    """

    step: Array  # () int32; -1: no such iteration
    loss: Array  # () weighted total
    ce_T: Array
    bn_T: Array
    draw: Draw
    others: dict[str, Array]


class ChunkReport(NamedTuple):
    """The first and last iterations of a chunk, and the first with a loss that is not finite."""

    first: Terms
    last: Terms
    failed: Terms


# --- the heart ------------------------------------------------------------------------------


class Shown(NamedTuple):
    """What a teacher is given in one iteration beside the viewed images."""

    labels_B: Array
    logit_weight: Array
    statistic_weight: Array
    average_BHWC: Array | None = None  # viewed alike
    drop_key: Array | None = None


def teacher_gradient(recipe: Recipe, teacher: Teacher, normalisation: Normalisation) -> Callable:
    """The energy of one teacher, as ``f(variables, viewed, shown, memory)``.

    Returns:
      A function to ``(read, memory, gradient_BHWC)``: the unweighted terms by name, the memory
      of statistics, and the gradient by the viewed images of
      ``logit_weight * (ce + flatness) + alpha_bn * statistic_weight * bn``.
    """
    align = recipe.alpha_bn > 0 and has_statistics(recipe, teacher)
    bn, conv = "bn" in recipe.match, not {"conv", "patch"}.isdisjoint(recipe.match)

    def energy(viewed_BHWC, variables, shown, memory):
        reading = teacher.read(
            variables, viewed_BHWC, normalisation, statistics=align and bn,
            conv_inputs=align and conv,
        )  # fmt: skip
        ce = losses.cross_entropy(reading.logits_BK, shown.labels_B)
        read = {"ce": ce, "bn": jnp.zeros_like(ce)}
        if align:
            read["bn"], memory = misalignment(recipe, teacher, variables, reading, shown, memory)
        loss = shown.logit_weight * ce + recipe.alpha_bn * shown.statistic_weight * read["bn"]
        if recipe.flatness:
            average = teacher.read(variables, shown.average_BHWC, normalisation, statistics=False)
            read["flatness"] = priors.flatness(reading.logits_BK, average.logits_BK)
            loss += shown.logit_weight * recipe.flatness * read["flatness"]
        return loss, (read, memory)

    def gradient(variables, viewed_BHWC, shown, memory):
        (_, (read, memory)), gradient_BHWC = jax.value_and_grad(energy, has_aux=True)(
            viewed_BHWC, variables, shown, memory
        )
        return read, memory, gradient_BHWC

    return gradient


def misalignment(
    recipe: Recipe,
    teacher: Teacher,
    variables: PyTree,
    reading: Reading,
    shown: Shown,
    memory: statistics.Memory | None,
) -> tuple[Array, statistics.Memory | None]:
    """How far the statistics of a batch are from their targets, and what is remembered of them."""
    target = statistic_targets(recipe, teacher, variables)
    inputs = {path: layer["x"] for path, layer in statistics.by_layer(reading.conv_inputs).items()}
    batch = statistics.by_layer(reading.statistics) | statistics.of_inputs(
        inputs,
        channels="conv" in recipe.match,
        patch=recipe.statistic_patch * ("patch" in recipe.match),
    )
    keep = None
    if recipe.drop:
        keep = statistics.sample_keep(shown.drop_key, inputs, drop=recipe.drop)
    if memory is not None:
        batch, memory = statistics.smooth(batch, memory, momentum=recipe.ema, keep=keep)
    weights = alignment_weights(recipe, teacher)
    far = statistics.alignment(batch, target, keep=keep, **weights)
    if recipe.class_share:
        classes = class_targets(recipe, teacher, variables, shown.labels_B)
        far_from_classes = statistics.alignment(batch, classes, keep=keep, **weights)
        far = (1.0 - recipe.class_share) * far + recipe.class_share * far_from_classes
    return far, memory


def view_of(
    recipe: Recipe, key: Array, unit: UnitBatch, step: Array, image_size: tuple[int, int]
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
    view = view_of(recipe, key, unit, step, state.images_BHWC.shape[1:3])
    draw = draw_teachers(recipe, teachers, key, unit, step)
    if recipe.alignment_scale != "none":
        scale_T = alignment_scales(recipe, teachers, variables)
        draw = draw._replace(statistic_weights_T=draw.statistic_weights_T * scale_T)
    viewed_BHWC, pull_back = jax.vjp(lambda x: views.apply_view(x, view), state.images_BHWC)
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
    if prior_values:
        gradient_BHWC += prior_gradient_BHWC
    (image_gradient_BHWC,) = pull_back(gradient_BHWC)
    if unit.probes_BHWC is not None:
        image_gradient_BHWC += jnp.where(step == 0, unit.probes_BHWC, 0.0)
    rate = recipe.learning_rate * schedules.SCHEDULES[recipe.schedule](step, unit.budget)
    direction, opt_state = image_optimiser(recipe).update(image_gradient_BHWC, state.opt_state)
    images_BHWC = pixels.clip(state.images_BHWC - rate * direction, normalisation)
    average_BHWC = state.memory.images_BHWC
    if recipe.flatness:
        old, new = FLATNESS_MOMENTUM * average_BHWC, (1 - FLATNESS_MOMENTUM) * state.images_BHWC
        average_BHWC = old + new
    terms = total(recipe, step, jax.tree.map(lambda *x: jnp.stack(x), *reads), prior_values, draw)
    memory = Memory(tuple(memories), average_BHWC)
    return SynthState(images_BHWC, opt_state, step + 1, memory), terms


# --- who supervises -------------------------------------------------------------------------


def draw_teachers(
    recipe: Recipe, teachers: tuple[Teacher, ...], key: Array, unit: UnitBatch, step: Array
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


# --- statistics and their targets -----------------------------------------------------------


def has_statistics(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether a teacher has any of the statistics that are matched."""
    return first_layer(recipe, teacher) is not None


def first_layer(recipe: Recipe, teacher: Teacher) -> statistics.Path | None:
    """The layer with the multiplier: the first of the wanted kind, else the first of the other."""
    firsts = {"bn": teacher.first_bn if "bn" in recipe.match else None, "conv": None}
    if not {"conv", "patch"}.isdisjoint(recipe.match):
        firsts["conv"] = teacher.first_conv
    return firsts[recipe.first_layer] or firsts["bn"] or firsts["conv"]


def alignment_weights(recipe: Recipe, teacher: Teacher) -> dict:
    """The keyword arguments of ``statistics.alignment`` that weigh its terms."""
    return {
        "first": first_layer(recipe, teacher),
        "first_multiplier": recipe.first_bn_multiplier,
        "variance_weight": recipe.variance_weight,
    }


def statistic_targets(recipe: Recipe, teacher: Teacher, variables: PyTree) -> statistics.Layers:
    """What a teacher's statistics should be: running ones, and those of the training set."""
    return _targets(recipe, teacher, variables["batch_stats"], variables.get("conv_statistics"))


def class_targets(
    recipe: Recipe, teacher: Teacher, variables: PyTree, labels_B: Array
) -> statistics.Layers:
    """What they should be according to the batch's classes alone (EDC)."""
    per_class = variables.get("class_statistics", {})
    found = _targets(recipe, teacher, per_class.get("bn", {}), per_class.get("conv"))
    if recipe.class_patch_swapped:
        # Reference: the two are exchanged where they are stored, and read as stored.
        swap = {"patch_mean": "patch_var", "patch_var": "patch_mean"}
        found = {p: {swap.get(n, n): x for n, x in layer.items()} for p, layer in found.items()}
    return statistics.of_classes(found, labels_B)


def _targets(recipe: Recipe, teacher: Teacher, bn: PyTree, conv: PyTree | None):
    found = statistics.by_layer(bn) if "bn" in recipe.match else {}
    names = [("mean", "var")] * ("conv" in recipe.match)
    names += [("patch_mean", "patch_var")] * ("patch" in recipe.match)
    if not names or teacher.first_conv is None:
        return found
    if conv is None:
        raise UserError(
            f"recover.match names statistics of convolutions, and teacher {teacher.name} has "
            f"none of the real images; collect them first (stage squeeze, or measure())"
        )
    wanted = {name for pair in names for name in pair}
    layers = statistics.by_layer(conv).items()
    return found | {path: {n: x[n] for n in x if n in wanted} for path, x in layers}


def alignment_scales(
    recipe: Recipe, teachers: tuple[Teacher, ...], variables: tuple[PyTree, ...]
) -> Array:
    """The factors (T,) that bring every teacher's alignment to the primary's scale."""
    size = statistics.SCALES[recipe.alignment_scale]
    sizes = [
        size(statistic_targets(recipe, t, v), **alignment_weights(recipe, t))
        if has_statistics(recipe, t)
        else jnp.ones((), jnp.float32)
        for t, v in zip(teachers, variables, strict=True)
    ]
    return jnp.stack([sizes[recipe.primary] / size for size in sizes])


# --- terms ----------------------------------------------------------------------------------


def prior_terms(recipe: Recipe, viewed_BHWC: Array) -> tuple[dict[str, Array], Array | None]:
    """The unweighted terms of the images alone, and the gradient of their weighted sum."""
    weights = {name: getattr(recipe, name) for name in priors.PRIORS if getattr(recipe, name)}
    if not weights:
        return {}, None

    def energy(x_BHWC):
        values = {name: priors.PRIORS[name](x_BHWC, recipe.slots) for name in weights}
        return sum(weights[name] * values[name] for name in weights), values

    (_, values), gradient_BHWC = jax.value_and_grad(energy, has_aux=True)(viewed_BHWC)
    return values, gradient_BHWC


def not_read(recipe: Recipe, dtype: jnp.dtype) -> dict[str, Array]:
    """The terms of a teacher that is not run."""
    names = ("ce", "bn", "flatness") if recipe.flatness else ("ce", "bn")
    return {name: jnp.full((), jnp.nan, dtype) for name in names}


def total(
    recipe: Recipe, step: Array, read: dict[str, Array], prior: dict[str, Array], draw: Draw
) -> Terms:
    """The weighted loss beside its unweighted terms; a teacher of weight zero adds nothing.

    Args:
      read: the teachers' terms, (T,) each; prior: those of the images, () each.
    """

    def weighted(weights_T, terms_T):
        return jnp.where(weights_T > 0, weights_T * terms_T, 0.0).sum()

    ce, bn = (weighted(w, read[name]) for w, name in zip(draw, ("ce", "bn"), strict=True))
    loss = ce + recipe.alpha_bn * bn
    others = {name: x for name, x in read.items() if name not in ("ce", "bn")}
    for x in others.values():
        loss += recipe.flatness * weighted(draw.logit_weights_T, x)
    for name, x in prior.items():
        loss += getattr(recipe, name) * x
    return Terms(step, loss, read["ce"], read["bn"], draw, {**others, **prior})


def no_terms(recipe: Recipe, pool_size: int, dtype: jnp.dtype) -> Terms:
    """The terms of no iteration at all."""
    nothing = jnp.full((), jnp.nan, dtype)
    none_T = jnp.zeros((pool_size,), jnp.float32)
    read = {name: jnp.full((pool_size,), jnp.nan, dtype) for name in not_read(recipe, dtype)}
    prior = {name: nothing for name in priors.PRIORS if getattr(recipe, name)}
    terms = total(recipe, jnp.full((), -1, jnp.int32), read, prior, Draw(none_T, none_T))
    return terms._replace(loss=nothing)


def image_optimiser(recipe: Recipe) -> optax.GradientTransformation:
    """Adam without its learning rate, which has a schedule over each unit's own budget."""
    return optax.scale_by_adam(b1=recipe.betas[0], b2=recipe.betas[1], eps=1e-8)


def initial_state(pool: TeacherPool, recipe: Recipe, images_BHWC: Array) -> SynthState:
    """The state before the first iteration, for float32 images in the normalised space."""
    images_BHWC = jnp.asarray(images_BHWC)
    remembered = [None] * len(pool)
    if recipe.ema:
        remembered = [
            statistics.Memory.blank(
                statistic_targets(recipe, teacher, variables), from_zero=recipe.ema_from_zero
            )
            for teacher, variables in zip(pool.teachers, pool.variables, strict=True)
        ]
    memory = Memory(tuple(remembered), images_BHWC if recipe.flatness else None)
    opt_state = image_optimiser(recipe).init(images_BHWC)
    return SynthState(images_BHWC, opt_state, jnp.zeros((), jnp.int32), memory)


# --------------------------------------------------------------------------------------------


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

    if unit.weights is not None:
        perturbed = {**variables[recipe.primary], "params": unit.weights}
        variables = (*variables[: recipe.primary], perturbed, *variables[recipe.primary + 1 :])
    variables = tuple(layers.freeze(v) for v in variables)  # once, not every step
    blank = no_terms(recipe, len(teachers), state.images_BHWC.dtype)
    return lax.fori_loop(0, count, body, (state, ChunkReport(blank, blank, blank)))


def select(condition: Array, this: PyTree, that: PyTree) -> PyTree:
    """One of two trees of equal structure."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), this, that)


def engine(
    pool: TeacherPool,
    recipe: Recipe,
    *,
    devices: list[jax.Device] | None = None,
    how: str = "shard_map",
    span: int = 1,
) -> parallel.LaneMap | parallel.SpanMap:
    """The chunk, compiled for one image batch per device, or per ``span`` devices.

    Args:
      pool: the teachers; their weights are replicated and passed as arguments.
      recipe: the numbers; ``recipe.primary`` is an index into the pool.
      devices: one lane each; by default the first local device alone.
      how: "shard_map" or "pmap"; where a batch has one device.
      span: devices that share a batch; statistics and gradients are those of the whole batch, up
        to the order in which sums are added.

    Returns:
      A map of lanes ``(unit, state, count)`` to ``(state, ChunkReport)``;
      ``state`` is donated.
    """
    if recipe.alpha_bn > 0 and not any(has_statistics(recipe, t) for t in pool.teachers):
        raise UserError(
            f"no teacher of the pool ({', '.join(pool.names)}) has BatchNorm, so there are no "
            f"statistics to align; add one that has, or set alpha_bn=0"
        )

    def chunk(variables, seed, unit, state, count):
        return synthesis_chunk(
            recipe, pool.teachers, pool.normalisation, variables, seed, unit, state, count
        )

    devices = devices or jax.local_devices()[:span]
    if span > 1:
        return parallel.SpanMap(chunk, pool.variables, devices=devices, span=span, donate=(1,))
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
