"""The course of one batch, from its initial images to its pixels.

Most methods have one phase: all images, at one size. DELT's early-late lets images join in
rounds; FADRM changes the size and mixes the initial images in again; DWA perturbs the teacher
before it all begins. Each changes the state from outside the compiled loop, as a function of the
initial images and of nothing else that is not in the state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import rng
from prism_jax.core import given, losses, pixels, priors, schedules, statistics, views
from prism_jax.core.perturbation import ascend
from prism_jax.errors import UserError
from prism_jax.synthesis.guide import Guide
from prism_jax.synthesis.lanes import engine, explain_failure
from prism_jax.synthesis.recipe import GRANULARITIES, METHODS, ChunkReport, Recipe, UnitBatch
from prism_jax.synthesis.sampling import COMMITTEES, SAMPLERS
from prism_jax.synthesis.step import image_optimiser, initial_state, view_of
from prism_jax.teachers import Teacher, TeacherPool
from prism_jax.types import AnyArray, Array, Normalisation, SynthState

_WORDS: dict[str, Iterable[str]] = {
    "method": METHODS,
    "logits_by": SAMPLERS,
    "statistics_by": SAMPLERS,
    "granularity": GRANULARITIES,
    "committee": COMMITTEES,
}
_WEIGHTS = ("alpha_ce", "alpha_bn", *priors.PRIORS, "flatness", "clip")


class Phase(NamedTuple):
    """A part of a batch's iterations in which its images have one shape.

    Attributes:
      stop: iterations done when it ends.
      size: side of the images in pixels.
      images: how many are optimised, from the first.
    """

    stop: int
    size: int
    images: int


def phases_of(recipe: Recipe, budget: int, start_BHWC: AnyArray) -> tuple[Phase, ...]:
    """The phases of a batch: equal parts of its budget.

    Args:
      start_BHWC: its initial images, slot by slot where ``recipe.rounds`` is above 1.
    """
    batch, size = start_BHWC.shape[:2]
    count = max(1, recipe.rounds, len(recipe.phase_sizes))
    sizes = recipe.phase_sizes or (size,) * count
    slots = schedules.joined(recipe.slots, recipe.rounds) if recipe.rounds > 1 else ()
    images = [n * batch // recipe.slots for n in slots] or [batch] * count
    return tuple(Phase(budget * (i + 1) // count, sizes[i], images[i]) for i in range(count))


def phase_after(phases: Sequence[Phase], done: int) -> int:
    """Which phase's shape the images have after so many iterations; at a boundary the old one's."""
    return next(i for i, phase in enumerate(phases) if done <= phase.stop)


def begin(pool: TeacherPool, recipe: Recipe, phase: Phase, start_BHWC: AnyArray) -> SynthState:
    """The state before the first iteration of the first phase."""
    images_BHWC = jnp.asarray(start_BHWC)[: phase.images]
    return initial_state(pool, recipe, views.resize(images_BHWC, (phase.size, phase.size)))


def enter(recipe: Recipe, phase: Phase, state: SynthState, start_BHWC: AnyArray) -> SynthState:
    """The state before the first iteration of a later phase.

    Images that join bring moments of zero to the one optimiser, whose count goes on (DELT).
    A phase with a size of its own begins with a new optimiser and
    ``(1 - inject) x + inject start``, both resized (FADRM).

    Args:
      start_BHWC: the initial images, or what is injected in their place (RETA).
    """
    start_BHWC = jnp.asarray(start_BHWC)[: phase.images]
    if recipe.phase_sizes:
        size = (phase.size, phase.size)
        images_BHWC = (1.0 - recipe.inject) * views.resize(state.images_BHWC, size)
        images_BHWC += recipe.inject * views.resize(start_BHWC, size)
        opt_state = image_optimiser(recipe).init(images_BHWC)
        return state._replace(images_BHWC=images_BHWC, opt_state=opt_state)

    joining_BHWC = start_BHWC[len(state.images_BHWC) :]

    def grow(moment: Array) -> Array:
        if not jnp.ndim(moment):
            return moment
        nothing = jnp.zeros((len(joining_BHWC), *moment.shape[1:]), moment.dtype)
        return jnp.concatenate([moment, nothing])

    images_BHWC = jnp.concatenate([state.images_BHWC, joining_BHWC])
    return state._replace(images_BHWC=images_BHWC, opt_state=jax.tree.map(grow, state.opt_state))


# --- perturbed teachers ---------------------------------------------------------------------


def prepare(
    pool: TeacherPool, recipe: Recipe, batches: Sequence[tuple[UnitBatch, AnyArray]], seed: int
) -> UnitBatch:
    """The last of some batches, with the weights of its primary perturbed where the recipe asks.

    Args:
      batches: units and their initial images; the weights are perturbed for one after the other
        (the released code never undoes a perturbation), usually for one alone.
    """
    unit = batches[-1][0]
    if not (recipe.perturb_rho and recipe.perturb_steps):
        return unit
    step = ascent_of(recipe, pool.teachers[recipe.primary], pool.normalisation)
    variables = pool.variables[recipe.primary]
    weights = variables["params"]
    for batch, start_BHWC in batches:
        probes_BHWC = jnp.zeros_like(start_BHWC)
        for _ in range(recipe.perturb_steps):
            weights, by_images_BHWC = step(weights, variables, np.uint32(seed), batch, start_BHWC)
            probes_BHWC += by_images_BHWC
    return unit._replace(
        weights=weights, probes_BHWC=probes_BHWC if recipe.perturb_probes else None
    )


@functools.cache
def ascent_of(recipe: Recipe, teacher: Teacher, normalisation: Normalisation) -> jax.stages.Wrapped:
    """One step uphill in the cross entropy of a batch's first view, compiled."""

    def step(weights, variables, seed, unit, start_BHWC):
        first = jnp.zeros((), jnp.int32)
        view = view_of(recipe, rng.root(seed), unit, first, start_BHWC.shape[1:3])

        def loss(weights, images_BHWC):
            reading = teacher.read(
                {**variables, "params": weights}, views.apply_view(images_BHWC, view),
                normalisation, statistics=False,
            )  # fmt: skip
            return losses.cross_entropy(reading.logits_BK, unit.labels_B)

        return ascend(loss, weights, start_BHWC, length=recipe.perturb_rho / recipe.perturb_steps)

    return jax.jit(step)


