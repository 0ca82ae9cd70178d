"""Optimise the pixels of units against the teachers, on every device at once."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np
from etils import epath

from prism_jax import parallel, progress, synthesis
from prism_jax.config import Experiment, Recover, batch_layout, members, unit_budget, units
from prism_jax.core import pixels
from prism_jax.data import image_set
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.data.metrics import MetricsWriter, gather, keep, own_file
from prism_jax.errors import UserError
from prism_jax.models.import_torch import variable_shapes
from prism_jax.stages import fingerprints, guiding, statistics
from prism_jax.stages.context import Context
from prism_jax.stages.coordination import Interrupted
from prism_jax.stages.makers.made import Made, record_path
from prism_jax.stages.makers.start import initial_images, retrieved_images
from prism_jax.synthesis import course
from prism_jax.synthesis.course import Phase
from prism_jax.teachers import TeacherPool
from prism_jax.types import Array, PyTree, SynthState, Unit

DISPROPORTION = 10.0  # BN terms of two teachers further apart than this are warned of


def recipe_of(config: Experiment) -> synthesis.Recipe:
    """The engine's numbers."""
    recover = config.recover
    names = {field.name for field in dataclasses.fields(synthesis.Recipe)}
    numbers = {k: v for k, v in dataclasses.asdict(recover).items() if k in names}
    numbers["primary"] = recover.pool.index(recover.primary)
    if recover.statistic_primary:
        numbers["statistic_primary"] = recover.pool.index(recover.statistic_primary)
    if recover.budget != "early_late":
        numbers["rounds"] = 1
    return synthesis.Recipe(**numbers, slots=batch_layout(config).slots)


def check(context: Context) -> None:
    """Refuse phases of a size that a teacher cannot read; needs neither data nor weights.

    Raises:
      UserError: such a teacher, whose weights belong to one size.
    """
    recover, shape = context.config.recover, context.inputs.image_shape
    for size in sorted({*recover.phase_sizes} - {shape[0]}):
        for name in recover.pool:
            try:
                _read(context.networks.build(name), shape, size)
            except (flax.errors.FlaxError, TypeError, ValueError) as error:
                raise UserError(
                    f"teacher {name} does not read images of {size} px, which "
                    f"recover.phase_sizes asks for: its weights belong to one size; leave it out "
                    f"or unset recover.phase_sizes"
                ) from error


@functools.cache
def _read(module: nn.Module, image_shape: tuple[int, int, int], size: int) -> None:
    """Let a network whose weights belong to images of a shape read those of a size, abstractly."""
    images_BHWC = jax.ShapeDtypeStruct((1, size, size, image_shape[2]), np.float32)
    jax.eval_shape(module.apply, variable_shapes(module, image_shape), images_BHWC)


def prepare(context: Context, root: epath.Path) -> None:
    """Drop the lines of iterations that a resumed unit will do again; the others' stay."""
    gather(root)
    reached = {}
    for unit in units(context.config):
        if record_path(root, unit).exists():
            reached[unit.name] = np.inf
        else:
            steps = root / "checkpoints" / unit.name
            names = [p.name for p in steps.iterdir()] if steps.exists() else []
            reached[unit.name] = max((int(n) for n in names if n.isdecimal()), default=0)
    keep(root / "metrics.jsonl", lambda line: line["step"] <= reached.get(line["unit"], 0))


# --- the lanes ------------------------------------------------------------------------------


@dataclasses.dataclass
class Lane:
    """A unit in flight on one device.

    ``phase`` is that of ``phases`` whose shape the images have; ``start_BHWC`` are the initial
    images, at the shape of the last.
    """

    unit: Unit
    budget: int
    done: int
    placed_unit: PyTree
    state: PyTree
    checkpoints: Checkpoints
    start_terms: dict[str, Any] | None
    seconds: float
    start_BHWC: np.ndarray
    phases: tuple[Phase, ...]
    phase: int

    @property
    def shape(self) -> tuple[int, int]:
        """Images and their side: lanes that differ in it run apart."""
        now = self.phases[self.phase]
        return now.images, now.size


Begun = tuple[synthesis.UnitBatch, np.ndarray]  # a unit's coordinates, and its initial images

# The unit and the state that a lane without work is given, by the lane and the shape of its images.
Idle = dict[tuple[int, tuple[int, int]], tuple[PyTree, PyTree]]


