"""The plan of a run: what it makes, what it needs, and what it would cost on this machine."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.table import Table

from prism_jax import environment, parallel, programs, progress, synthesis, training
from prism_jax.accelerators.targets import Target
from prism_jax.analysis.words import size as size_of
from prism_jax.config import SOFT_CONTROLS, Dtype, Experiment, Layout, batch_layout, budget_of
from prism_jax.config.generation import SCHEDULES, fitting_of, sampling_of
from prism_jax.config.layout import LEAST_IMAGES
from prism_jax.config.rules.recover import one_draw
from prism_jax.data.sources import info_of, open_source
from prism_jax.data.weights import RECORD
from prism_jax.diffusion import fit, samplers
from prism_jax.errors import UserError
from prism_jax.labelling import Labeller
from prism_jax.progress import hours_of
from prism_jax.stages import anchoring, generator, guiding, relabel, statistics
from prism_jax.stages.context import Context
from prism_jax.stages.generator import Painter, Wish
from prism_jax.stages.inputs import Inputs
from prism_jax.stages.makers import maker_of, optimise
from prism_jax.teachers import TeacherPool, describe

DISPATCHES = 3
PNG_BYTES = 100  # at most, beside pixels and a byte a row
DRAWS = 4  # of teachers, in which an iteration of recover is timed


def check(experiment: Experiment) -> None:
    """Refuse what neither data nor weights are needed to know.

    Raises:
      UserError: a teacher does not read the images.
    """
    context = Context(experiment, "unused")
    context.networks.check()
    maker_of(experiment).check(context)


def missing(experiment: Experiment, workdir: str) -> list[str]:
    """What a run needs and does not find: images, and weights that are not squeezed yet."""
    dataset = experiment.dataset
    absent: dict[str, list[str]] = {}
    for split in ("train", "test"):
        try:
            open_source(
                name=dataset.name,
                source=dataset.source,
                path=dataset.path,
                split=split,
                image_size=dataset.image_size,
            )
        except UserError as error:
            absent.setdefault(str(error), []).append(split)
    lines = [f"images ({', '.join(splits)}): {error}" for error, splits in absent.items()]
    if not absent:
        lines += _unknown_outputs(Context(experiment, workdir))
    if experiment.recover.initialise == "folder":
        try:
            Inputs(experiment).start  # noqa: B018
        except UserError as error:
            if not any(str(error) in line for line in lines):
                lines.append(f"images to start from: {error}")
    return list(dict.fromkeys([*lines, *missing_weights(experiment, workdir)]))


def missing_weights(experiment: Experiment, workdir: str) -> list[str]:
    """What is imported and not there, of teachers and of the generator."""
    lines, context = [], Context(experiment, workdir)
    for name in experiment.squeeze.teachers:
        network = experiment.network(name)
        path = network.weights
        field = "checkpoint" if network.checkpoint else "start_from"
        if (context.networks.folder(name) / RECORD).exists():
            continue
        if path and not epath.Path(path).exists():
            known = " (published under this name)" if epath.Path(path).suffix else ""
            lines.append(
                f"teacher {name}: the weights {path}{known}, or others of it with "
                f"--config.networks.{name}.{field}=FILE"
            )
    if generator.wanted(context):
        lines += [f"generator: {line}" for line in generator.missing(context)]
    if guiding.wanted(context):
        lines += [f"CLIP: {line}" for line in guiding.missing(context)]
    return list(dict.fromkeys(lines))


def _unknown_outputs(context: Context) -> list[str]:
    """Teachers of which it is not known which of their outputs are the classes."""
    lines = []
    for name in context.config.squeeze.teachers:
        try:
            context.networks.class_indices(name)
        except UserError as error:
            lines.append(f"teacher {name}: {error}")
    return lines


def show(
    experiment: Experiment, workdir: str, *, measure: bool, target: Target | None = None
) -> None:
    """Print the plan; with ``measure`` also hours and memory, from a few dispatches.

    The dispatches run on random weights and images of the right shapes: no data and no teachers
    are needed, and nothing is written. With a target its compiler is asked in their place.
    """
    from prism_jax.accelerators import forecast

    check(experiment)
    layout = batch_layout(experiment)
    recover, labelling = experiment.recover, experiment.relabel
    images = recover.ipc * experiment.dataset.num_classes
    iterations = layout.blocks * sum(
        budget_of(experiment, group * layout.slots) for group in range(layout.groups)
    )
    dataset = experiment.dataset
    side, channels = dataset.image_size, info_of(dataset.name, dataset.path).channels
    sets = 1 + sum(name in SOFT_CONTROLS for name in experiment.validate.controls)
    image_bytes = sets * images * (side * (side * channels + 1) + PNG_BYTES)
    labels = relabel.plan_for(programs.shapes_of(experiment), images)
    times, online = relabel.labelled_times(experiment), labelling.mode == "online"
    label_bytes = 0 if online else int(times) * labels.stored_bytes
    labels_said = "no soft labels: validate.loss is ce"
    if times:
        batches = labelling.epochs * labels.batches_per_epoch
        labels_said = (
            f"{labelling.epochs} epochs, {batches:,} batches by {', '.join(labelling.teachers)}"
            + (", while every student trains" if online else f", of {times:g} set(s)")
        )
        if (read := experiment.validate.epochs) < labelling.epochs and not online:
            labels_said += f"; students read {read} of the epochs (validate.epochs)"
    if labelling.labels_from and experiment.soft_labels:
        others = f"; of controls {labels_said}" if times else ""
        labels_said = f"read from {labelling.labels_from}{others}"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="dim")
    rows = {
        "experiment": f"{experiment.name} (preset {experiment.preset}), in {workdir}",
        "images": f"{images:,} ({recover.ipc} per class, {experiment.dataset.num_classes} classes, "
        f"{side} px)",
        **_held_out(experiment),
        "pool": ", ".join(
            f"{name} (primary)" if name == recover.primary else name for name in recover.pool
        )
        or "none",
        "recover": f"{layout.groups * layout.blocks:,} units of "
        f"{' or '.join(map(str, layout.sizes))} images, {iterations:,} iterations in all"
        f"{_few(experiment, layout)}{_one_draw(experiment, layout)}",
        **_optimisation(experiment),
        **_generation(experiment),
        **_statistics(experiment),
        "relabel": labels_said,
        "validate": f"{len(experiment.validate.students)} students x "
        f"{len(experiment.validate.seeds)} seeds x {1 + len(experiment.validate.controls)} sets",
        "disk": f"at most {size_of(image_bytes)} of images, {size_of(label_bytes)} of soft labels"
        + "; latents and anchors are not counted" * (recover.maker == "generate"),
    }
    if target:
        rows |= forecast.rows(experiment, target)
    elif measure:
        rows |= _measured(experiment, layout.size, iterations)
    for name, value in rows.items():
        table.add_row(name, value)
    progress.say(table)


def _optimisation(e: Experiment) -> dict[str, str]:
    """What is optimised and what guides it, where that is not pixels and teachers alone."""
    rows, size = {}, e.dataset.image_size
    if e.recover.parametrisation == "pyramid":
        sides = synthesis.resolutions_of(e.recover.resolutions, size)
        times = sum(side**2 for side in sides) / size**2
        rows["pyramid"] = (
            f"components of {', '.join(map(str, sides))} px; the optimiser's moments take "
            f"{times:.2f} times those of pixels"
        )
    if e.recover.clip:
        rows["clip"] = f"weight {e.recover.clip:g}, read from {e.recover.clip_directory}"
    return rows


def _generation(e: Experiment) -> dict[str, str]:
    """What is trained, encoded and evaluated where images are generated."""
    if e.recover.maker != "generate":
        return {}
    g, images = e.generate, e.recover.ipc * e.dataset.num_classes
    sampling = sampling_of(g, SCHEDULES[g.generator])
    steps, evaluations = samplers.begun(sampling), samplers.evaluations(sampling)
    evaluated = evaluations * (1 if g.guidance == 1 else 2) * g.candidates * images
    rows = {
        "generator": f"{g.generator}, read from {g.directory}"
        if g.directory
        else f"trained: {g.fit.steps:,} steps of {g.fit.batch_size} images",
        "generate": f"{g.candidates * images:,} images of {steps} steps by {g.sampler}, "
        f"{evaluated:,} evaluations in all, in batches of at most {g.batch_size}",
    }
    if g.refine.steps:
        rows["refine"] = (
            f"{g.refine.steps} steps for each of {images:,} images, with as many gradients of the "
            f"generator"
        )
    if g.anchors != "none":
        of = f"at most {g.most_images:,} images a class" if g.most_images else "all images"
        rows["anchors"] = f"{images:,} by {g.anchors}, among the latents of {of}"
    return rows


def _statistics(e: Experiment) -> dict[str, str]:
    """Passes of teachers over the real images: to match, to choose or to rank them."""
    of: dict[str, list[str]] = {}
    for teacher, kind in statistics.needed(e):
        of.setdefault(kind, []).append(teacher)
    passes = [f"{kind} by {', '.join(teachers)}" for kind, teachers in of.items()]
    count = len(statistics.needed(e))
    said = "a pass" if count == 1 else f"{count} passes"
    return {"statistics": f"{said} over the real images: {'; '.join(passes)}"} if of else {}


def _held_out(e: Experiment) -> dict[str, str]:
    share = e.dataset.held_out
    return {"held out": f"{share:.4g} of every class' training images"} if share else {}


def _few(e: Experiment, layout: Layout) -> str:
    """What is to be said of batches that are too small for statistics."""
    if min(layout.sizes) >= LEAST_IMAGES or not (e.recover.iterations and e.recover.alpha_bn):
        return ""
    return (
        f"; statistics of {min(layout.sizes)} image(s) say little: put {LEAST_IMAGES} or more in a "
        f"batch (recover.batch_size, recover.slots_per_batch)"
    )


def _one_draw(e: Experiment, layout: Layout) -> str:
    said = one_draw(e, layout)
    return f"; {said}" if said else ""


def _measured(e: Experiment, batch: int, iterations: int) -> dict[str, str]:
    """Hours of recover and relabel on this machine, and recover's memory; of a generator's fit."""
    rows = _measured_recover(e, batch, iterations) if iterations else {}
    if e.recover.maker == "generate":
        rows = _measured_images(e)
        if e.generate.generator == "dit":
            rows |= _measured_fit(e)
    times = relabel.labelled_times(e)
    if not times:
        return rows
    labels = relabel.plan_for(programs.shapes_of(e), e.recover.ipc * e.dataset.num_classes)
    lanes = _timed_lanes(labels.batches_per_epoch)
    per_batch = _time_labels(e, labels.batch_size, lanes) / len(lanes)
    rounds = math.ceil(labels.batches_per_epoch / len(jax.local_devices()))
    hours = times * labels.epochs * rounds * per_batch / 3600
    said = (
        f"about {hours_of(hours)}: {per_batch:.3g} s a batch, all batches of a set {times:g} times"
    )
    return rows | {"relabel takes": said}


def _measured_fit(e: Experiment) -> dict[str, str]:
    """Hours of a generator's training."""
    context, fitting = programs.shapes_of(e), fitting_of(e.generate)
    opened = generator.described(context)
    module: Any = opened.generator.denoiser
    shape = opened.latent_shape
    state = fit.initial_state(module, fitting, 0, shape)
    step = fit.jitted_step(fitting, module)
    latents = np.zeros((fitting.batch_size, *shape), np.float32)
    labels = np.zeros(fitting.batch_size, np.int32)

    def train() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(step(np.uint32(0), state, latents, labels))

    seconds = _time(train)
    return {
        "generator takes": f"about {hours_of(fitting.steps * seconds / 3600)} on one device: "
        f"{seconds:.3g} s a step"
    }


