"""Every method through the recover stage: resumed, on any devices, the same bits."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from helpers.command import TINY, call, reference
from helpers.compiling import as_users, only_fast_alike
from PIL import Image

from prism_jax import parallel, pipeline, synthesis
from prism_jax.config import resolve, units
from prism_jax.core import pixels
from prism_jax.data import image_set, workdir
from prism_jax.data.metrics import read_lines
from prism_jax.errors import UserError
from prism_jax.main import parse
from prism_jax.stages import controls, fingerprints, recover, squeeze, statistics
from prism_jax.stages.context import Context
from prism_jax.stages.coordination import Interrupted
from prism_jax.stages.makers import optimise
from prism_jax.stages.makers.optimise import Ahead
from prism_jax.stages.makers.start import initial_images, retrieved_images
from prism_jax.synthesis import measuring
from prism_jax.synthesis import start as synthesis_start

__all__ = ["as_users", "only_fast_alike", "reference"]  # fixtures
# Both sides of a comparison are made in this process.
pytestmark = pytest.mark.usefixtures("only_fast_alike")

CLASS_MAJOR = ("batch_order=class_major", "batch_size=4")
STATISTICS = ("match=bn,conv,patch", "statistic_patch=4")
METHODS = {
    "sre2l": ("initialise=noise",),
    "cda": ("crop_curriculum=cosine", "crop_milestone=0.5"),
    "dwa": ("perturb_rho=0.1", "perturb_steps=2", "variance_weight=2.0",
            "initialise=real_squashed"),
    "dwa as released": ("perturb_rho=0.1", "perturb_steps=2", "perturb_probes=True",
                        "perturb_accumulates=True"),
    "gvbsm": (*STATISTICS, *CLASS_MAJOR, "ema=0.4", "drop=0.4", "densification=1.0",
              "first_layer=conv"),
    "edc": (*STATISTICS, *CLASS_MAJOR, "ema=0.8", "class_share=0.5", "flatness=0.5",
            "initialise=mosaic_shuffled", "roll=0", "crop_min=0.5"),
    "delt": ("budget=early_late", "rounds=2", *CLASS_MAJOR, "initialise=real_median",
             "crop_curriculum=cosine"),
    "fadrm": ("phase_sizes=(8,8,8)", "inject=0.5", "initialise=mosaic", "patch_factor=1",
              "patch_choice=median", "round_robin_restarts=True"),
    "fadrm retrieved": ("phase_sizes=(8,8,8)", "inject=0.5", "initialise=real_balanced",
                        "inject_from=retrieved", "round_robin_restarts=True"),
    "psm": ("targets=groups", "initialise=real_group_hardest", "phase_sizes=(8,8,8)", "inject=0.5",
            "round_robin_restarts=True"),
    "cvdd": ("committee=listed", "priors=(60.0,50.0)", "jpeg_quality=75"),
    "rded": ("iterations=0", "initialise=mosaic"),
}  # fmt: skip


def context_of(root, name, *more, controls=None) -> Context:
    """A method's tiny experiment in a folder; dispatches of 2 iterations, so that phases end."""
    fields = (f"method={name.split()[0]}", "steps_per_dispatch=2", *METHODS[name], *more)
    problems: list[str] = []
    flags = [f"--config.recover.{f}" for f in fields]
    if controls is not None:
        flags.append(f"--config.validate.controls={controls}")
    config, _ = parse([TINY, *flags], problems)
    return Context(resolve(config, problems), root)


def prepare(context: Context, reference) -> None:
    """The reference's teachers, and the statistics that the method needs."""
    pipeline.adopt(context, reference)
    assert not squeeze.pending(context)
    if not statistics.is_done(context):
        statistics.run(context)


def images_of(context: Context) -> np.ndarray:
    config = context.config
    return image_set.read_images(
        recover.folder(context) / "images", config.dataset.num_classes, config.recover.ipc
    )[0]