def make(context: Context, root: epath.Path, waiting: list[Unit]) -> Iterator[Made]:
    """Optimise units, on every device at once; a unit's checkpoint is kept until it is taken."""
    config = context.config
    recipe = recipe_of(config)
    pool = context.networks.pool(config.recover.pool, config.recover.dtype)
    pool = statistics.with_targets(context, pool)
    engine = engine_of(context, pool, recipe, len(waiting), guiding.open_(context))
    # A thread more would take time from programs of the processor itself.
    ahead = 0 if parallel.on_cpu() else len(engine)
    queue = Ahead(lambda unit: batch_of(context, unit, keep=root), waiting, ahead)
    lanes: list[Lane | None] = [None] * len(engine)
    idle: Idle = {}
    writer = MetricsWriter(own_file(root), tensorboard_dir=root / "tensorboard")
    total = sum(unit_budget(config, unit) for unit in waiting)
    warned = False
    if not parallel.on_cpu():
        context.say("recover: compiling; with several large networks this takes minutes")

    with (
        progress.task("recover", total, unit="iteration") as bar,
        contextlib.closing(queue),
    ):
        while queue or any(lanes):
            for at, lane in enumerate(lanes):
                if lane is None and queue:
                    try:
                        lanes[at] = lane = _start(context, root, engine, pool, recipe, queue, at)
                    except Interrupted:  # between two classes of a unit's initial images
                        writer.flush()
                        for other in filter(None, lanes):
                            if other.done:
                                _save(engine, other)
                            other.checkpoints.close()
                        raise
                    bar.advance(lane.done)
            for at, lane in enumerate(lanes):
                if lane is not None:
                    _enter_phase(context, engine, recipe, lane, at)
            counts = [_count(lane, config.recover) for lane in lanes]
            began = time.monotonic()
            results, idle = _dispatch(context, engine, lanes, counts, idle)
            jax.block_until_ready(results)
            seconds = (time.monotonic() - began) / sum(map(bool, lanes))
            for at, (lane, count, result) in enumerate(zip(lanes, counts, results, strict=True)):
                if lane is None:
                    continue
                state, report = result
                lane.state, lane.done = state, lane.done + count
                lane.seconds += seconds
                report = engine.fetch(report)
                if count:
                    _check(context, lane, report, pool.names)
                    writer.write(lane.done, **_line(lane, report.last, pool.names))
                    if report.first.step == 0:
                        lane.start_terms = terms(report.first, pool.names)
                        warned = warned or _warn(context, report.first, pool.names)
                    bar.advance(count, loss=float(report.last.loss))
                if lane.done in config.recover.keep_at:  # before the checkpoint that skips it
                    _keep(context, root, engine, lane)
                if lane.done >= lane.budget:
                    writer.flush()
                    yield _finished(context, engine, recipe, pool, lane, report)
                    lane.checkpoints.delete()
                    lanes[at] = None
                elif lane.checkpoints.due or context.stop.requested:
                    writer.flush()
                    _save(engine, lane)
            if context.stop.requested:
                for lane in filter(None, lanes):
                    lane.checkpoints.close()
                context.stop.check()
    writer.close()


def engine_of(
    context: Context,
    pool: TeacherPool,
    recipe: synthesis.Recipe,
    waiting: int,
    guide: synthesis.Guide | None = None,
) -> synthesis.Engine:
    """The engine for so many units, on as many devices as have one."""
    how, span = context.config.parallel.map, context.config.parallel.recover_devices
    devices = parallel.lane_devices(waiting, span)
    return synthesis.engine(pool, recipe, devices=devices, how=how, span=span, guide=guide)