def _timed_lanes(batches: int, span: int = 1) -> list[jax.Device]:
    """The devices of one lane, which stands for all of them, or the lanes of one CPU together."""
    here = jax.local_devices()
    return parallel.lane_devices(batches) if len(here) == span == 1 else here[:span]


def recover_bytes(e: Experiment) -> int | None:
    """What one image batch takes on a device in recover, as compiled; None without a program."""
    if not e.recover.iterations and e.recover.maker != "generate":
        return None
    one = dataclasses.replace(e, parallel=dataclasses.replace(e.parallel, recover_devices=1))
    with parallel.described(jax.local_devices()[:1]):
        return _total(programs.find(one, "recover").lower().compile().memory_analysis())


def _measured_recover(e: Experiment, batch: int, iterations: int) -> dict[str, str]:
    """Hours and the peak memory of recover."""
    layout, span = batch_layout(e), e.parallel.recover_devices
    units = layout.groups * layout.blocks
    devices = _timed_lanes(units, span)
    if len(devices) < span:
        return {
            "recover takes": f"not known here: parallel.recover_devices={span} share a batch, and "
            f"this machine has {len(devices)} device(s)"
        }
    context = Context(e, "unused")
    pool = programs.with_blank_statistics(context, _random_pool(e, e.recover.pool, e.recover.dtype))
    recipe = optimise.recipe_of(e)
    guide = _random_guide(context)
    engine = synthesis.engine(
        pool, recipe, devices=devices, how=e.parallel.map, span=span, guide=guide
    )
    available = _memory(devices[0])
    rows, size, least = {}, batch, math.lcm(recipe.slots, span)
    while True:
        lanes = [_random_lane(e, engine, pool, recipe, size)] * len(engine)
        analysis = engine.compile(0, lanes).memory_analysis()
        peak = _total(analysis, parallel.lanes_at_once(analysis, len(engine)))
        if peak is None or available is None or peak <= 0.8 * available or size == least:
            break
        size = max(least, size // 2 // least * least)
    seconds = _time_draws(e, engine, pool, recipe, size) * batch / size * _mean_images(e)
    at_once = max(1, min(units, len(jax.local_devices()) // span))
    hours = iterations / units * math.ceil(units / at_once) * seconds / 3600
    note = f", measured with {size} images a batch and scaled" if size != batch else ""
    rows["recover takes"] = (
        f"about {hours_of(hours)} on {at_once * span} device(s): {seconds:.3g} s an iteration{note}"
    )
    if peak is not None:
        scaled = peak * batch / size
        rows["memory"] = f"about {size_of(scaled)} a device in recover"
        if available is not None and scaled > available:
            rows["memory"] += f"; this machine has {size_of(available)}: lower recover.batch_size"
    return rows


def _measured_images(e: Experiment) -> dict[str, str]:
    """Hours and memory of a generator's images, from a decoding and the shortest sampling."""
    context, device = programs.shapes_of(e), jax.local_devices()[0]
    opened, at_once = generator.described(context), anchoring.painted(context)
    size = batch = min(e.generate.batch_size, at_once)
    if device.platform == "cpu" and e.generate.generator != "dit":
        size = 1  # a large network is as fast for each of several
    weights = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), opened.weights)
    few = dataclasses.replace(opened.sampling, steps=2, strength=1.0, terms=())
    wish = Wish(*(np.zeros(size, np.int32) for _ in range(2)))

    def seconds_of(sampling: samplers.Sampling) -> float:
        made = opened._replace(weights=weights, sampling=sampling, refining=None)
        painter = Painter(context, made, size)
        return _time(lambda: list(painter.paint([wish]))) / size

    decoded = seconds_of(dataclasses.replace(few, strength=0.0))
    asked = (seconds_of(few) - decoded) / samplers.evaluations(few)
    each = decoded + max(asked, 0.0) * samplers.evaluations(opened.sampling)
    wanted = e.recover.ipc * e.dataset.num_classes * e.generate.candidates
    images = math.ceil(wanted / at_once) * math.ceil(at_once / batch) * batch  # places, empty too
    devices = len(jax.local_devices())
    rows = {
        "recover takes": f"about {hours_of(images * each / devices / 3600)} on {devices} device(s):"
        f" {each:.3g} s an image, {decoded:.2g} s of it decoding; measured with {size} at once"
    }
    needed = anchoring.needed(context)
    apart = {
        "encoding real images": "latents" in needed,
        "refining": bool(e.generate.refine.steps),
        "the images of controls": bool(anchoring.controls_of(context)),
    }
    if left := [name for name, there in apart.items() if there]:
        rows["recover takes"] += f". Not in it: {', '.join(left)} (--target counts them)"
    if peak := recover_bytes(e):
        available = _memory(device)
        rows["memory"] = f"about {size_of(peak)} a device in recover, {batch} images at once"
        if available is not None and peak > available:
            rows["memory"] += f"; this machine has {size_of(available)}: lower generate.batch_size"
    return rows


def _random_pool(e: Experiment, names: tuple[str, ...], dtype: Dtype) -> TeacherPool:
    """Teachers with random weights."""
    context = programs.shapes_of(e)
    teachers, variables = [], []
    for name in names:
        module = context.networks.build(name, dtype=dtype)
        indices = context.networks.class_indices(name)
        teachers.append(describe(name, module, context.inputs.image_shape, class_indices=indices))
        image = np.zeros((1, *context.inputs.image_shape), np.float32)
        drawn = training.jitted_init(module)(jax.random.key(0), image)
        variables.append({"batch_stats": {}, **drawn})
    return TeacherPool(tuple(teachers), tuple(variables), context.inputs.normalisation)


def _random_guide(context: Context) -> synthesis.Guide | None:
    """What guides recover, with random weights."""
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda x: draw(x.shape, np.float32), guiding.described(context))


