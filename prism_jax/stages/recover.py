"""Recover: optimise the pixels of every unit, on every device at once.

recover/images/<class>/<slot>.png   what everything after reads
recover/units/<unit>.json           written last: this unit is done
recover/checkpoints/<unit>/         Orbax: images, optimiser, step of a unit in flight
recover/metrics.jsonl               loss terms per teacher
recover/manifest.json               written when every unit is done
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import flax
import jax
import numpy as np
from etils import epath

from prism_jax import course, parallel, progress, synthesis
from prism_jax.config import Layout, batch_layout, budget_of
from prism_jax.core import pixels
from prism_jax.course import Phase
from prism_jax.data import image_set, workdir
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.data.lazy import Images
from prism_jax.data.metrics import MetricsWriter, gather, keep, own_file
from prism_jax.errors import UserError
from prism_jax.stages import statistics
from prism_jax.stages.context import Context, LabelledSet, enough_memory
from prism_jax.teachers import TeacherPool
from prism_jax.types import PyTree, SynthState, Unit

T = TypeVar("T")

DISPROPORTION = 10.0  # BN terms of two teachers further apart than this are warned of


def folder(context: Context) -> epath.Path:
    return context.root / "recover"


def units(context: Context) -> list[Unit]:
    """All units, in the set's order; they are worked on ``longest_first``."""
    layout = batch_layout(context.config)
    groups, blocks = range(layout.groups), range(layout.blocks)
    if context.config.recover.batch_order == "ipc_major":
        return [Unit(g, b) for g in groups for b in blocks]
    return [Unit(g, b) for b in blocks for g in groups]