# --- the public function ---------------------------------------------------------------------


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
    guide: Guide | None = None,
    **recipe: Any,
) -> np.ndarray:
    """Optimise one batch of images against a pool, from the images given.

    Args:
      pool: the teachers.
      images_uint8_BHWC: where to start: real images, or anything of their shape.
      labels_B: their classes. With several images of a class, ``slots`` says how many, and they
        come class by class (slot by slot where ``rounds`` is above 1).
      iterations: the budget; the learning rate decays to zero over it.
      primary: whose logits supervise; by default the pool's first teacher.
      seed, slot: the random draws' coordinates: another slot, other views and teachers.
      steps_per_dispatch: iterations between two calls of ``on_chunk``; changes no bit.
      rounding: "nearest", or "truncate" as the released code.
      on_chunk: called with each chunk's report.
      guide: an encoder of images and texts, whose weight is the field ``clip``.
      **recipe: any field of ``Recipe``.

    Returns:
      uint8 images of the same shape.

    Raises:
      UserError: images that are not uint8 NHWC, labels that are not a class for each, a field,
        word or number that nothing has, a pool without statistics to align, or a loss that is not
        finite.
    """
    images = given.images("synthesise", images_uint8_BHWC)
    known = given.num_classes(pool.teachers[0].module, images.shape[1:])
    labels = given.labels("synthesise", labels_B, len(images), known)
    given.fields_of("synthesise", recipe, Recipe)
    for name, allowed in _WORDS.items():
        if recipe.get(name) is not None:
            given.one_of(name, recipe[name], allowed)
    numbers = Recipe(primary=pool.index(primary) if primary else 0, **recipe)
    _check(numbers, pool, iterations, images)
    run = engine(pool, numbers, guide=guide)
    start = pixels.normalise(jnp.asarray(images), pool.normalisation)
    unit = UnitBatch(np.int32(slot), np.int32(0), np.int32(iterations), labels)
    lane_unit = run.place(prepare(pool, numbers, [(unit, start)], seed), 0)
    phases, done = phases_of(numbers, iterations, start), 0
    state = begin(pool, numbers, phases[0], start)
    for i, phase in enumerate(phases):
        state = run.place(enter(numbers, phase, state, start) if i else state, 0)
        while done < phase.stop:
            count = min(steps_per_dispatch, phase.stop - done)
            [(state, report)] = run(seed, [(lane_unit, state, run.place(np.int32(count), 0))])
            report, done = run.fetch(report), done + count
            if reason := explain_failure(report.failed, pool.names):
                raise UserError(f"synthesis stopped: {reason}; lower the learning rate or alpha_bn")
            on_chunk(report)
        state = run.fetch(state)
    made = state.images_BHWC
    return np.asarray(pixels.to_uint8(made, pool.normalisation, rounding=rounding))


def _check(recipe: Recipe, pool: TeacherPool, iterations: int, images_BHWC: np.ndarray) -> None:
    """Refuse numbers that have no meaning, of which the rules of a config tell a command.

    Raises:
      UserError: one has none.
    """
    weights = {name: getattr(recipe, name) for name in _WEIGHTS}
    for name, value in {"iterations": iterations, **weights}.items():
        if value < 0:
            raise UserError(f"synthesise got {name}={value}; it must be zero or positive")
    for word in recipe.match:
        given.one_of("match", word, statistics.KINDS)
    if kinds := statistics.of_convolutions(recipe.match):
        norms = "bn" in recipe.match  # which a teacher may have alone
        without = [
            t.name for t in pool.teachers if t.first_conv is None and not (norms and t.first_bn)
        ]
        if without and recipe.alpha_bn:
            raise UserError(
                f"match names {', '.join(kinds)}, and {', '.join(without)} has no convolution of "
                f"models.layers whose input it could tell; build it with layers.Conv"
            )
    if recipe.densification and recipe.slots == 1:
        raise UserError(
            "densification compares the images of a class; give several of each, class by class, "
            "and say how many with slots"
        )
    if recipe.phase_sizes and recipe.phase_sizes[-1] != images_BHWC.shape[1]:
        raise UserError(
            f"phase_sizes is {recipe.phase_sizes}; the last must be the images' own size, "
            f"{images_BHWC.shape[1]}"
        )
