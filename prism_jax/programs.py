"""Every program that a run launches, built by the stages themselves from shapes alone.

No data, no weights and no device: inside ``parallel.described`` the programs are those of a
machine that is not here, to be compiled and looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from prism_jax import parallel, rng, synthesis, training
from prism_jax.config import SOFT_CONTROLS, Experiment, batch_layout, bn_group_of, budget_of
from prism_jax.config.generation import fitting_of
from prism_jax.diffusion import fit
from prism_jax.errors import UserError
from prism_jax.models.import_torch import variable_shapes
from prism_jax.stages import (
    analyse,
    anchoring,
    generator,
    guiding,
    relabel,
    squeeze,
    statistics,
    validate,
)
from prism_jax.stages.context import Context
from prism_jax.stages.fingerprints import statistic_kinds
from prism_jax.stages.makers import generate, optimise
from prism_jax.stages.makers import start as starts
from prism_jax.stages.networks import Networks
from prism_jax.synthesis import UnitBatch, course, measuring
from prism_jax.synthesis import start as starting
from prism_jax.synthesis.objective import GROUPS
from prism_jax.teachers import TeacherPool
from prism_jax.training import TESTED, TrainBatch, Trainer
from prism_jax.types import PyTree


class Program(NamedTuple):
    """One program.

    Attributes:
      name: the stage and what it is about, unique in a run: "recover", "validate/resnet18".
      lower: traces and lowers it.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]


class ShapesOnly(Networks):
    """Networks whose variables have no values."""

    def load(self, name: str) -> PyTree:
        return {"batch_stats": {}, **variable_shapes(self.build(name), self._inputs.image_shape)}

    def class_indices(self, name: str) -> tuple[int, ...] | None:
        """Those of the config; where the data would tell, as many of the first outputs."""
        network, classes = self._config.network(name), self._config.dataset.num_classes
        if network.class_indices is not None or (network.head_classes or classes) == classes:
            return network.class_indices
        return tuple(range(classes))


def shapes_of(experiment: Experiment) -> Context:
    """A run of which only shapes are known."""
    context = Context(experiment, "unused")
    context.networks = ShapesOnly(experiment, context.root, context.inputs)
    return context


def programs_of(experiment: Experiment, *stages: str) -> Iterator[Program]:
    """The programs of some stages, by default of all, in the order a run first needs them."""
    context = shapes_of(experiment)
    for stage in stages or STAGES:
        yield from STAGES[stage](context)


def find(experiment: Experiment, name: str) -> Program:
    """A program by its name.

    Raises:
      UserError: there is none of that name.
    """
    stage = name.split("/")[0]
    there = list(programs_of(experiment, *([stage] if stage in STAGES else [])))
    for program in there:
        if program.name == name:
            return program
    raise UserError(f"there is no program {name!r}; there are: {', '.join(p.name for p in there)}")


def largest_class(context: Context) -> int | None:
    """Training images of the largest class; None without the data."""
    try:
        return int(np.bincount(context.inputs.open("train").labels_N).max())
    except UserError:
        return None


def with_blank_statistics(context: Context, pool: TeacherPool) -> TeacherPool:
    """Recover's pool with zeros for those statistics of real images that it matches."""
    e = context.config
    patch = e.recover.statistic_patch
    classes = e.dataset.num_classes if e.recover.class_share else 0
    variables = []
    for t, v in zip(pool.teachers, pool.variables, strict=True):
        kinds = statistic_kinds(e, t.name)
        if "group" in kinds:
            tables = jax.tree.map(
                lambda x: np.zeros((e.recover.ipc, *x.shape), np.float32), v["batch_stats"]
            )
            v = v | {GROUPS: tables}
        if not {"conv", "class"}.isdisjoint(kinds):
            shape = context.inputs.image_shape
            v = v | measuring.blank(t, v, shape, patch=patch, num_classes=classes)
        variables.append(v)
    return dataclasses.replace(pool, variables=tuple(variables))