def members(context: Context, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Classes and slots (int32, B) of a unit's images, in batch order."""
    layout: Layout = batch_layout(context.config)
    slots = np.arange(unit.group * layout.slots, (unit.group + 1) * layout.slots, dtype=np.int32)
    classes = np.arange(
        unit.block * layout.classes, (unit.block + 1) * layout.classes, dtype=np.int32
    )
    recover = context.config.recover
    if recover.batch_order == "ipc_major" or recover.budget == "early_late":
        return np.tile(classes, len(slots)), np.repeat(slots, len(classes))
    return np.repeat(classes, len(slots)), np.tile(slots, len(classes))


def recipe_of(context: Context) -> synthesis.Recipe:
    """The engine's numbers."""
    recover = context.config.recover
    names = {field.name for field in dataclasses.fields(synthesis.Recipe)}
    numbers = {k: v for k, v in dataclasses.asdict(recover).items() if k in names}
    numbers["primary"] = recover.pool.index(recover.primary)
    if recover.statistic_primary:
        numbers["statistic_primary"] = recover.pool.index(recover.statistic_primary)
    if recover.budget != "early_late":
        numbers["rounds"] = 1
    return synthesis.Recipe(**numbers, slots=batch_layout(context.config).slots)


def pending(context: Context) -> list[Unit]:
    """Units whose images are not there yet.

    Raises:
      UserError: there are images, but they were made from other settings.
    """
    root = folder(context)
    found = workdir.read_fingerprint(root)
    if found is None:
        return units(context)
    if lines := workdir.differences(found, context.recover_fields()):
        changed = "\n".join(f"  - {line}" for line in lines)
        raise UserError(
            f"{root} holds images made from other settings:\n{changed}\n"
            f"Nothing was changed. Either use another --workdir (with --from={context.root} to "
            f"adopt every stage that still fits), or restore these values, or delete {root}."
        )
    if (root / "manifest.json").exists():
        return []
    there = workdir.names(root / "units")
    return [unit for unit in units(context) if _record(context, unit).name not in there]


def is_done(context: Context) -> bool:
    return not pending(context) and (folder(context) / "manifest.json").exists()


def synthetic_set(context: Context) -> LabelledSet:
    """The finished synthetic set.

    Raises:
      UserError: it is not finished, or an image is damaged; a damaged one is set aside, and
        the next run redoes its unit.
    """
    root = folder(context)
    if not is_done(context):
        raise UserError(
            f"{root} has no finished images; run the recover stage first (--stages=recover,...)"
        )
    manifest = workdir.read_record(root / "manifest.json")
    images = context.once("synthetic images", lambda: _read_images(context, manifest["units"]))
    labels = np.repeat(
        np.arange(context.config.dataset.num_classes, dtype=np.int32), context.config.recover.ipc
    )
    fields = context.recover_fields()
    soft = context.config.soft_labels
    weights = manifest.get("weights")
    weights = None if weights is None else np.array(weights, np.float32)
    return LabelledSet("synthetic", context.root, lambda: images, labels, fields, soft, weights)


def run(context: Context) -> None:
    """Optimise every unit that is missing, then write the manifest."""
    root, config = folder(context), context.config
    if is_done(context):
        return

    def prepare() -> None:
        context.begin(root, context.recover_fields())
        _cut_metrics(context)

    ordered = longest_first(units(context), lambda unit: _budget(context, unit))
    if mine := context.deal("recover", ordered, lambda: pending(context), prepare):
        # The whole of it: what does not fit is said when a result is fetched, not when it is asked.
        with enough_memory(
            f"Lower recover.batch_size (now {_batch_size(context)} images). It belongs "
            f"to what the images are made from, so start in another workdir: --workdir=<new> "
            f"--from={context.root}."
        ):
            (_optimise if config.recover.iterations else _copy)(context, mine)
    if not parallel.is_main():
        context.wait(lambda: is_done(context))
        return
    context.wait(lambda: not pending(context))
    gather(root)
    records = [workdir.read_record(_record(context, unit)) for unit in units(context)]
    images = context.once("synthetic images", lambda: _read_images(context, records))
    if (root / "checkpoints").exists():
        workdir.remove(root / "checkpoints")
    manifest = {
        "digest": image_set.digest(images),
        "images": len(images),
        "ipc": config.recover.ipc,
        "num_classes": config.dataset.num_classes,
        "class_names": context.open("train").class_names,
        "imagenet_indices": context.open("train").imagenet_indices,
        "seed": config.seed,
        "pool": list(config.recover.pool),
        "units": records,
    }
    # Optimised further, images are others than those that the weights were found for.
    weights = getattr(context.initial_source, "weights_N", None)
    if weights is not None and not config.recover.iterations:
        manifest["weights"] = weights.tolist()
    workdir.write_record(root / "manifest.json", manifest)


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


def _optimise(context: Context, waiting: list[Unit]) -> None:
    config, root = context.config, folder(context)
    recipe = recipe_of(context)
    pool = context.pool(config.recover.pool, config.recover.dtype)
    pool = statistics.with_targets(context, pool)
    check_sizes(context, pool, recipe)
    span = config.parallel.recover_devices
    devices = parallel.lane_devices(len(waiting), span)
    engine = synthesis.engine(pool, recipe, devices=devices, how=config.parallel.map, span=span)
    queue = deque(waiting)
    lanes: list[Lane | None] = [None] * len(engine)
    writer = MetricsWriter(own_file(root), tensorboard_dir=root / "tensorboard")
    total = sum(_budget(context, unit) for unit in queue)
    warned = False

    with progress.task("recover", total, unit="iteration") as bar:
        while queue or any(lanes):
            for at, lane in enumerate(lanes):
                if lane is None and queue:
                    lanes[at] = lane = _start(context, engine, pool, recipe, queue.popleft(), at)
                    bar.advance(lane.done)
            for at, lane in enumerate(lanes):
                if lane is not None:
                    _enter_phase(engine, recipe, lane, at)
            counts = [_count(lane, config.recover.steps_per_dispatch) for lane in lanes]
            began = time.monotonic()
            results = jax.block_until_ready(_dispatch(context, engine, lanes, counts))
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
                if lane.done >= lane.budget:
                    writer.flush()
                    _finish(context, engine, recipe, pool, lane, report)
                    lanes[at] = None
                elif lane.checkpoints.due or context.stop.requested:
                    writer.flush()
                    _save(engine, lane)
            if context.stop.requested:
                for lane in filter(None, lanes):
                    lane.checkpoints.close()
                context.stop.check()
    writer.close()


def _start(context: Context, engine, pool, recipe, unit: Unit, at: int) -> Lane:
    """Put a unit on a lane: from its checkpoint, or from its initial images."""
    config, budget = context.config, _budget(context, unit)
    batch, start_BHWC = _batch(context, unit)
    phases = course.phases_of(recipe, budget, start_BHWC)

    def state_after(step: int) -> SynthState:
        state = course.begin(pool, recipe, phases[0], start_BHWC)
        for phase in phases[1 : course.phase_after(phases, step) + 1]:
            state = course.enter(recipe, phase, state, start_BHWC)
        return jax.device_get(state)

    checkpoints = Checkpoints(
        folder(context) / "checkpoints" / unit.name,
        every_seconds=config.recover.checkpoint_seconds,
        of={"unit": unit.name, **workdir.read_fingerprint(folder(context))},
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
        batches = [_batch(context, u) for u in earlier] + batches
    batch = jax.device_get(course.prepare(pool, recipe, batches, config.seed))
    done = int(state.step)
    return Lane(
        unit, budget, done, engine.place(batch, at), engine.place(state, at), checkpoints,
        start_terms, seconds, start_BHWC, phases, course.phase_after(phases, done),
    )  # fmt: skip


def _batch(context: Context, unit: Unit) -> tuple[synthesis.UnitBatch, np.ndarray]:
    """A unit's coordinates and labels, and its initial images."""
    classes, slots = members(context, unit)
    before = 0 if context.config.recover.round_robin_restarts else _iterations_before(context, unit)
    batch = synthesis.UnitBatch(
        np.int32(slots[0]), np.int32(unit.block), np.int32(_budget(context, unit)), classes,
        np.int32(before),
    )  # fmt: skip
    return batch, context.initial_images(classes, slots)


def _iterations_before(context: Context, unit: Unit) -> int:
    """Iterations of all units before one in the set's order, whenever they are worked on."""
    before = itertools.takewhile(lambda other: other != unit, units(context))
    return sum(_budget(context, other) for other in before)


def _enter_phase(engine, recipe, lane: Lane, at: int) -> None:
    """Give a lane's images the shape of the phase that its next iteration is in."""
    while lane.done >= lane.phases[lane.phase].stop and lane.phase + 1 < len(lane.phases):
        lane.phase += 1
        state = course.enter(
            recipe, lane.phases[lane.phase], engine.fetch(lane.state), lane.start_BHWC
        )
        lane.state = engine.place(jax.device_get(state), at)


def check_sizes(context: Context, pool: TeacherPool, recipe: synthesis.Recipe) -> None:
    """Refuse phases of a size that a teacher cannot read.

    Raises:
      UserError: such a teacher, whose weights belong to one size.
    """
    for size in sorted(set(recipe.phase_sizes)):
        images = jax.ShapeDtypeStruct((1, size, size, context.image_shape[2]), np.float32)
        for teacher, variables in zip(pool.teachers, pool.variables, strict=True):
            try:
                jax.eval_shape(teacher.module.apply, variables, images)
            except (flax.errors.FlaxError, TypeError, ValueError) as error:
                raise UserError(
                    f"teacher {teacher.name} does not read images of {size} px, which "
                    f"recover.phase_sizes asks for: its weights belong to one size; leave it out "
                    f"or unset recover.phase_sizes"
                ) from error


def _dispatch(context: Context, engine, lanes, counts) -> list:
    """Run every lane that has a unit; one call of the engine per shape of images.

    A lane without a unit, or with one of another shape, runs zero iterations of a copy.
    """
    results: list = [None] * len(lanes)
    for shape in dict.fromkeys(lane.shape for lane in lanes if lane):
        mine = [lane is not None and lane.shape == shape for lane in lanes]
        spare = lanes[mine.index(True)]
        copy = None if all(mine) else engine.fetch((spare.placed_unit, spare.state))
        arguments = []
        for at, (lane, count) in enumerate(zip(lanes, counts, strict=True)):
            placed = (lane.placed_unit, lane.state) if mine[at] else engine.place(copy, at)
            arguments.append((*placed, engine.place(np.int32(count if mine[at] else 0), at)))
        found = engine(context.config.seed, arguments)
        results = [new if own else old for new, old, own in zip(found, results, mine, strict=True)]
    return results


def longest_first(found: Iterable[T], budget: Callable[[T], int]) -> list[T]:
    """The order of work: what takes longest begins first, so that devices end together.

    Otherwise the order is kept. It changes no image: a unit knows nothing of when it is worked on.
    """
    return sorted(found, key=budget, reverse=True)


def _count(lane: Lane | None, steps_per_dispatch: int) -> int:
    if lane is None:
        return 0
    return iterations_ahead(lane.done, lane.phases[lane.phase].stop, steps_per_dispatch)


def iterations_ahead(done: int, stop: int, steps_per_dispatch: int) -> int:
    """Iterations to the next multiple of ``steps_per_dispatch``, or to the end of the phase."""
    return min(steps_per_dispatch - done % steps_per_dispatch, stop - done)


def _save(engine, lane: Lane) -> None:
    meta = {"start_terms": lane.start_terms, "seconds": lane.seconds}
    lane.checkpoints.save(lane.done, engine.fetch(lane.state), meta)


def _finish(context: Context, engine, recipe, pool, lane: Lane, report) -> None:
    """Write a finished unit, and what its teachers did."""
    config = context.config
    images = engine.fetch(lane.state).images_BHWC
    drawn = synthesis.drawn_share(
        recipe, pool.teachers, config.seed, engine.fetch(lane.placed_unit)
    )
    _write(
        context, lane.unit, images, rounding=config.recover.rounding, seconds=lane.seconds,
        drawn=dict(zip(pool.names, map(float, drawn), strict=True)),
        terms={"start": lane.start_terms, "end": terms(report.last, pool.names)},
    )  # fmt: skip
    lane.checkpoints.delete()


def _copy(context: Context, waiting: list[Unit]) -> None:
    """Without iterations the initial images are the set; no teacher is needed."""
    for unit in waiting:
        started = time.monotonic()
        images = context.initial_images(*members(context, unit))
        # Not recover.rounding: nearest gives back the very pixels that were read.
        _write(context, unit, images, rounding="nearest", seconds=time.monotonic() - started)
        context.stop.check()


def _write(
    context: Context, unit: Unit, images_BHWC, *, rounding: str, seconds: float, **more: Any
) -> None:
    """Write a unit's images and then its record, which makes it done."""
    classes, slots = members(context, unit)
    images = np.asarray(pixels.to_uint8(images_BHWC, context.normalisation, rounding=rounding))
    if context.config.recover.jpeg_quality is not None:
        images = image_set.through_jpeg(images, context.config.recover.jpeg_quality)
    image_set.write_images(folder(context) / "images", images, classes, slots)
    record = {
        "unit": unit.name,
        "slots": sorted({int(s) for s in slots}),
        "classes": [int(classes.min()), int(classes.max())],
        "iterations": _budget(context, unit),
        "digest": image_set.digest(images),
        "seconds": seconds,
        **more,
    }
    workdir.write_record(_record(context, unit), record)


# --- what is said and logged ----------------------------------------------------------------


def terms(found: synthesis.Terms, names: tuple[str, ...]) -> dict[str, Any]:
    """One iteration's unweighted terms: per teacher (None: it was not read), or one number."""

    def by_name(values: np.ndarray) -> dict[str, float | None] | float:
        if not np.ndim(values):
            return float(values)
        return {
            name: None if np.isnan(v) else float(v) for name, v in zip(names, values, strict=True)
        }

    values = {"ce": found.ce_T, "bn": found.bn_T, **found.others}
    return {name: by_name(value) for name, value in values.items()}


def _line(lane: Lane, last: synthesis.Terms, names: tuple[str, ...]) -> dict[str, Any]:
    drawn = [n for n, w in zip(names, last.draw.statistic_weights_T, strict=True) if w > 0]
    return {
        "unit": lane.unit.name,
        "loss": float(last.loss),
        "drawn": drawn,
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
    small, large = min(sizes, key=sizes.get), max(sizes, key=sizes.get)
    ratio = sizes[large] / sizes[small]
    if ratio <= DISPROPORTION:
        return False
    context.say(
        f"warning: the BN term of {large} ({sizes[large]:.3g}) is {ratio:.0f} times that of "
        f"{small} ({sizes[small]:.3g}); where both are drawn, {large} decides. If that is not "
        f"meant, set recover.alignment_scale, or leave one of them out of recover.pool."
    )
    return True


def _cut_metrics(context: Context) -> None:
    """Drop the lines of iterations that a resumed unit will do again; the others' stay."""
    root = folder(context)
    gather(root)
    reached = {}
    for unit in units(context):
        if _record(context, unit).exists():
            reached[unit.name] = np.inf
        else:
            steps = root / "checkpoints" / unit.name
            names = [p.name for p in steps.iterdir()] if steps.exists() else []
            reached[unit.name] = max((int(n) for n in names if n.isdecimal()), default=0)
    keep(root / "metrics.jsonl", lambda line: line["step"] <= reached.get(line["unit"], 0))


# --- small parts ----------------------------------------------------------------------------


def _budget(context: Context, unit: Unit) -> int:
    return budget_of(context.config, unit.group * batch_layout(context.config).slots)


def _batch_size(context: Context) -> int:
    layout = batch_layout(context.config)
    return layout.slots * layout.classes


def _record(context: Context, unit: Unit) -> epath.Path:
    return folder(context) / "units" / f"{unit.name}.json"


def _read_images(context: Context, records: list[dict[str, Any]]) -> Images:
    """All images, class-major, compared with what the units' records say of them.

    Raises:
      UserError: an image is missing, damaged, or another one than recover wrote. It is set aside
        (all images of its unit, where only their common digest differs), and the unit is undone.
    """
    config = context.config
    ipc = config.recover.ipc
    try:
        images = context.hold(
            image_set.lazy_images(
                folder(context) / "images",
                config.dataset.num_classes,
                ipc,
                threads=config.dataset.threads,
            )
        )
        digests = []
        for unit in units(context):
            classes, slots = members(context, unit)
            digests.append(image_set.digest(images[classes * ipc + slots]))
    except image_set.DamagedFile as error:
        for unit in units(context):
            if error.path in _paths(context, unit):
                _forget(context, unit, [error.path])
        again = "Run the same command again to redo it; what was there is set aside."
        raise image_set.DamagedFile(error.path, error.problem, again) from error
    for unit, record, digest in zip(units(context), records, digests, strict=True):
        if digest != record["digest"]:
            paths = _paths(context, unit)
            _forget(context, unit, paths)
            raise UserError(
                f"the images {', '.join(map(str, paths))} are not those that recover wrote for "
                f"unit {unit.name}. Run the same command again to redo them; what was there is "
                f"set aside."
            )
    return images


def _paths(context: Context, unit: Unit) -> list[epath.Path]:
    root = folder(context) / "images"
    return [image_set.image_path(root, c, s) for c, s in zip(*members(context, unit), strict=True)]


def _forget(context: Context, unit: Unit, damaged: list[epath.Path]) -> None:
    """Set damaged images aside and forget that their unit is done."""
    context.acquire()
    (folder(context) / "manifest.json").unlink(missing_ok=True)
    _record(context, unit).unlink(missing_ok=True)
    for path in damaged:
        if path.exists():
            workdir.set_aside(path)