class Ahead:
    """Units in their order, each with its ``batch_of``, made while devices work on those before."""

    def __init__(self, make: Callable[[Unit], Begun], waiting: Sequence[Unit], ahead: int):
        """Make so many ahead of the one asked for; 0: in the caller, when it asks."""
        self._make, self._waiting, self._ahead = make, deque(waiting), ahead
        self._thread = ThreadPoolExecutor(1, "units") if ahead else None
        self._here = contextvars.copy_context()  # shared programs are the thread's too
        self._begun: deque[tuple[Unit, Future[Begun]]] = deque()

    def __len__(self) -> int:
        return len(self._begun) + len(self._waiting)

    def next(self) -> tuple[Unit, Begun]:
        """The next unit."""
        if self._thread is None:
            unit = self._waiting.popleft()
            return unit, self._make(unit)
        while self._waiting and len(self._begun) <= self._ahead:
            unit = self._waiting.popleft()
            self._begun.append((unit, self._thread.submit(self._here.run, self._make, unit)))
        unit, begun = self._begun.popleft()
        try:
            return unit, begun.result()
        except jax.errors.JaxRuntimeError:  # too little memory beside what runs; now nothing does
            return unit, self._make(unit)

    def close(self) -> None:
        """Make no more; what is being made is not waited for."""
        if self._thread:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _start(context: Context, root: epath.Path, engine, pool, recipe, queue: Ahead, at: int) -> Lane:
    """Put the next unit on a lane: from its checkpoint, or from its initial images."""
    unit, (batch, start_BHWC) = queue.next()
    config, budget = context.config, unit_budget(context.config, unit)
    phases = course.phases_of(recipe, budget, start_BHWC)

    def state_after(step: int) -> SynthState:
        state = course.begin(pool, recipe, phases[0], start_BHWC)
        for phase in phases[1 : course.phase_after(phases, step) + 1]:
            state = course.enter(recipe, phase, state, start_BHWC)
        return jax.device_get(state)

    checkpoints = Checkpoints(
        root / "checkpoints" / unit.name,
        every_seconds=config.recover.checkpoint_seconds,
        # As recover wrote it: another host may, and a shared disk can be slow to show its file.
        of={"unit": unit.name, **fingerprints.recover(context)},
    )
    start_terms, seconds = None, 0.0
    if restored := checkpoints.restore(state_after):
        _, state, meta = restored
        start_terms, seconds = meta["start_terms"], meta["seconds"]
        context.say(f"recover: unit {unit.name} continues after iteration {int(state.step)}")
    else:
        state = state_after(0)
    batches = [(batch, start_BHWC)]
    if config.recover.perturb_accumulates:
        earlier = [unit._replace(block=block) for block in range(unit.block)]
        batches = [batch_of(context, u, keep=root) for u in earlier] + batches
    batch = jax.device_get(course.prepare(pool, recipe, batches, config.seed))
    done = int(state.step)
    return Lane(
        unit, budget, done, engine.place(batch, at), engine.place(state, at), checkpoints,
        start_terms, seconds, start_BHWC, phases, course.phase_after(phases, done),
    )  # fmt: skip


def batch_of(context: Context, unit: Unit, *, keep: epath.Path | None = None) -> Begun:
    """A unit's coordinates and labels, and its initial images; see ``initial_images``."""
    classes, slots = members(context.config, unit)
    restarts = context.config.recover.round_robin_restarts
    before = 0 if restarts else _iterations_before(context, unit)
    budget = unit_budget(context.config, unit)
    batch = synthesis.UnitBatch(
        np.int32(slots[0]), np.int32(unit.block), np.int32(budget), classes, np.int32(before)
    )
    return batch, initial_images(context, classes, slots, keep=keep)


def _iterations_before(context: Context, unit: Unit) -> int:
    """Iterations of all units before one in the set's order, whenever they are worked on."""
    before = itertools.takewhile(lambda other: other != unit, units(context.config))
    return sum(unit_budget(context.config, other) for other in before)


def _enter_phase(context: Context, engine, recipe, lane: Lane, at: int) -> None:
    """Give a lane's images the shape of the phase that its next iteration is in."""
    while lane.done >= lane.phases[lane.phase].stop and lane.phase + 1 < len(lane.phases):
        lane.phase += 1
        state, injected_BHWC = engine.fetch(lane.state), lane.start_BHWC
        if context.config.recover.inject_from == "retrieved":
            classes, _ = members(context.config, lane.unit)
            injected_BHWC = retrieved_images(context, classes, state.images_BHWC)
        state = course.enter(recipe, lane.phases[lane.phase], state, injected_BHWC)
        lane.state = engine.place(jax.device_get(state), at)


def _dispatch(context: Context, engine, lanes, counts, idle: Idle) -> tuple[list, Idle]:
    """Run every lane that has a unit; one call of the engine per shape of images.

    Where lanes run together, one without a unit, or with one of another shape, runs zero iterations
    of a copy, which stays on its device: nothing is sent again for it.

    Returns:
      the lanes' results, and the copies for the next dispatch.
    """
    results: list = [None] * len(lanes)
    kept: Idle = {}
    for shape in dict.fromkeys(lane.shape for lane in lanes if lane):
        mine = [lane is not None and lane.shape == shape for lane in lanes]
        copies = {at: idle[at, shape] for at in range(len(lanes)) if (at, shape) in idle}
        missing = [at for at, own in enumerate(mine) if not own and at not in copies]
        if engine.together and missing:
            spare = lanes[mine.index(True)]
            copy = engine.fetch((spare.placed_unit, spare.state))
            copies |= {at: engine.place(copy, at) for at in missing}
        arguments: list[tuple | None] = []
        for at, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
            if not (mine[at] or engine.together):
                arguments.append(None)
                continue
            placed = (lane.placed_unit, lane.state) if mine[at] else copies[at]
            arguments.append((*placed, engine.place(np.int32(count if mine[at] else 0), at)))
        found = engine(context.config.seed, arguments)
        for at, (result, own) in enumerate(zip(found, mine, strict=True)):
            if own:
                results[at] = result
            elif engine.together:
                kept[at, shape] = (copies[at][0], result[0])
    return results, kept