# --- one generator per stage ------------------------------------------------------------------


def _squeeze(context: Context) -> Iterator[Program]:
    e = context.config
    for name in e.squeeze.teachers:
        division = context.train_devices(e.squeeze.batch_size)
        if e.network(name).checkpoint:
            yield _test(context, f"squeeze/{name}/test", context.networks.build(name), division)
            continue
        module = context.networks.build(name, dtype=e.squeeze.dtype)
        recipe = squeeze.recipe_of(e, name)
        batch = _batch(context, e.squeeze.batch_size)
        yield from _training(context, f"squeeze/{name}", module, recipe, batch, division)


def _statistics(context: Context) -> Iterator[Program]:
    def lower(name: str, kind: str) -> jax.stages.Lowered:
        measurer, shape = statistics.measurer_of(context, name, kind), context.inputs.image_shape
        if isinstance(measurer, measuring.Reader):
            return measurer.lower(shape)
        return measurer.lower(shape, context.config.squeeze.batch_size)

    for name, kind in statistics.needed(context.config):
        yield Program(f"statistics/{kind}/{name}", functools.partial(lower, name, kind))


def _recover(context: Context) -> Iterator[Program]:
    e, layout = context.config, batch_layout(context.config)
    if e.recover.initialise in starting.SCORING:
        name = e.recover.scorer or e.recover.primary
        yield Program("recover/scorer", lambda: _scorer(context, name))
    if e.recover.inject_from == "retrieved":
        yield from _retrievers(context)
    if generator.wanted(context):
        yield from _generated(context)
    if not e.recover.iterations:
        return
    pool = context.networks.pool(e.recover.pool, e.recover.dtype)
    pool, recipe = with_blank_statistics(context, pool), optimise.recipe_of(e)
    for size in layout.sizes:
        yield from _optimised(context, pool, recipe, size)


def _generated(context: Context) -> Iterator[Program]:
    """A generator's training, latents of real images, and images."""
    g = context.config.generate

    def train() -> jax.stages.Lowered:
        opened, fitting = generator.described(context), fitting_of(g)
        module: Any = opened.generator.denoiser
        shape = opened.latent_shape
        state = jax.eval_shape(lambda: fit.initial_state(module, fitting, 0, shape))
        latents = _array((fitting.batch_size, *shape), np.float32)
        labels = _array((fitting.batch_size,), np.int32)
        arguments = _on_one((np.uint32(0), state, latents, labels))
        return fit.jitted_step(fitting, module).lower(*arguments)  # type: ignore[attr-defined]

    def encode() -> jax.stages.Lowered:
        encoder = anchoring.Encoder(context, generator.described(context))
        return encoder.lower(anchoring.encoded_at_once(g, largest_class(context)))

    def paint() -> jax.stages.Lowered:
        return anchoring.painter(context, generator.described(context)).lower()

    def refine() -> jax.stages.Lowered:
        return generate.refiner(context, generator.described(context)).lower()

    if g.generator == "dit":
        yield Program("recover/generator", train)
    if "latents" in anchoring.needed(context):
        yield Program("recover/latents", encode)
    yield Program("recover", paint)
    if g.refine.steps and g.candidates > 1:
        yield Program("recover/refine", refine)


