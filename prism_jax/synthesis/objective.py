"""What is minimised: one teacher's energy, the statistics it matches, and the terms beside it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prism_jax.core import losses, priors, statistics
from prism_jax.errors import UserError
from prism_jax.synthesis.recipe import Recipe, Shown, Terms
from prism_jax.teachers import Teacher
from prism_jax.types import AnyArray, Array, Draw, Integer, Normalisation, PyTree, Reading

GUIDED = "clip"  # the term of ``guide.energy``, and the recipe's weight of it
# Collections of a teacher's variables: BatchNorms' targets of all groups (G, ...), and of one.
GROUPS, GROUP = "group_statistics", "target_statistics"


def teacher_gradient(recipe: Recipe, teacher: Teacher, normalisation: Normalisation) -> Callable:
    """The energy of one teacher, as ``f(variables, viewed, shown, memory)``.

    Returns:
      A function to ``(read, memory, gradient_BHWC)``: the unweighted terms by name, the memory
      of statistics, and the gradient by the viewed images of
      ``logit_weight * (ce + flatness) + alpha_bn * statistic_weight * bn``.
    """
    align = recipe.alpha_bn > 0 and has_statistics(recipe, teacher)
    bn, conv = "bn" in recipe.match, bool(statistics.of_convolutions(recipe.match))

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
        with jax.named_scope(f"teacher/{teacher.name}"):  # what it costs is found by this name
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
        inputs, recipe.match, patch=recipe.statistic_patch
    )
    keep = None
    if recipe.drop:
        assert shown.drop_key is not None
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


# --- statistics and their targets -----------------------------------------------------------


def has_statistics(recipe: Recipe, teacher: Teacher) -> bool:
    """Whether a teacher has any of the statistics that are matched."""
    return first_layer(recipe, teacher) is not None


def first_layer(recipe: Recipe, teacher: Teacher) -> statistics.Path | None:
    """The layer with the multiplier: the first of the wanted kind, else the first of the other."""
    firsts = {"bn": teacher.first_bn if "bn" in recipe.match else None, "conv": None}
    if statistics.of_convolutions(recipe.match):
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
    """What a teacher's statistics should be: running ones, and those of the training set.

    Where variables have those of one group of real images, these stand for the running ones.
    """
    bn = variables.get(GROUP, variables["batch_stats"])
    return _targets(recipe, teacher, bn, variables.get("conv_statistics"))


def of_group(teacher: Teacher, variables: PyTree, number: Integer) -> PyTree:
    """A teacher's variables with the targets of one of the groups it was measured for (PSM).

    Raises:
      UserError: it was measured for none.
    """
    if not teacher.has_batch_norm:
        return variables
    if GROUPS not in variables:
        raise UserError(
            f"recover.targets is 'groups', and teacher {teacher.name} has no statistics of groups "
            f"of the real images; collect them first (stage squeeze, or synthesis.measuring)"
        )
    group = jax.tree.map(lambda table_GC: table_GC[number], variables[GROUPS])
    return {**{name: x for name, x in variables.items() if name != GROUPS}, GROUP: group}


def class_targets(
    recipe: Recipe, teacher: Teacher, variables: PyTree, labels_B: AnyArray
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
    kinds = statistics.of_convolutions(recipe.match)
    wanted = {name for kind in kinds for name in statistics.OF_CONVOLUTIONS[kind].names}
    if not wanted or teacher.first_conv is None:
        return found
    if conv is None:
        raise UserError(
            f"recover.match names statistics of convolutions, and teacher {teacher.name} has "
            f"none of the real images; collect them first (stage squeeze, or synthesis.measuring)"
        )
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
    recipe: Recipe, step: Integer, read: dict[str, Array], prior: dict[str, Array], draw: Draw
) -> Terms:
    """The weighted loss beside its unweighted terms; a teacher of weight zero adds nothing.

    Args:
      read: the teachers' terms, (T,) each; prior: those of the images, () each, by the names of
        their weights.
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
    prior = {name: nothing for name in (*priors.PRIORS, GUIDED) if getattr(recipe, name)}
    terms = total(recipe, jnp.full((), -1, jnp.int32), read, prior, Draw(none_T, none_T))
    return terms._replace(loss=nothing)