def stopping_after(dispatches: int, context: Context, monkeypatch) -> None:
    """Ask a run to stop after so many dispatches."""
    dispatch, count = optimise._dispatch, iter(range(dispatches, -1, -1))

    def counted(*arguments):
        if next(count, 0) <= 1:
            context.stop.signum = signal.SIGTERM
        return dispatch(*arguments)

    monkeypatch.setattr(optimise, "_dispatch", counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, reference):
    """A method's run without interruption, on one device: made once for all tests."""

    @functools.cache
    def run(name):
        context = context_of(tmp_path_factory.mktemp("whole") / "run", name)
        prepare(context, reference)
        devices = parallel.lane_devices
        parallel.lane_devices = lambda limit, span: devices(1)
        try:
            recover.run(context)
        finally:
            parallel.lane_devices = devices
        context.work.lock.release()
        return images_of(context)

    return run


def test_every_method_that_optimises_is_among_them():
    generated = {"d4m", "mgd3", "ddoq", "cao2"}
    others = {*synthesis.METHODS} - {name.split()[0] for name in METHODS}
    assert others == {"prism", *generated}, "METHODS of this file: a small recipe of each"


SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("sre2l", "cda", "cvdd", "edc", "dwa", "dwa as released", "fadrm retrieved")
]


@pytest.mark.parametrize("name", ["gvbsm", "delt", "fadrm", "psm", *SLOW])
def test_stopped_and_continued_on_other_devices_is_the_same(
    name, whole, reference, tmp_path, monkeypatch
):
    assert jax.device_count() == 8
    context = context_of(tmp_path / "run", name)
    prepare(context, reference)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(4, context, patch)
        recover.run(context)
    context.work.lock.release()
    going = sorted(p.name for p in (tmp_path / "run/recover/checkpoints").iterdir())
    assert going == [unit.name for unit in units(context.config)][: len(going)] and going

    again = context_of(tmp_path / "run", name)
    starts = []
    place = optimise._start

    def noting(*arguments):
        lane = place(*arguments)
        starts.append(lane.done)
        return lane

    monkeypatch.setattr(optimise, "_start", noting)
    recover.run(again)
    again.work.lock.release()
    assert max(starts) == 8
    np.testing.assert_array_equal(images_of(again), whole(name))


@pytest.mark.parametrize("ahead", [0, 2])
def test_units_are_begun_in_order_and_no_further_ahead_than_asked(ahead):
    begun, threads, failing = [], set(), 5

    def make(unit):
        begun.append(unit)
        threads.add(threading.current_thread().name)
        if unit == failing:
            raise Interrupted(signal.SIGTERM)
        return -unit

    with contextlib.closing(optimise.Ahead(make, range(7), ahead)) as queue:
        assert queue.next() == (0, 0) and len(queue) == 6
        queue._thread and queue._thread.submit(str).result()  # what was asked for is made
        assert begun == [*range(1 + ahead)]
        assert [queue.next() for _ in range(4)] == [(i, -i) for i in range(1, 5)]
        with pytest.raises(Interrupted):  # of its own unit, not before
            queue.next()
        assert len(queue) == 1
    assert {name.startswith("units") for name in threads} == {bool(ahead)}