def _count(lane: Lane | None, recover: Recover) -> int:
    if lane is None:
        return 0
    stops = (lane.phases[lane.phase].stop, *(at for at in recover.keep_at if at > lane.done))
    return iterations_ahead(lane.done, min(stops), recover.steps_per_dispatch)


def iterations_ahead(done: int, stop: int, steps_per_dispatch: int) -> int:
    """Iterations to the next multiple of ``steps_per_dispatch``, or to the end of the phase."""
    return min(steps_per_dispatch - done % steps_per_dispatch, stop - done)


def _keep(context: Context, root: epath.Path, engine, lane: Lane) -> None:
    """Write the first image of each class as it now is; a unit that is redone writes it again."""
    images = engine.fetch(lane.state).images_BHWC
    classes, slots = (x[: len(images)] for x in members(context.config, lane.unit))
    (first,) = np.nonzero(slots == 0)
    if len(first):
        pixels_BHWC = pixels.to_uint8(
            images[first], context.inputs.normalisation, rounding=context.config.recover.rounding
        )
        folder = kept_folder(root, lane.done)
        image_set.write_images(folder, np.asarray(pixels_BHWC), classes[first], slots[first])


def kept_folder(root: epath.Path, iteration: int) -> epath.Path:
    """Where recover keeps images as they were after an iteration."""
    return root / "kept" / f"{iteration:06d}"


def _save(engine, lane: Lane) -> None:
    meta = {"start_terms": lane.start_terms, "seconds": lane.seconds}
    lane.checkpoints.save(lane.done, engine.fetch(lane.state), meta)


def _finished(context: Context, engine, recipe, pool, lane: Lane, report) -> Made:
    """A finished unit, and what its teachers did."""
    config = context.config
    images = engine.fetch(lane.state).images_BHWC
    drawn = synthesis.drawn_share(
        recipe, pool.teachers, config.seed, engine.fetch(lane.placed_unit)
    )
    facts = {
        "drawn": dict(zip(pool.names, map(float, drawn), strict=True)),
        "terms": {"start": lane.start_terms, "end": terms(report.last, pool.names)},
    }
    return Made(lane.unit, images, config.recover.rounding, lane.seconds, facts)


# --- what is said and logged ----------------------------------------------------------------


def terms(found: synthesis.Terms, names: tuple[str, ...]) -> dict[str, Any]:
    """One iteration's unweighted terms: per teacher, or one number.

    None: a teacher was not read, or does not supervise and its term is not finite.
    """

    def by_name(values: Array) -> dict[str, float | None] | float:
        if not np.ndim(values):
            return float(values)
        return {
            name: float(v) if np.isfinite(v) else None
            for name, v in zip(names, values, strict=True)
        }

    values = {"ce": found.ce_T, "bn": found.bn_T, **found.others}
    return {name: by_name(value) for name, value in values.items()}


def _line(lane: Lane, last: synthesis.Terms, names: tuple[str, ...]) -> dict[str, Any]:
    def weighing(weights_T) -> list[str]:
        return [name for name, weight in zip(names, weights_T, strict=True) if weight > 0]

    return {
        "unit": lane.unit.name,
        "loss": float(last.loss),
        "drawn": weighing(last.draw.statistic_weights_T),
        "told": weighing(last.draw.logit_weights_T),
        **terms(last, names),
    }


def _check(context: Context, lane: Lane, report, names: tuple[str, ...]) -> None:
    if reason := synthesis.explain_failure(report.failed, names):
        raise UserError(
            f"recover stopped at unit {lane.unit.name}: {reason}. Finished units stay. Lower "
            f"recover.learning_rate or recover.alpha_bn, or leave that teacher out, in another "
            f"workdir: --workdir=<new> --from={context.root}"
        )


def _warn(context: Context, first: synthesis.Terms, names: tuple[str, ...]) -> bool:
    """Say so where one teacher's BN term dwarfs another's; returns whether it was said."""
    recover = context.config.recover
    if recover.alpha_bn == 0 or recover.alignment_scale != "none":
        return False
    sizes = {n: float(v) for n, v in zip(names, first.bn_T, strict=True) if v > 0}
    if not sizes:
        return False
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    ratio = sizes[large] / sizes[small]
    if ratio <= DISPROPORTION:
        return False
    context.say(
        f"warning: the BN term of {large} ({sizes[large]:.3g}) is {ratio:.0f} times that of "
        f"{small} ({sizes[small]:.3g}); where both are drawn, {large} decides. If that is not "
        f"meant, set recover.alignment_scale, or leave one of them out of recover.pool."
    )
    return True