def _mean_images(e: Experiment) -> float:
    """Pixels of an iteration's images in those of the whole batch: phases may have fewer."""
    phases, side = programs.phases(e), e.dataset.image_size
    pixels = sum(phase.share * phase.pixels for phase in phases)
    return pixels / (batch_layout(e).size * side**2)


def _time_draws(e: Experiment, engine: synthesis.Engine, pool, recipe, size: int) -> float:
    """Mean seconds of an iteration over some draws of teachers; lanes of a CPU share them.

    The first two dispatches compile and warm up. A device is given as many iterations as a run
    gives it: one alone would be counted with the way to it and back. A CPU is given as many of them
    as take a second.
    """
    layout, seconds = batch_layout(e), list[float]()
    most, on_cpu = e.recover.steps_per_dispatch, parallel.on_cpu()
    count = 1 if on_cpu else most
    for draw in range(2 + DRAWS):
        if draw == 2 and on_cpu:
            count = max(1, min(most, int(1 / seconds[-1] / len(engine))))
        slot = draw % layout.groups * layout.slots
        lanes = [
            _random_lane(e, engine, pool, recipe, size, slot=slot, step=1 + draw, count=count)
            for _ in range(len(engine))
        ]
        began = time.monotonic()
        jax.block_until_ready(engine(e.seed, lanes))
        seconds.append((time.monotonic() - began) / count / len(lanes))
    return float(np.mean(seconds[2:]))