def _optimised(
    context: Context, pool: TeacherPool, recipe: synthesis.Recipe, size: int
) -> Iterator[Program]:
    """The programs of image batches of a size; those of the largest have no size in their names."""
    e, layout = context.config, batch_layout(context.config)
    of_size = "" if size == layout.size else f"/{size}"
    start = _images(context, size, np.float32)
    labels = _array(start.shape[:1], np.int32)
    unit = UnitBatch(np.int32(0), np.int32(0), np.int32(budget_of(e, 0)), labels)

    def abstract(function: Callable, *arguments: Any) -> PyTree:
        """The shapes of a function of a pool."""
        shaped = lambda v, *x: function(dataclasses.replace(pool, variables=v), *x)  # noqa: E731
        return jax.eval_shape(shaped, pool.variables, *arguments)

    if recipe.perturb_rho and recipe.perturb_steps:
        primary, variables = pool.teachers[recipe.primary], pool.variables[recipe.primary]
        ascent = course.ascent_of(recipe, primary, pool.normalisation)
        arguments = variables["params"], variables, np.uint32(0), unit, start
        yield Program(f"recover/perturb{of_size}", lambda: ascent.lower(*_on_one(arguments)))
        unit = abstract(lambda p, u, x: course.prepare(p, recipe, [(u, x)], 0), unit, start)

    def lower(state: PyTree) -> jax.stages.Lowered:
        batches, guide = layout.groups * layout.blocks, guiding.described(context)
        engine = optimise.engine_of(context, pool, recipe, batches, guide)
        return engine.lower_for(unit, state, np.int32(1))

    phases = course.phases_of(recipe, budget_of(e, 0), start)
    names = _of_phases(phases, f"recover{of_size}")
    state = abstract(lambda p, x: course.begin(p, recipe, phases[0], x), start)
    for at, phase in enumerate(phases):
        if at:
            state = jax.eval_shape(functools.partial(course.enter, recipe, phase), state, start)
        if names[at] not in names[:at]:
            yield Program(names[at], functools.partial(lower, state))


class PhaseProgram(NamedTuple):
    """The program of a phase of recover's iterations: its share of them, pixels in its images."""

    name: str
    share: float
    pixels: int


def phases(experiment: Experiment) -> list[PhaseProgram]:
    """The programs of the phases in which the largest batch is optimised."""
    context = shapes_of(experiment)
    start = _images(context, batch_layout(experiment).size, np.float32)
    budget = budget_of(experiment, 0)
    found = course.phases_of(optimise.recipe_of(experiment), budget, start)
    stops = [0, *(phase.stop for phase in found)]
    return [
        PhaseProgram(name, (stop - before) / budget, phase.images * phase.size**2)
        for name, phase, before, stop in zip(
            _of_phases(found, "recover"), found, stops, stops[1:], strict=False
        )
    ]


def _of_phases(phases: Sequence[course.Phase], first: str) -> list[str]:
    """Names of programs: phases whose images have one shape share one."""
    names: dict[tuple[int, int], str] = {}
    for phase in phases:
        other = f"recover/{phase.images}x{phase.size}"
        names.setdefault((phase.images, phase.size), other if names else first)
    return [names[phase.images, phase.size] for phase in phases]


def _relabel(context: Context) -> Iterator[Program]:
    e = context.config
    if not e.soft_labels:
        return
    count = e.recover.ipc * e.dataset.num_classes
    plan = relabel.plan_for(context, count)
    for name, size in (("relabel", plan.batch_size), ("relabel/last", count % plan.batch_size)):
        if size:
            lower = lambda size=size: relabel.labeller_of(context, plan).lower(  # noqa: E731
                context.inputs.image_shape, size
            )
            yield Program(name, lower)


def _validate(context: Context) -> Iterator[Program]:
    e = context.config
    count = e.recover.ipc * e.dataset.num_classes
    size = min(e.validate.batch_size, count)
    devices = context.train_devices(
        size, accumulate=e.validate.accumulate, bn_group=bn_group_of(e.validate)
    )
    augment = relabel.augment_of(e)
    for name in e.validate.students:
        module = context.networks.build(name, student=True, dtype=e.validate.dtype)
        recipe_of = functools.partial(validate.recipe_of, context, augment)
        recipe = recipe_of(e.validate.loss, e.validate.epochs)
        batch = _batch(context, size, soft=e.soft_labels)
        yield from _training(context, f"validate/{name}", module, recipe, batch, devices)
        if e.soft_labels and (last := count % size):
            batch = _batch(context, last, soft=True)
            yield _step(context, f"validate/{name}/last", module, recipe, batch, devices)
        if e.soft_labels and not set(e.validate.controls) <= set(SOFT_CONTROLS):
            recipe, batch = recipe_of("ce", e.validate.epochs), _batch(context, size)
            yield _step(context, f"validate/{name}/hard", module, recipe, batch, devices)


