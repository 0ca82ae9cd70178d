"""The plan of a run on a machine that is not here, from what its compiler says."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from prism_jax import programs, progress, rng, synthesis
from prism_jax.accelerators import compiling, targets
from prism_jax.accelerators.account import Cost
from prism_jax.accelerators.compiling import Found
from prism_jax.accelerators.targets import Target
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.analysis.words import size as size_of
from prism_jax.config import Experiment, batch_layout, budget_of, to_dict
from prism_jax.config.generation import SCHEDULES, sampling_of
from prism_jax.data import workdir
from prism_jax.data.pipeline import num_batches
from prism_jax.diffusion import samplers
from prism_jax.errors import UserError
from prism_jax.programs import shapes_of
from prism_jax.progress import hours_of
from prism_jax.stages import anchoring, generator, relabel, validate
from prism_jax.stages.context import Context
from prism_jax.stages.makers.optimise import recipe_of
from prism_jax.training import TESTED

FULL_REAL = "full_real"
TRIES = 3  # compilations that look for the largest batch
PATIENCE = 600.0  # seconds that they may take together; beyond it a proportion must do
SAMPLES = 64  # of slots and of iterations, in which draws are counted


# Programs that were compiled, and what was done to get each.
Known = dict[str, tuple[Found, str]]


class Stage(NamedTuple):
    """How long a part of a run takes: hours, None where they are not known; and in words."""

    hours: float | None
    said: str


def rows(e: Experiment, target: Target) -> dict[str, str]:
    """Lines of the plan: what squeeze, recover, relabel and validate would take.

    Raises:
      UserError: the compiler is not installed, or it ended or hung on a program.
    """
    _check_span(e, target)
    known: Known = {}
    found, generates = {"target": said_of(target)}, e.recover.maker == "generate"
    if generates or e.recover.iterations:
        done, note = _largest(e, target, known)
        batch = _painted_batch(e) if generates else _optimised_batch(e)
        found |= _compiled(done, note) | {"memory": _memory(e, target, done, batch)}
    all_stages = _teachers(e, target, known) | stages(e, target, known)
    return found | {name: stage.said for name, stage in all_stages.items()}


def stages(e: Experiment, target: Target, known: Known) -> dict[str, Stage]:
    """The same of each stage but squeeze, without its memory.

    Args:
      known: programs that were compiled already, of this experiment or another; it grows.

    Raises:
      UserError: as ``rows``.
    """
    _check_span(e, target)
    found = {}
    if e.recover.maker == "generate":
        found = _generate(e, target, known)
    elif e.recover.iterations:
        found = _recover(e, target, known)
    return found | _students(e, target, known)


def _check_span(e: Experiment, target: Target) -> None:
    """As a run would: a batch is shared by devices of one process.

    Raises:
      UserError: it has fewer.
    """
    for field, what in (("recover_devices", "an image batch"), ("train_devices", "a training")):
        if (span := getattr(e.parallel, field) or 1) > target.devices_of_a_host:
            raise UserError(
                f"parallel.{field} is {span}, and a host of {target.name} has "
                f"{target.devices_of_a_host}; at most so many can share {what}"
            )


def said_of(target: Target) -> str:
    """What a target is.

    Raises:
      UserError: its compiler is not installed.
    """
    if missing := targets.compiler_missing(target):
        raise UserError(missing)
    return (
        f"{target.name}: {target.devices} device(s) with "
        f"{_gigabytes(target.device.memory_bytes)} each; its compiler's word, nothing is run"
    )


def _teachers(e: Experiment, target: Target, known: Known) -> dict[str, Stage]:
    """Squeeze, of networks that are trained here."""
    found, size = {}, e.squeeze.batch_size
    trained = [name for name in e.squeeze.teachers if not e.network(name).checkpoint]
    images = _real_images(e) if trained else None
    for name in trained:
        network = f"squeeze/{name}"
        if images is None:
            done, note = _compile(e, target, network, known)
            each = _each(target, done, f"a step, on one host{note}")
            found[f"teacher {name}"] = Stage(None, f"not here to be counted; {each}")
            continue
        epochs = e.squeeze.epochs_over(images)
        steps = epochs * num_batches(images, size)
        stage = _training(e, target, network, "a step", steps, epochs, known)
        found[f"teacher {name} takes"] = stage
    return found


def _real_images(e: Experiment, split: str = "train") -> int | None:
    """Of a split; None without the data."""
    try:
        return len(shapes_of(e).inputs.open(split).labels_N)
    except UserError:
        return None


def _training(
    e: Experiment, target: Target, network: str, step: str, steps: float, tests: float, known: Known
) -> Stage:
    """So many steps of a network, and tests where the test images are there to be counted."""
    done, note = _compile(e, target, network, known)
    what, images = f"{step}, on one host{note}", _real_images(e, "test")
    if done.cost is None or images is None:
        trained = _stage(target, done, steps, what)
        return trained._replace(said=f"{trained.said}; without its tests")
    tested, note = _compile(e, target, f"{network}/test", known)
    if tested.cost is None:
        return Stage(None, f"tests: {_each(target, tested, '')}")
    each = seconds_of(tested.cost.mean({}), target)
    seconds = steps * seconds_of(done.cost.mean({}), target)
    seconds += tests * num_batches(images, TESTED) * each
    said = f"{_each(target, done, what)}; {1e3 * each:.3g} ms for {TESTED} images of a test{note}"
    said += _excess(target, tested)
    return _lasting(target, seconds / 3600, said)


def _students(e: Experiment, target: Target, known: Known) -> dict[str, Stage]:
    """Relabel and validate, of the synthetic set and of its controls."""
    found = {}
    images, v = e.recover.ipc * e.dataset.num_classes, e.validate
    if times := relabel.labelled_times(e):
        done, note = _compile(e, target, "relabel", known)
        what = f"a batch, all batches of a set {times:g} times{note}"
        found["relabel takes"] = _stage(target, done, _labellings(e, target), what)

    alike = [name for name in (SYNTHETIC, *v.controls) if name != FULL_REAL]
    trainings = len(v.seeds) * len(alike)
    everything = len(v.students) * len(v.seeds) * (1 + len(v.controls))
    busiest = math.ceil(everything / target.hosts) / everything  # hosts share them out
    steps = trainings * v.epochs * num_batches(images, min(v.batch_size, images))
    tests = trainings * math.ceil(v.epochs / v.eval_every)
    step, real = f"a step, {trainings} trainings", _real_images(e)
    if FULL_REAL in v.controls and real is not None:
        epochs = validate.epochs_of_size(e, real)
        steps += len(v.seeds) * epochs * num_batches(real, v.batch_size)
        tests += len(v.seeds) * math.ceil(epochs / v.eval_every)
        step += f" and {len(v.seeds)} of the full real set"
    elif FULL_REAL in v.controls:
        step += ", without those of the full real set, which is not here to be counted"
    for student in v.students:
        network, tested = f"validate/{student}", busiest * tests
        stage = _training(e, target, network, step, busiest * steps, tested, known)
        found[f"{student} takes"] = stage
    return found


def _labellings(e: Experiment, target: Target) -> float:
    """Batches that the busiest device labels, one after the other.

    Every process labels its own shards of every set, or online for its own trainings, a batch on
    each of its devices at a time; the last batch of an epoch is smaller, and goes by itself.
    """
    images = e.recover.ipc * e.dataset.num_classes
    plan = relabel.plan_for(shapes_of(e), images)
    full, rest = divmod(images, plan.batch_size)
    lanes = max(1, min(target.devices_of_a_host, plan.batches_per_epoch))
    epoch, times = math.ceil(full / lanes) + rest / plan.batch_size, relabel.labelled_times(e)
    if e.relabel.mode == "online":
        trainings = times * plan.epochs / e.validate.epochs
        return math.ceil(trainings / target.hosts) * e.validate.epochs * epoch
    epochs = math.ceil(plan.num_shards / target.hosts) * plan.epochs_per_shard
    return times * min(epochs, plan.epochs) * epoch


def shares(e: Experiment) -> dict[str, float]:
    """In which share of all iterations each teacher of recover's pool is read."""
    layout, recipe = batch_layout(e), recipe_of(e)
    pool = shapes_of(e).networks.pool(e.recover.pool)

    def drawn(slot, block, step):
        unit = synthesis.UnitBatch(slot, block, np.int32(1), np.zeros((), np.int32))
        key = rng.root(np.uint32(e.seed))
        draw = synthesis.draw_teachers(recipe, pool.teachers, key, unit, step)
        return (draw.logit_weights_T > 0) | (draw.statistic_weights_T > 0)

    count = layout.groups * layout.blocks
    units_N = np.unique(np.linspace(0, count - 1, min(count, SAMPLES)).astype(np.int32))
    slots_N, blocks_N = layout.slots * (units_N // layout.blocks), units_N % layout.blocks
    weights_N = np.array([budget_of(e, int(slot)) for slot in slots_N], np.float64)
    # One after the other, each teacher of a round as often as the others.
    rounds = max(1, SAMPLES // len(pool.names)) * len(pool.names)
    steps_M = 1 + np.arange(max(1, min(rounds, e.recover.iterations - 1)), dtype=np.int32)
    every = jax.jit(jax.vmap(jax.vmap(drawn, (None, None, 0)), (0, 0, None)))
    each_NT = np.asarray(every(slots_N, blocks_N, steps_M)).mean(1)
    means_T = np.average(each_NT, axis=0, weights=weights_N)
    return dict(zip(pool.names, map(float, means_T), strict=True))


def seconds_of(cost: Cost, target: Target) -> float:
    """What an iteration takes: a TPU's cycles by its clock; a GPU's least time."""
    clock = target.device.clock_hz
    return cost.cycles / clock if clock else cost.seconds


def capacity(target: Target) -> int:
    """Bytes of a device that a run may use."""
    return int(target.device.usable * target.device.memory_bytes)


def fits(done: Found, target: Target) -> bool:
    """Whether a program was compiled, and its memory is there."""
    return done.outcome == compiling.COMPILED and done.memory["total"] <= capacity(target)


# --- recover ----------------------------------------------------------------------------------


def _compiled(done: Found, note: str) -> dict[str, str]:
    if not done.cost:
        return {}
    return {
        "recover compiles": f"in {done.compile_seconds:.0f} s, lowered in "
        f"{done.lower_seconds:.0f} s{note}",
        "collectives": "; ".join(dict.fromkeys(done.collectives)) or "none",
    }


def _largest(e: Experiment, target: Target, known: Known) -> tuple[Found, str]:
    """Of recover's programs the one that takes most memory, or does not fit."""
    if e.recover.maker == "generate":
        names = ["recover", *["recover/refine"] * _refines(e)]
    else:
        names = [max(programs.phases(e), key=lambda phase: phase.pixels).name]
    found = [_compile(e, target, name, known) for name in names]
    return max(found, key=lambda one: one[0].memory.get("total", math.inf))


def _recover(e: Experiment, target: Target, known: Known) -> dict[str, Stage]:
    layout, phases, read = batch_layout(e), programs.phases(e), shares(e)
    found = [_compile(e, target, phase.name, known)[0] for phase in phases]
    parts = zip(found, phases, strict=True)
    costs = [done.cost.mean(read) * phase.share for done, phase in parts if done.cost]
    units = layout.groups * layout.blocks
    at_once = target.hosts * (target.devices_of_a_host // e.parallel.recover_devices)
    lanes = max(1, min(units, at_once))
    budgets = [budget_of(e, group * layout.slots) for group in range(layout.groups)]
    rounds = math.ceil(units / lanes) * sum(budgets) / len(budgets)
    what = f"an iteration, on {lanes * e.parallel.recover_devices} device(s)"
    if len(set(phases)) > 1:
        what = f"{what}, the mean over {len(phases)} phases"
    without = [done for done in found if not done.cost]
    cost = sum(costs, Cost())
    return {"recover takes": _stage(target, (without or found)[0], rounds, what, cost)}


def _refines(e: Experiment) -> bool:
    return bool(e.generate.refine.steps and e.generate.candidates > 1)


def _generate(e: Experiment, target: Target, known: Known) -> dict[str, Stage]:
    """What a generator takes: its training, latents of real images, images, those that test it."""
    g, context, layout = e.generate, shapes_of(e), batch_layout(e)
    found = {}
    if g.generator == "dit":
        done, note = _compile(e, target, "recover/generator", known)
        found["generator takes"] = _stage(target, done, g.fit.steps, f"a step, on one device{note}")
    if "latents" in anchoring.needed(context):
        done, note = _compile(e, target, "recover/latents", known)
        batches, size = _encoded(context)
        each = f"a batch of {size} real images on a device{note}"
        if batches is None:
            said = f"not here to be counted; {_each(target, done, each)}"
            found["latents"] = Stage(None, said)
        else:
            rounds = math.ceil(batches / target.devices)
            found["latents take"] = _stage(target, done, rounds, each)
    done, _ = _compile(e, target, "recover", known)
    batch, at_once = _painted_batch(e), anchoring.painted(context)
    images = e.recover.ipc * e.dataset.num_classes
    batches = math.ceil(images * g.candidates / at_once) * math.ceil(at_once / batch.size)
    each = f"a batch of {batch.size} images on each of {target.devices} device(s)"
    rounds = math.ceil(batches / target.devices)
    found["recover takes"] = _stage(target, done, rounds, each)
    if _refines(e):
        done, _ = _compile(e, target, "recover/refine", known)
        size = min(g.batch_size, layout.size)
        units = layout.groups * layout.blocks
        rounds = math.ceil(units * math.ceil(layout.size / size) / target.devices)
        each = f"a batch of {size} images on each of {target.devices} device(s)"
        found["refining takes"] = _stage(target, done, rounds, each)
    if g.generator == "dit":  # one process measures it
        count, there = generator.images_measured(e.dataset.num_classes), target.devices_of_a_host
        found |= _from_noise(e, target, known, "its quality", "takes", count / there)
    if "no_anchors" in e.validate.controls:
        name = "images without anchors"
        found |= _from_noise(e, target, known, name, "take", images / target.devices)
    return found


def _from_noise(
    e: Experiment, target: Target, known: Known, name: str, verb: str, images: float
) -> dict[str, Stage]:
    """So many images of a device from noise alone, in more steps than those that have anchors."""
    done, _ = _compile(e, target, "recover", known)
    batch, schedule = _painted_batch(e), SCHEDULES[e.generate.generator]
    free = dataclasses.replace(e.generate, strength=1.0, mode_weight=0.0)
    steps, own = (samplers.evaluations(sampling_of(g, schedule)) for g in (free, e.generate))
    if not own:
        said = "not counted: recover's program, at strength 0, has no steps to scale by"
        return {name: Stage(None, said)}
    each = f"a batch of {batch.size} images for as many steps as recover's"
    stage = _stage(target, done, images / batch.size * steps / own, each)
    return {f"{name} {verb}": stage}


def _encoded(context: Context) -> tuple[int | None, int]:
    """Batches of real images that become latents, None without the data; and images in one."""
    g, most = context.config.generate, programs.largest_class(context)
    size = anchoring.encoded_at_once(g, most)
    if most is None:
        return None, size
    counts_K = np.bincount(context.inputs.open("train").labels_N)
    counts_K = np.minimum(counts_K, g.most_images or most)
    return int(np.ceil(counts_K / size).sum()), size


def _optimised_batch(e: Experiment) -> Batch:
    return Batch("recover.batch_size", batch_layout(e).size, batch_sizes(e))


def _painted_batch(e: Experiment) -> Batch:
    at_once = anchoring.painted(shapes_of(e))
    size = min(e.generate.batch_size, at_once)
    return Batch("generate.batch_size", size, list(range(1, at_once + 1)))


# --- memory -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """The images that recover holds at once.

    Attributes:
      field: that states them.
      sizes: values that it may have, rising.
    """

    field: str
    size: int
    sizes: list[int]

    def of(self, e: Experiment, size: int) -> Experiment:
        """The experiment with another size."""
        section, name = self.field.split(".")
        changed = dataclasses.replace(getattr(e, section), **{name: size})
        return dataclasses.replace(e, **{section: changed})


def _memory(e: Experiment, target: Target, done: Found, batch: Batch) -> str:
    """What recover takes of a device's memory, and the largest batch that fits."""
    room = capacity(target)
    has = f"{size_of(room)} of a device" + " that JAX takes" * (target.device.usable < 1)
    needed = done.memory.get("total") or done.needed_bytes
    if fits(done, target):
        said = f"{size_of(done.memory['total'])} in recover of {has}"
    elif needed:
        said = f"{size_of(needed)} in recover: {size_of(needed - room)} more than {has}"
    else:
        said = f"more than {has}, and the compiler does not say by how much"
    largest, compiled = largest_batch(e, target, done, batch)
    if largest is None:
        return f"{said}; no smaller batch that was tried fits"
    how = "compiled" if compiled else "by proportion, not compiled"
    if largest == batch.size:
        return f"{said}; {batch.field}={largest} is the largest that fits ({how})"
    return f"{said}; {batch.field}={largest} would fit ({how})"


def batch_sizes(e: Experiment) -> list[int]:
    """The values of ``recover.batch_size`` that divide the set equally, rising."""
    layout = batch_layout(e)
    sizes = [layout.slots * c for c in range(1, layout.total + 1) if layout.total % c == 0]
    return [size for size in sizes if size % e.parallel.recover_devices == 0]


def largest_batch(
    e: Experiment, target: Target, done: Found, batch: Batch
) -> tuple[int | None, bool]:
    """The largest batch that fits, and whether it was compiled, by at most ``TRIES`` compilations.

    Args:
      done: what became of the batch as it is.

    Returns:
      None for the batch where none was found that fits.
    """
    size, room = batch.size, capacity(target)
    good, bad = (size, None) if fits(done, target) else (None, size)
    weights = done.memory.get("arguments", 0)
    totals = {}
    for _ in range(TRIES):
        left = [s for s in batch.sizes if s > (good or 0) and s < (bad or math.inf)]
        total = done.memory.get("total") or done.needed_bytes
        if total:
            totals[size] = total
        hopeful = [s for s in left if _expected(totals, weights, s) <= room]
        if good is not None and not hopeful or not left:
            break
        guess = max(hopeful) if hopeful else left[len(left) // 2 if total is None else 0]
        if TRIES * (done.lower_seconds + done.compile_seconds) > PATIENCE:
            return guess, False
        size = guess
        done, _ = _largest(batch.of(e, size), target, {})
        good, bad = (size, bad) if fits(done, target) else (good, size)
    return good, True


def _expected(totals: dict[int, int], weights: int, size: int) -> float:
    """Bytes of a batch by those of others: in proportion beside the weights, or on a line."""
    if not totals:
        return math.inf
    (last, total), *before = reversed(totals.items())
    other, smaller = before[0] if before else (0, weights)
    return total + (total - smaller) / (last - other) * (size - last)


# --- small parts ------------------------------------------------------------------------------


def _compile(
    e: Experiment, target: Target, program: str, known: Known | None = None
) -> tuple[Found, str]:
    """A program, compiled or out of memory, and what was done to get it.

    Raises:
      UserError: it is neither.
    """
    key = _key(e, target, program) if known is not None else ""
    if known and key in known:
        return known[key]
    progress.say(f"compiling {program} for {target.name}")
    done, note = compiling.compile_around(e, target, program), ""
    if done.around:
        note = f", with {done.around}: without a device XLA does not tile one of its products"
    if done.outcome in (compiling.COMPILED, compiling.MEMORY):
        if known is not None:
            known[key] = done, note
        return done, note
    raise UserError(f"the compiler for {target.name} {done.outcome} on {program}: {done.line}")


def _key(e: Experiment, target: Target, program: str) -> str:
    """What decides a program: experiments that agree in it share its compilation."""
    stage, *named = program.split("/")
    network = named[0] if named else ""  # validate/NAME/test is NAME's too
    networks, sections = {
        "squeeze": ({network: e.network(network)}, ("squeeze",)),
        "recover": ({t: e.network(t) for t in e.recover.pool}, ("recover", "generate")),
        "relabel": ({t: e.network(t) for t in e.relabel.teachers}, ("relabel",)),
        "validate": ({network: e.network(network).untrained()}, ("relabel", "validate")),
    }[stage]
    fields, several = to_dict(e), ("seeds", "students", "controls")  # have programs of their own
    return workdir.digest(
        {
            "program": [
                target.name,
                program,
                e.recover.ipc,
                e.label_parts,
                fields["dataset"],
                fields["parallel"],
            ],
            "networks": {name: dataclasses.asdict(network) for name, network in networks.items()},
            **{
                section: {k: v for k, v in fields[section].items() if k not in several}
                for section in sections
            },
        }
    )


def _stage(target: Target, done: Found, times: float, what: str, cost: Cost | None = None) -> Stage:
    """How long something takes that is done so many times."""
    said = _each(target, done, what, cost)
    if done.cost is None:
        return Stage(None, said)
    hours = times * seconds_of(cost or done.cost.mean({}), target) / 3600
    return _lasting(target, hours, said)


def _lasting(target: Target, hours: float, said: str) -> Stage:
    bound = "about" if target.device.clock_hz else "at least"
    return Stage(hours, f"{bound} {hours_of(hours)}: {said}")


def _each(target: Target, done: Found, what: str, cost: Cost | None = None) -> str:
    """How long it takes once, and by what."""
    if done.cost is None:
        return f"unknown: the program does not fit ({done.line})"
    cost = cost or done.cost.mean({})
    if target.device.clock_hz:
        said = f"{cost.cycles / 1e6:.1f} M cycles by the compiler's estimate"
    else:
        said = f"{cost.bytes / 1e9:.2f} GB, {cost.flops / 1e12:.2f} TFLOP, {cost.launches:.0f}"
        said = f"{said} launches: a lower bound"
    return f"{1e3 * seconds_of(cost, target):.3g} ms {what} ({said}){_excess(target, done)}"


def _excess(target: Target, done: Found) -> str:
    """What a program takes that is not there, which a GPU's compiler does not mind."""
    if fits(done, target):
        return ""
    more = done.memory["total"] - capacity(target)
    return f"; it does not fit: {size_of(more)} more than a device has for it"


def _gigabytes(count: int) -> str:
    return f"{count / (1 << 30):.0f} GiB"