def _random_lane(
    e: Experiment,
    engine: synthesis.Engine,
    pool,
    recipe,
    size: int,
    *,
    slot: int = 0,
    step: int = 1,
    count: int = 1,
) -> tuple:
    shape = Inputs(e).image_shape
    images = np.random.default_rng(0).standard_normal((size, *shape), np.float32)
    labels = np.arange(size, dtype=np.int32) % e.dataset.num_classes
    # In the middle of a unit: a step at its ends reads every teacher.
    state = synthesis.initial_state(pool, recipe, images)._replace(step=np.int32(step))
    unit = synthesis.UnitBatch(np.int32(slot), np.int32(0), np.int32(1000), labels)
    if recipe.perturb_rho:
        unit = unit._replace(weights=pool.variables[recipe.primary]["params"])
    trees = jax.device_get((unit, state)) + (np.int32(count),)
    return jax.block_until_ready(tuple(engine.place(tree, 0) for tree in trees))


def _time(function) -> float:
    """Seconds of the last of three calls."""
    for _ in range(DISPATCHES):
        began = time.monotonic()
        function()
        seconds = time.monotonic() - began
    return seconds


def _time_labels(e: Experiment, size: int, lanes: list[jax.Device]) -> float:
    """Seconds of a batch on each lane."""
    pool = _random_pool(e, e.relabel.teachers, e.relabel.dtype)
    labeller = Labeller(pool, relabel.recipe_of(e, size), devices=lanes)
    shape = Inputs(e).image_shape
    images = np.random.default_rng(0).integers(0, 256, (len(lanes) * size, *shape), np.uint8)
    return _time(lambda: list(labeller.epoch(images, 0, seed=0)))


def _total(analysis: Any, at_once: int = 1) -> int | None:
    """Arguments of a compiled program, outputs and temporaries of each that runs, in bytes."""
    if analysis is None:
        return None
    each = analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return analysis.argument_size_in_bytes - analysis.alias_size_in_bytes + at_once * each


def _memory(device: jax.Device) -> int | None:
    """Bytes of memory that a device has."""
    if device.platform == "cpu":
        return environment.memory()
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit")