def test_what_has_no_memory_beside_the_devices_work_is_made_without_it():
    threads = []

    def make(unit):
        threads.append(threading.current_thread().name)
        if threads[-1].startswith("units"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return unit

    with contextlib.closing(optimise.Ahead(make, [3], 1)) as queue:
        assert queue.next() == (3, 3)
    assert len(threads) == 2


def test_units_made_ahead_are_the_same(whole, reference, tmp_path, monkeypatch):
    context, made = context_of(tmp_path / "run", "delt"), []
    prepare(context, reference)
    monkeypatch.setattr(optimise, "Ahead", lambda make, waiting, _: made.append(1) or
                        Ahead(make, waiting, 2))  # fmt: skip
    recover.run(context)
    context.work.lock.release()
    assert made
    np.testing.assert_array_equal(images_of(context), whole("delt"))


def test_lanes_in_different_phases_run_apart(whole, reference, tmp_path, monkeypatch):
    context = context_of(tmp_path / "run", "delt")
    prepare(context, reference)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(4, context, patch)
        recover.run(context)
    context.work.lock.release()
    first = next((tmp_path / "run/recover/checkpoints").iterdir())
    for step in first.iterdir():
        step.rename(step.parent / f".{step.name}")  # one unit begins anew, the other goes on

    again, shapes = context_of(tmp_path / "run", "delt"), []
    dispatch = optimise._dispatch

    def noting(context, engine, lanes, *given):
        shapes.append({lane.shape for lane in lanes if lane})
        return dispatch(context, engine, lanes, *given)

    monkeypatch.setattr(optimise, "_dispatch", noting)
    recover.run(again)
    again.work.lock.release()
    assert {(2, 8), (4, 8)} in shapes
    np.testing.assert_array_equal(images_of(again), whole("delt"))


def test_kept_images_change_nothing_and_come_again(whole, reference, tmp_path, monkeypatch, capsys):
    kept = ("keep_at=(3,12)", "steps_per_dispatch=5")
    context = context_of(tmp_path / "run", "fadrm", *kept)
    assert fingerprints.recover(context) == fingerprints.recover(context_of(tmp_path, "fadrm"))
    prepare(context, reference)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(4, context, patch)
        recover.run(context)
    context.work.lock.release()
    root = recover.folder(context)
    first = image_set.read_images(optimise.kept_folder(root, 3), 4, 1)[0]
    for name in ("checkpoints", "kept"):
        shutil.rmtree(root / name)  # every unit begins anew

    again = context_of(tmp_path / "run", "fadrm", *kept)
    recover.run(again)
    again.work.lock.release()
    last = images_of(again)
    np.testing.assert_array_equal(last, whole("fadrm"))
    np.testing.assert_array_equal(
        image_set.read_images(optimise.kept_folder(root, 3), 4, 1)[0], first
    )
    np.testing.assert_array_equal(
        image_set.read_images(optimise.kept_folder(root, 12), 4, 1)[0], last[::2]
    )
    assert (first != last[::2]).any()

    capsys.readouterr()  # finished: what was not kept is said, and nothing is made
    for asked, said in (("(3,5,7)", "after iteration 5, 7 (recover.keep_at)"), ("(3,12)", "")):
        recover.say_kept(context_of(tmp_path / "run", "fadrm", f"keep_at={asked}"))
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


def test_images_are_kept_before_the_checkpoint_that_goes_on_behind_them(
    reference, tmp_path, monkeypatch
):
    """Killed between the two, whichever comes first: a run that goes on has them all."""
    kept = ("keep_at=(3,)", "steps_per_dispatch=5", "checkpoint_seconds=0.001")
    context, called = context_of(tmp_path / "run", "fadrm", *kept), []
    prepare(context, reference)

    def dying_at_the_second(name):
        inner = getattr(optimise, name)

        def call_or_die(*arguments):
            if arguments[-1].done == 3:
                called.append(name)
                if len(called) == 2:
                    raise MemoryError("killed")
            return inner(*arguments)

        return call_or_die

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        for name in ("_keep", "_save"):
            patch.setattr(optimise, name, dying_at_the_second(name))
        recover.run(context)
    assert len(set(called)) == 2
    context.work.lock.release()
    again = context_of(tmp_path / "run", "fadrm", *kept)
    recover.run(again)
    again.work.lock.release()
    images = image_set.read_images(optimise.kept_folder(recover.folder(again), 3), 4, 1)[0]
    assert (images != images_of(again)[::2]).any()


def stopping_in_class(number: int, context: Context, monkeypatch) -> list[int]:
    """Ask a run to stop while it looks through its so many-th class; the list is of all of them."""
    look, seen = synthesis_start._rank_patches, []

    def counted(start, cls):
        seen.append(cls)
        if len(seen) == number:
            context.stop.signum = signal.SIGTERM
        return look(start, cls)

    monkeypatch.setattr(synthesis_start, "_rank_patches", counted)
    return seen


def test_a_stop_between_classes_keeps_what_was_found_of_them(
    whole, reference, tmp_path, monkeypatch
):
    """Four classes in one unit: after the second the run stops, and it goes on with the third."""
    name, one_unit = "rded", ("batch_size=8", "slots_per_batch=2", "batch_order=class_major")
    context = context_of(tmp_path / "run", name, *one_unit)
    prepare(context, reference)
    assert len(units(context.config)) == 1
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        seen = stopping_in_class(2, context, patch)
        recover.run(context)
    context.work.lock.release()
    chosen = recover.folder(context) / "chosen"
    assert seen == [0, 1] and len(list(chosen.iterdir())) == 2
    again = context_of(tmp_path / "run", name, *one_unit)
    with monkeypatch.context() as patch:
        seen = stopping_in_class(9, again, patch)
        recover.run(again)
    again.work.lock.release()
    assert seen == [2, 3] and not chosen.exists()
    np.testing.assert_array_equal(images_of(again), whole(name))


def test_patches_are_ranked_once_and_a_stop_among_them_saves_the_other_lanes(
    reference, tmp_path, monkeypatch
):
    """Two lanes: the first unit is done sooner, and the third one's class is to be looked through
    when the run is asked to stop; the second unit is at iteration 4."""
    devices = parallel.lane_devices
    monkeypatch.setattr(parallel, "lane_devices", lambda limit, span: devices(2, span))
    monkeypatch.setattr(optimise, "unit_budget", lambda config, unit: 12 if unit.block else 4)
    monkeypatch.setitem(METHODS, "sre2l", ("initialise=mosaic", "batch_size=1"))
    context = context_of(tmp_path / "run", "sre2l")
    prepare(context, reference)
    place, starts = optimise._start, []

    def stopping(context, *given):
        if len(starts) == 2:
            context.stop.signum = signal.SIGTERM
        lane = place(context, *given)
        starts.append(lane.unit.name)
        return lane

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(optimise, "_start", stopping)
        seen = stopping_in_class(9, context, patch)
        recover.run(context)
    context.work.lock.release()
    going = recover.folder(context) / "checkpoints"
    assert len(seen) == 2 and [p.name for p in (going / starts[1]).iterdir()] == ["4"]
    again = context_of(tmp_path / "run", "sre2l")
    seen = stopping_in_class(9, again, monkeypatch)
    recover.run(again)
    again.work.lock.release()
    assert len(seen) == 2  # of the two other classes, and none of the unit that went on


def test_lines_of_iterations_behind_a_damaged_checkpoint_stand_once(
    reference, tmp_path, monkeypatch
):
    """Iterations 2 to 4 of every unit are logged, and done again from iteration 2."""
    context = context_of(tmp_path / "run", "fadrm", "checkpoint_seconds=0.0001")
    prepare(context, reference)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(2, context, patch)
        recover.run(context)
    context.work.lock.release()
    steps = {unit.name: [2, 4, 6, 8, 10, 12] for unit in units(context.config)}
    for name in steps:
        (file,) = (tmp_path / f"run/recover/checkpoints/{name}/4").rglob("state.msgpack")
        file.write_bytes(file.read_bytes()[:-1])
    again = context_of(tmp_path / "run", "fadrm")
    recover.run(again)
    again.work.lock.release()
    lines = read_lines(recover.folder(again) / "metrics.jsonl")
    assert {n: [x["step"] for x in lines if x["unit"] == n] for n in steps} == steps


# --- what single methods do -------------------------------------------------------------------


def drawn_by_iteration(context: Context) -> list[list[str]]:
    """Who supervised statistics, in the order in which the batches were worked on."""
    lines = (context.root / "recover/metrics.jsonl").read_text().splitlines()
    order = {unit.name: at for at, unit in enumerate(units(context.config))}
    lines = sorted(map(json.loads, lines), key=lambda x: (order[x["unit"]], x["step"]))
    return [line["drawn"] for line in lines]


@pytest.mark.parametrize("restarts", [False, True])
def test_round_robin_goes_on_over_batches_and_resumes_in_order(
    restarts, reference, tmp_path, monkeypatch
):
    """Three iterations a batch and two teachers: whose turn it is differs from batch to batch."""
    fields = ("iterations=3", "steps_per_dispatch=1", f"round_robin_restarts={restarts}")
    monkeypatch.setitem(METHODS, "fadrm", fields)
    context = context_of(tmp_path / "run", "fadrm")
    prepare(context, reference)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stopping_after(2, context, patch)
        recover.run(context)
    context.work.lock.release()
    again = context_of(tmp_path / "run", "fadrm")
    recover.run(again)
    again.work.lock.release()
    turns = [0, 1, 0] * 4 if restarts else [i % 2 for i in range(12)]
    assert drawn_by_iteration(again) == [[("first", "second")[turn]] for turn in turns]


def test_rded_is_its_mosaics_and_runs_no_iteration(reference, tmp_path, monkeypatch):
    context = context_of(tmp_path / "run", "rded")
    prepare(context, reference)
    monkeypatch.setattr(optimise, "engine_of", None)
    recover.run(context)
    context.work.lock.release()
    classes, slots = np.repeat(np.arange(4), 2), np.tile(np.arange(2), 4)
    expected = recover.pixels.to_uint8(
        initial_images(context, classes, slots), context.inputs.normalisation
    )
    np.testing.assert_array_equal(images_of(context), expected)


def test_jpeg_is_what_pillow_leaves(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)

    def by_pillow(image, quality, **more):
        Image.fromarray(image).save(tmp_path / "a.jpg", quality=quality, **more)
        return np.array(Image.open(tmp_path / "a.jpg"))

    for quality in (75, 95):
        found = image_set.through_jpeg(images, quality)
        expected = np.stack([by_pillow(image, quality) for image in images])
        np.testing.assert_array_equal(found, expected)
        full = np.stack([by_pillow(image, quality, subsampling=0) for image in images])
        assert not np.array_equal(found, full)
    grey = np.stack([by_pillow(image, 75) for image in images[..., 0]])
    np.testing.assert_array_equal(image_set.through_jpeg(images[..., :1], 75)[..., 0], grey)


def test_pixels_are_written_as_the_released_code_writes_them(reference, tmp_path):
    """Levels cut off in place of rounded, and what JPEG leaves; of the same run."""
    found = {}
    for name, flags in {
        "plain": (), "truncated": ("--config.recover.rounding=truncate",),
        "jpeg": ("--config.recover.jpeg_quality=75",),
    }.items():  # fmt: skip
        root = tmp_path / name
        ok = call(TINY, f"--workdir={root}", "--stages=recover", f"--from={reference}", *flags)
        assert ok[0] == 0, ok[2]
        found[name] = image_set.read_images(root / "recover" / "images", 4, 2)[0].astype(int)
    lower = found["plain"] - found["truncated"]  # half of the levels are rounded up
    assert set(np.unique(lower)) == {0, 1} and 0.2 < lower.mean() < 0.8
    expected = image_set.through_jpeg(found["plain"].astype(np.uint8), 75)
    np.testing.assert_array_equal(found["jpeg"], expected)
    assert not np.array_equal(found["jpeg"], found["plain"])


# --- statistics of the real images --------------------------------------------------------------


def test_statistics_are_made_once_resumed_by_shard_and_shared(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "CLASSES", 1)
    context = context_of(tmp_path / "run", "edc")
    pipeline.adopt(context, reference)
    measure, made = statistics._measure, []

    def stopping(context, measurer, kind, shard):
        made.append((kind, shard))
        if len(made) == 4:
            context.stop.signum = signal.SIGTERM
        return measure(context, measurer, kind, shard)

    monkeypatch.setattr(statistics, "_measure", stopping)
    with pytest.raises(Interrupted):
        statistics.run(context)
    context.work.lock.release()
    assert not statistics.is_done(context) and len(made) == 4
    again = context_of(tmp_path / "run", "edc")
    made[:] = [None] * 9  # past the one at which it stopped
    statistics.run(again)
    again.work.lock.release()
    # Two teachers, each with one shard of batches and four of classes; three were there.
    assert len(made) == 9 + 10 - 3 and statistics.is_done(again)

    whole = context_of(tmp_path / "whole", "edc")
    pipeline.adopt(whole, reference)
    monkeypatch.setattr(statistics, "_measure", measure)
    statistics.run(whole)
    whole.work.lock.release()
    pools = [
        statistics.with_targets(c, c.networks.pool(("first", "second"))) for c in (again, whole)
    ]
    for ours, theirs in zip(*(pool.variables for pool in pools), strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    table = pools[0].variables[0]["class_statistics"]["conv"]["features.0"]["mean"]
    assert table.shape == (4, 1)

    # Another method that needs a part of them finds it, in its own folder and from another's.
    gvbsm = context_of(tmp_path / "whole", "gvbsm")
    assert statistics.is_done(gvbsm)
    other = context_of(tmp_path / "other", "gvbsm")
    pipeline.adopt(other, tmp_path / "whole")
    assert statistics.is_done(other)
    assert not statistics.is_done(context_of(tmp_path / "whole", "gvbsm", "statistic_patch=2"))
    with monkeypatch.context() as patch:  # a kind that was not measured
        patch.setattr(fingerprints, "NAMES", (*fingerprints.NAMES, "skew"))
        assert not statistics.is_done(context_of(tmp_path / "whole", "gvbsm"))


def group_tables(context: Context) -> list:
    """The leaves of both teachers' statistics of groups."""
    pool = statistics.with_targets(context, context.networks.pool(("first", "second")))
    return jax.tree.leaves([variables["group_statistics"] for variables in pool.variables])


def test_groups_are_measured_in_parts_and_a_stop_is_honoured_before_each_batch(
    reference, tmp_path, monkeypatch
):
    """Two groups of four classes' images are three batches each: parts of two and of one."""
    whole = context_of(tmp_path / "whole", "psm")
    prepare(whole, reference)
    whole.work.lock.release()
    monkeypatch.setattr(statistics, "BATCHES", 2)
    parallel_devices = parallel.devices
    monkeypatch.setattr(statistics.parallel, "devices", lambda: parallel_devices()[:1])
    context = context_of(tmp_path / "run", "psm")
    pipeline.adopt(context, reference)
    run, sizes = measuring.Measurer._run, []

    def stopping(self, batches, group):
        sizes.extend(len(batch.images_BHWC) for batch in batches)
        if len(sizes) == 4:  # the first of the second group
            context.stop.signum = signal.SIGTERM
        return run(self, batches, group)

    monkeypatch.setattr(measuring.Measurer, "_run", stopping)
    with pytest.raises(Interrupted):
        statistics.run(context)
    context.work.lock.release()
    shards = statistics.folder(context, "first", "group") / "shards"
    names = ["00000_00000.safetensors", "00000_00001.safetensors"]
    assert sorted(p.name for p in shards.iterdir()) == names and len(sizes) == 4
    # What a version without parts left is no part.
    (shards / "00001.safetensors").write_bytes(b"a whole group")
    again = context_of(tmp_path / "run", "psm")
    statistics.run(again)
    again.work.lock.release()
    assert len(sizes) == 4 + 2 * 6 - 3 and statistics.is_done(again) and not shards.exists()
    for ours, theirs in zip(group_tables(again), group_tables(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-7)


@pytest.mark.parametrize("name", ["real_herding", "real_feature_medoids", "real_balanced"])
def test_a_selected_control_is_its_initialiser_without_iterations(reference, tmp_path, name):
    """The same images, whoever recovers; of a teacher outside the pool, too."""
    asked = (f"initialise={name}", "iterations=0", "scorer=outside")
    context = context_of(tmp_path / "run", "rded", *asked)
    prepare(context, reference)
    recover.run(context)
    other = context_of(tmp_path / "run", "sre2l", "scorer=outside", controls=name)
    assert statistics.is_done(other)
    plain = context_of(tmp_path / "run", "sre2l")
    assert fingerprints.recover(other) == fingerprints.recover(plain)  # controls ask, not recover
    control = controls.labelled_set(other, name)
    assert control.soft and control.fields["teacher"].keys() == {"outside"}
    np.testing.assert_array_equal(control.images_uint8_NHWC[:], images_of(context))
    context.work.lock.release()
    # Twin: random images are others.
    random = controls.labelled_set(other, "random_real").images_uint8_NHWC
    assert not np.array_equal(random, images_of(context))
    # Those with hard labels are the same ones, and not another copy of them.
    assert controls.labelled_set(other, "random_real_hard").images_uint8_NHWC is random


def test_retrieved_images_are_of_their_class_and_nearest(reference, tmp_path):
    context = context_of(tmp_path / "run", "fadrm retrieved", "inject_simplicity=0.0")
    prepare(context, reference)
    source = context.inputs.open("train")
    at = np.array([np.flatnonzero(source.labels_N == cls)[5] for cls in (3, 0, 1)])
    images = np.stack([source.image(int(i)) for i in at])
    given = pixels.normalise(images, context.inputs.normalisation)
    found = retrieved_images(context, np.array([3, 0, 1]), np.asarray(given))
    np.testing.assert_allclose(found, given, atol=1e-6)  # nothing is nearer than itself
    elsewhere = retrieved_images(context, np.array([0, 1, 3]), np.asarray(given))
    assert not np.allclose(elsewhere, given, atol=0.1)  # twin: asked of another class
    assert np.asarray(found).shape[1:] == context.inputs.image_shape


def test_damaged_features_and_groups_that_are_not_there_are_said(reference, tmp_path):
    context = context_of(tmp_path / "run", "psm")
    pipeline.adopt(context, reference)
    with pytest.raises(UserError, match="the difficulty of real images in teacher first are not"):
        statistics.groups(context, 0)
    statistics.run(context)
    context.work.lock.release()
    root = statistics.folder(context, "second", "difficulty")
    whole = statistics.groups(context, 1)
    assert sorted(np.concatenate(whole).tolist()) == list(range(sum(map(len, whole))))
    path = root / "shards" / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"00001.safetensors is damaged.*Delete"):
        statistics.groups(context, 1)
    # Another IPC has other groups, from the same difficulties.
    other = context_of(tmp_path / "run", "psm", "ipc=4")
    kinds = {kind: statistics.folder(other, "first", kind) for kind in ("difficulty", "group")}
    assert (kinds["difficulty"] / "record.json").exists()
    assert not (kinds["group"] / "record.json").exists()


def test_missing_and_damaged_statistics_are_said(reference, tmp_path):
    context = context_of(tmp_path / "run", "gvbsm")
    pipeline.adopt(context, reference)
    with pytest.raises(Exception, match="run the squeeze stage first"):
        recover.run(context)
    context.work.lock.release()
    statistics.run(context)
    context.work.lock.release()
    path = statistics.folder(context, "first", "conv") / statistics.FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match=f"{path} is damaged"):
        statistics.with_targets(context, context.networks.pool(("first", "second")))


# --- classes that do not divide -----------------------------------------------------------------


def test_nothing_is_sent_for_a_lane_without_work(tmp_path, monkeypatch):
    """Four units on three devices: two have none while the last is made, in six dispatches."""
    context = context_of(tmp_path, "sre2l")
    squeeze.run(context)
    find, place, placed = parallel.lane_devices, parallel.LaneMap.place, []

    def counted(self, tree, at):
        if type(tree) is tuple:  # a unit with its state
            placed.append(at)
        return place(self, tree, at)

    monkeypatch.setattr(parallel, "lane_devices", lambda limit, span=1: find(min(limit, 3)))
    monkeypatch.setattr(parallel.LaneMap, "place", counted)
    recover.run(context)
    assert placed == [1, 2]


@pytest.mark.usefixtures("as_users")
def test_blocks_of_two_sizes_are_the_same_on_any_devices_and_threads(tmp_path, monkeypatch):
    """Five classes in batches of at most three: blocks of three and two."""
    fields = ("dataset.num_classes=5", "recover.batch_size=3", "recover.iterations=2",
              "squeeze.epochs=1")  # fmt: skip
    problems: list[str] = []
    config, _ = parse([TINY, *(f"--config.{f}" for f in fields)], problems)
    find, found = parallel.lane_devices, []
    lanes = {"1": lambda *_: find(1), "8": find, "threads": lambda *_: find(1) * 2}
    for name, used in lanes.items():
        context = Context(resolve(config, problems), tmp_path / name)
        monkeypatch.setattr(parallel, "lane_devices", used)
        if found:
            shutil.copytree(tmp_path / "1" / "squeeze", context.root / "squeeze")
        else:
            squeeze.run(context)
        recover.run(context)
        context.work.lock.release()
        found.append(images_of(context))
        units = sorted((context.root / "recover" / "units").iterdir())
        blocks = [workdir.read_record(unit)["classes"] for unit in units]
        assert blocks == [[0, 2], [3, 4], [0, 2], [3, 4]]
    assert len(found[0]) == 10
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