def _analyse(context: Context) -> Iterator[Program]:
    if name := context.config.analyse.network:
        arguments = context.networks.load(name), _images(context, analyse.EMBEDDED, np.uint8)
        embedder = analyse.embedder(context, name)
        yield Program("analyse", lambda: embedder.lower(*_on_one(arguments)))


STAGES: dict[str, Callable[[Context], Iterator[Program]]] = {
    "squeeze": _squeeze,
    "statistics": _statistics,
    "recover": _recover,
    "relabel": _relabel,
    "validate": _validate,
    "analyse": _analyse,
}


# --- small parts --------------------------------------------------------------------------------


def _training(context: Context, where: str, module, recipe, batch, devices) -> Iterator[Program]:
    """Making a network's weights, a step, and a test."""
    key = jax.eval_shape(lambda: rng.root(0))
    images = _images(context, 1, np.float32)
    init = training.jitted_init(module)
    yield Program(f"{where}/init", lambda: init.lower(*_on_one((key, images))))
    yield _step(context, where, module, recipe, batch, devices)
    yield _test(context, f"{where}/test", module, devices)


def _step(context: Context, name: str, module, recipe, batch, devices: int) -> Program:
    def lower() -> jax.stages.Lowered:
        given = {"view_seed": 0, "seed": 0, "devices": devices}
        trainer = Trainer(module, recipe, context.inputs.normalisation, **given)
        state = jax.eval_shape(lambda: trainer.start(context.inputs.image_shape))
        return trainer.lower(state, batch)

    return Program(name, lower)


def _test(context: Context, name: str, module, devices: int) -> Program:
    mesh = parallel.data_mesh(devices)
    forward = training.jitted_forward(module, context.inputs.normalisation, mesh)
    variables = {"batch_stats": {}, **variable_shapes(module, context.inputs.image_shape)}
    images = _images(context, devices * -(-TESTED // devices), np.uint8)
    return Program(name, lambda: forward.lower(mesh.replicate(variables), mesh.put(images)))


def _scorer(context: Context, name: str) -> jax.stages.Lowered:
    pool = context.networks.pool([name])
    read = starting.log_probabilities_of(pool.teachers[0], context.inputs.normalisation)
    images = _images(context, starting.SCORED, np.float32)
    return read.lower(*_on_one((pool.variables[0], images)))


def _retrievers(context: Context) -> Iterator[Program]:
    """The features of images at the sizes at which something is injected."""
    recover = context.config.recover
    pool = context.networks.pool([recover.scorer or recover.primary])
    channels = context.inputs.image_shape[2]
    for size, side in itertools.product(
        batch_layout(context.config).sizes, dict.fromkeys(recover.phase_sizes[:-1])
    ):
        images = _array((size, side, side, channels), np.float32)
        arguments = pool.variables[0], images
        program = starts.features_program(context, pool)
        yield Program(
            f"recover/retriever/{size}x{side}",
            functools.partial(lambda p, a: p.lower(*_on_one(a)), program, arguments),
        )


def _array(shape: tuple[int, ...], dtype: type) -> Any:
    """What stands in for an array where a program is lowered: its shape alone."""
    return jax.ShapeDtypeStruct(shape, dtype)


def _images(context: Context, count: int, dtype: type) -> Any:
    return _array((count, *context.inputs.image_shape), dtype)


def _batch(context: Context, size: int, *, soft: bool = False) -> TrainBatch:
    labels = _array((size,), np.int32)
    classes = context.config.dataset.num_classes
    logits = _array((size, classes), np.float32) if soft else None
    return TrainBatch(0, 0, _images(context, size, np.uint8), labels, logits)


def _on_one(tree: PyTree) -> PyTree:
    """A tree on the first device, where programs run that are not mapped."""
    return parallel.put(tree, SingleDeviceSharding(parallel.devices()[0]))
