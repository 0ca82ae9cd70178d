"""What is there is kept, what is missing is made, what does not fit is refused.

Every test starts from a copy of one finished run. `main` runs in this process, on eight devices;
the finished run was made by a process of its own on one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.command import TINY, assert_same, call, finished, reference, results, snapshot
from helpers.compiling import fast_alike
from PIL import Image

from configs import tiny
from prism_jax import parallel, pipeline, training
from prism_jax.config import resolve
from prism_jax.data import workdir
from prism_jax.data.metrics import read_lines
from prism_jax.data.weights import WEIGHTS, unpack_variables
from prism_jax.stages import relabel, validate
from prism_jax.stages.context import Context
from prism_jax.types import Normalisation

__all__ = ["fast_alike", "finished", "reference"]  # fixtures

STUDENT = "validate/outside/0"


def ok(root, *arguments: str) -> str:
    """Run the tiny experiment in ``root``; it succeeds."""
    status, out, err = call(TINY, f"--workdir={root}", *arguments)
    assert status == 0, err
    return out


def refused(root, *arguments: str, also=()) -> str:
    """Run it; it is refused and leaves everything as it was."""
    before = snapshot(root)
    status, _, err = call(TINY, f"--workdir={root}", *arguments)
    assert status == 2 and err.startswith("error: ") and "Traceback" not in err
    assert snapshot(root) == before
    return err


def changed(root, before) -> set[str]:
    """The folders of the workdir in which a file was made, removed or written."""
    after = snapshot(root)
    names = {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}
    return {name.split(os.sep)[0] for name in names} - {".", "summary.json", "config.json"}


def flip(path, at=0.5) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 4
    path.write_bytes(data)


def cut(path) -> None:
    """Keep the first half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_figures_that_were_drawn_before_students_are_drawn_again(finished, reference):
    shutil.rmtree(finished / "validate")
    shutil.rmtree(finished / "analyse")
    ok(finished, "--stages=squeeze,recover,relabel,analyse")
    before = (finished / "analyse/students.png").read_bytes()
    absent = workdir.read_fingerprint(finished / "analyse")["absent"]
    assert f"synthetic/{STUDENT.split('/', 1)[1]}" in absent
    ok(finished)
    assert (finished / "analyse/students.png").read_bytes() != before
    assert "absent" not in workdir.read_fingerprint(finished / "analyse")
    assert_same(finished, reference)


# --- a finished run -------------------------------------------------------------------------


def test_a_finished_run_is_only_read(finished):
    before = snapshot(finished)
    for arguments in ((), ("--stages=validate,analyse",), ("--config.parallel.map=pmap",)):
        out = ok(finished, *arguments)
        assert "top-1 on real test images" in out and out.strip().endswith("report.html")
        assert snapshot(finished) == before
    more = ("--config.recover.steps_per_dispatch=5", "--config.recover.checkpoint_seconds=1.0")
    ok(finished, *more, "--config.validate.checkpoint_seconds=1.0")
    assert snapshot(finished) == before


def test_what_a_person_deletes_of_the_end_is_made_again(finished, reference):
    for name in ("summary.json", "report.html", "analyse/diversity.json"):
        (finished / name).unlink()
    shutil.rmtree(finished / "analyse")
    ok(finished)
    assert_same(finished, reference)
    ours, theirs = (workdir.read_json(p / "summary.json") for p in (finished, reference))
    del ours["command"], theirs["command"], ours["machine"], theirs["machine"]
    assert ours == theirs


def test_a_summary_that_lags_behind_is_renewed(finished):
    path = finished / "summary.json"
    lagging = workdir.read_json(path)
    lagging["validate"]["outside"]["top1"] = 0.0
    workdir.write_record(path, lagging)
    ok(finished)
    record = json.loads((finished / STUDENT / "record.json").read_text())
    assert json.loads(path.read_text())["validate"]["outside"]["top1"] == record["top1"]


def test_images_do_not_depend_on_devices_dispatches_or_the_map(finished, reference):
    shutil.rmtree(finished / "recover")
    out = ok(
        finished, "--stages=recover", "--config.recover.steps_per_dispatch=5",
        "--config.parallel.map=pmap",
    )  # fmt: skip
    assert "recover: 48/48" in out
    ours, theirs = results(finished), results(reference)
    images = [name for name in theirs if name.startswith("recover/images")]
    assert len(images) == 8 and all(ours[name] == theirs[name] for name in images)
    before = snapshot(finished, "squeeze", "relabel", "validate", "controls")
    ok(finished)  # what follows from the images still fits
    assert snapshot(finished, "squeeze", "relabel", "validate", "controls") == before


def test_sets_that_memory_does_not_hold_give_the_same(finished, reference):
    """Every set is read from disk whenever it is needed: no image is kept."""
    for name in ("relabel", "validate", "controls", "analyse"):
        shutil.rmtree(finished / name)
    ok(finished, "--config.dataset.cache_gigabytes=0")
    assert_same(finished, reference)


def test_classes_with_too_few_images_are_refused_before_any_work(tmp_path):
    for classes in ("initialise=real", "initialise=noise"):  # then the control asks for them
        status, _, err = call(
            TINY, f"--workdir={tmp_path / 'run'}", "--config.recover.ipc=400",
            "--config.recover.slots_per_batch=1", f"--config.recover.{classes}",
        )  # fmt: skip
        assert status == 2 and "recover.short_classes=repeat" in err and "class 0 has" in err
        assert not (tmp_path / "run").exists()


def test_a_teacher_at_chance_stops_the_run_before_it_spends_time_on_it(finished):
    """Of four classes, 32.5 % are asked for; the record says less, as of a wrong class order."""
    record = finished / "squeeze" / "first" / "record.json"
    workdir.write_record(record, workdir.read_record(record) | {"top1": 0.3})
    ok(finished)  # what is finished is only read
    shutil.rmtree(finished / "relabel")
    said = refused(finished)
    assert "teacher first is right on 30.0%" in said and "--config.squeeze.least_top1=0" in said
    assert "train longer" in said
    refused(finished, "--config.squeeze.least_top1=0.31")
    out = ok(finished, "--config.squeeze.least_top1=0.29", "--stages=relabel")
    assert "relabel synthetic" in out


def test_so_does_one_that_only_chooses_real_images(finished, tmp_path):
    given = (f"--from={finished}", "--stages=squeeze,recover", "--config.recover.iterations=0",
             "--config.recover.pool=()", "--config.relabel.teachers=second")  # fmt: skip
    record = finished / "squeeze" / "first" / "record.json"
    workdir.write_record(record, workdir.read_record(record) | {"top1": 0.3})
    for number, more in enumerate(
        (
            ("recover.initialise=real_confident",),
            ("recover.initialise=mosaic", "recover.scorer=first"),
            ("recover.initialise=real_random", "validate.controls=real_herding"),
        )
    ):
        flags = (*given, *(f"--config.{field}" for field in more))
        said = call(TINY, f"--workdir={tmp_path / str(number)}", *flags)[2]
        assert "teacher first is right on 30.0%" in said and "or chooses is noise" in said, more
    # One that nobody asks.
    ok(tmp_path / "other", *given, "--config.recover.initialise=real_random",
       "--config.validate.controls=random_real")  # fmt: skip


def test_weights_that_fit_no_longer_are_said(tmp_path, reference):
    """Teachers are known by their files, and the same file at other sizes is another network."""
    given = ("--stages=squeeze", f"--config.networks.first.checkpoint={reference}/squeeze/first",
             *(f"--config.{x}=first" for x in ("squeeze.teachers", "recover.pool",
                                               "analyse.network")))  # fmt: skip
    ok(tmp_path / "new", *given)
    status, _, err = call(
        TINY, f"--workdir={tmp_path / 'new'}", *given, "--config.dataset.image_size=16"
    )
    assert status == 2 and "teacher first" in err and "dataset.image_size=16" in err


@pytest.mark.usefixtures("fast_alike")
def test_a_teacher_that_was_read_needs_its_file_no_more(tmp_path, reference):
    file = tmp_path / "first"
    shutil.copytree(reference / "squeeze/first", file)
    given = ("--stages=squeeze", f"--config.networks.first.checkpoint={file}")
    ok(tmp_path / "run", *given)
    shutil.rmtree(file)
    before = snapshot(tmp_path / "run")
    ok(tmp_path / "run", *given)
    assert snapshot(tmp_path / "run") == before
    assert str(file) in call(TINY, f"--workdir={tmp_path / 'new'}", *given)[2]  # not read there


@pytest.mark.usefixtures("fast_alike")
def test_a_student_that_begins_as_its_teacher_began_is_named(finished):
    flags = ("--stages=validate", "--config.validate.students=first")
    out = ok(finished, *flags, "--config.validate.seeds=(0,1)")
    said = [line for line in out.splitlines() if "choose other validate.seeds" in line]
    assert len(said) == 1 and "first of seed 0" in said[0]


# --- changed settings -----------------------------------------------------------------------


@pytest.mark.usefixtures("fast_alike")
def test_validate_alone_is_repeated_when_it_changes(finished):
    before = snapshot(finished)
    out = ok(finished, "--config.validate.learning_rate=0.002", "--stages=validate,analyse")
    assert changed(finished, before) == {"validate", "controls", "analyse", "report.html"}
    labels = "controls/random_real/relabel/labels-00000.array_record"
    assert snapshot(finished)[labels] == before[labels]
    assert out.count("was made from other settings; it is made again") == 4


def test_a_new_seed_trains_that_seed_only(finished):
    before = snapshot(finished, STUDENT)
    ok(finished, "--config.validate.seeds=(0, 1)", "--config.validate.controls=()")
    assert snapshot(finished, STUDENT) == before
    assert (finished / "validate/outside/1/record.json").exists()
    summary = json.loads((finished / "summary.json").read_text())
    assert len(summary["validate"]["outside"]["top1_per_seed"]) == 2
    assert summary["seeds"] == [0, 1] and "controls" not in summary


@pytest.mark.usefixtures("fast_alike")
def test_students_on_several_devices_differ_by_little_and_say_so(finished):
    root = finished / STUDENT
    before = json.loads((root / "record.json").read_text())
    lines = read_lines(root / "metrics.jsonl")
    shutil.rmtree(root)
    ok(finished, "--config.parallel.train_devices=2", "--stages=validate")
    after = json.loads((root / "record.json").read_text())
    assert (before["devices"], after["devices"]) == (1, 2)
    for one, two in zip(lines, read_lines(root / "metrics.jsonl"), strict=True):
        assert abs(one["loss"] - two["loss"]) < 1e-3 * one["loss"]
        assert abs(one["top1"] - two["top1"]) < 0.02
    err = refused(finished, "--config.parallel.train_devices=4", "--config.validate.bn_group=2")
    assert "can be shared by 1, 2 device(s)" in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("recover.phase_sizes=(4,8)",),
            "teacher first does not read images of 4 px, which recover.phase_sizes asks for",
        ),
        (
            ("networks.second.mean=(0.5,0.5,0.5)", "networks.second.std=(0.5,0.5,0.5)"),
            "networks.second.mean has 3 numbers; digits has 1 channels; state one number",
        ),
        (
            ("recover.pool=outside", "recover.primary=outside", "recover.count_no_bn=True"),
            "recover.pool (outside) has no BatchNorm",
        ),
        (
            ("recover.initialise=mosaic", "recover.patch_factor=9", "recover.short_classes=repeat"),
            "recover.patch_factor is 9",
        ),
    ],
)
@pytest.mark.parametrize("more", [("--stages=squeeze,recover",), ("--plan",)])
def test_what_settings_alone_forbid_is_refused_before_any_work(tmp_path, overrides, said, more):
    err = refused(tmp_path, *(f"--config.{o}" for o in overrides), *more)
    assert said in err and err.count("\n") == 1


def test_more_devices_than_there_are_are_refused(finished):
    many = ("--config.parallel.train_devices=16", "--config.validate.bn_group=1")
    sizes = ("--config.validate.batch_size=16", "--config.relabel.batch_size=16")
    assert "this process has 8 device(s)" in refused(finished, *many, *sizes)


@pytest.mark.usefixtures("fast_alike")
def test_relabel_and_validate_are_repeated_when_labels_change(finished):
    before = snapshot(finished, "squeeze", "recover")
    labels = snapshot(finished)["relabel/labels-00000.array_record"]
    out = ok(finished, "--config.relabel.crop_min=0.5", "--stages=relabel")
    assert snapshot(finished, "squeeze", "recover") == before
    assert snapshot(finished)["relabel/labels-00000.array_record"] != labels
    assert "relabel synthetic: 6/6" in out
    # Students of the old labels are not shown as if they belonged to the new ones.
    assert "validate" not in json.loads((finished / "summary.json").read_text())
    out = ok(finished, "--config.relabel.crop_min=0.5")
    assert "relabel synthetic" not in out and "validate synthetic/outside/0: 12/12" in out


@pytest.mark.parametrize(
    ("override", "where", "line"),
    [
        ("recover.iterations=13", "recover", "recover.iterations: 12 -> 13"),
        ("seed=1", "recover", "seed: 0 -> 1"),
        ("squeeze.epochs=3", "squeeze/first", "squeeze.epochs: 2 -> 3"),
        ("networks.second.width=0.25", "squeeze/second", "network.width: 0.125 -> 0.25"),
    ],
)
@pytest.mark.parametrize("stages", [(), ("--stages=validate",)])
def test_other_teachers_or_images_are_refused(finished, override, where, line, stages):
    err = refused(finished, f"--config.{override}", *stages)
    assert line in err and str(finished / where) in err
    for way in ("another --workdir", f"--from={finished}", "restore", f"delete {finished / where}"):
        assert way in err


SMALL_LABELS = (
    "--config.relabel.precision=int8", "--config.relabel.top_k=2", "--config.relabel.epochs=4",
    "--config.relabel.mix_per=image",
)  # fmt: skip


def test_students_of_online_labels_are_those_of_the_store(finished, tmp_path):
    """Of the synthetic set and of the random images, with labels of four epochs used for six."""
    online = shutil.copytree(finished, tmp_path / "online")
    shutil.rmtree(online / "relabel")
    shutil.rmtree(online / "controls")
    out = ok(finished, *SMALL_LABELS)
    assert "relabel synthetic: 4/4" in out
    out = ok(online, *SMALL_LABELS, "--config.relabel.mode=online")
    assert "relabel" not in out and "validate synthetic/outside/0: 12/12" in out
    assert not any(online.glob("**/relabel"))
    stored, made = (
        {k: v for k, v in results(r).items() if "validate" in k} for r in (finished, online)
    )
    assert made == stored and len(made) == 2 * 4
    assert (online / "controls/random_real/images/00003/00001.png").exists()
    assert "relabel" not in json.loads((online / "summary.json").read_text())

    # The other mode finds its students finished, and adds only what is missing.
    before = snapshot(online, "validate", "controls/random_real/validate")
    out = ok(online, *SMALL_LABELS)
    assert "relabel synthetic: 4/4" in out and "validate" not in out
    assert snapshot(online, "validate", "controls/random_real/validate") == before
    assert_same(online, finished)


@pytest.mark.parametrize("programs", [1, pytest.param(2, id="twin")])
def test_sets_of_a_size_are_labelled_by_one_program(finished, reference, monkeypatch, programs):
    """And in the twin, where maps do not share, by one each."""
    shutil.rmtree(finished / "relabel")
    shutil.rmtree(finished / "controls/random_real/relabel")
    if programs == 2:
        monkeypatch.setattr(parallel, "shared_programs", nullcontext)
    make, made = relabel.labeller_of, []
    monkeypatch.setattr(
        relabel, "labeller_of", lambda *given: made.append(make(*given)) or made[-1]
    )
    ok(finished, "--stages=relabel")
    assert len(made) == 2 and sum(labeller._map.traces for labeller in made) == programs
    assert_same(finished, reference)


def test_seconds_of_labels_go_on_where_the_run_does(finished):
    """The shards are there, what took them long is noted, and the manifest is lost."""
    timing = finished / "relabel" / "timing.json"
    workdir.write_record(timing, {"seconds": 100.0})
    (finished / "relabel" / "manifest.json").unlink()
    status, _, err = call(TINY, f"--workdir={finished}", "--stages=relabel")
    assert status == 0, err
    assert 100 < workdir.read_json(timing)["seconds"] < 200
    # Labels of other settings begin anew.
    arguments = (TINY, f"--workdir={finished}", "--stages=relabel", "--config.relabel.flip=True")
    status, _, err = call(*arguments)
    assert status == 0, err
    assert workdir.read_json(timing)["seconds"] < 100


def test_what_another_process_deals_out_is_trained_on_its_labels(monkeypatch):
    """Of a set whose students this process, by what it sees of a shared disk, takes for done."""
    sets = [SimpleNamespace(name=name, soft=name != "full_real") for name in ("a", "full_real")]
    student, trained = [("first", 0)], {}
    monkeypatch.setattr(pipeline, "sets", lambda context: sets)
    monkeypatch.setattr(pipeline.squeeze, "check", lambda context: None)
    monkeypatch.setattr(pipeline.relabel, "augment_of", lambda config: None)
    monkeypatch.setattr(pipeline.relabel, "setting_aside", lambda context, of: nullcontext())
    monkeypatch.setattr(pipeline.relabel, "open_labels", lambda context, of: f"those of {of.name}")
    monkeypatch.setattr(pipeline.validate, "students", lambda context: student)
    monkeypatch.setattr(pipeline.validate, "pending", lambda c, of: [] if of.soft else student)
    monkeypatch.setattr(
        pipeline.validate, "run", lambda c, of, labels, *_: trained.update({of.name: labels})
    )
    work = SimpleNamespace(deal=lambda what, all_of, missing: all_of, wait=lambda done: None)
    pipeline.RUNNERS["validate"](SimpleNamespace(work=work, config=None))
    assert trained == {"a": "those of a", "full_real": None}


def test_labels_of_changed_images_are_refused(finished):
    """The labels fit the settings and not the pixels: an image was exchanged, with its record."""
    shutil.rmtree(finished / STUDENT)
    manifest = finished / "relabel/manifest.json"
    fields = workdir.read_json(manifest)
    digest = fields["images"]
    workdir.write_record(manifest, {**fields, "images": digest[::-1]})
    err = refused(finished)
    assert f"belong to images with digest {digest[::-1]}, not to these ({digest})" in err
    assert f"move {finished / 'relabel'} away" in err


def test_labels_of_other_settings_are_not_trained_on(finished):
    err = refused(finished, "--config.relabel.crop_min=0.5", "--stages=validate")
    assert "no finished soft labels made with these settings" in err
    assert "--stages=relabel" in err


def test_a_stage_says_which_stage_it_waits_for(tmp_path, finished):
    root = tmp_path / "new"
    for stage, first in (("recover", "squeeze"), ("relabel", "recover"), ("analyse", "recover")):
        status, _, err = call(TINY, f"--workdir={root}", f"--stages={stage}")
        assert status == 2 and f"run the {first} stage first" in err
    shutil.rmtree(finished / "relabel")
    shutil.rmtree(finished / "validate")
    assert "run the relabel stage first" in refused(finished, "--stages=validate")


# --- importing ------------------------------------------------------------------------------


def test_teachers_are_imported_from_folders_of_another_run(tmp_path, reference):
    """From a finished teacher, from a training's checkpoints, from a student's last one."""
    (last,) = {max((reference / STUDENT / "checkpoints").iterdir(), key=lambda f: int(f.name))}
    where = {
        "first": reference / "squeeze/first",
        "second": reference / "squeeze/second/checkpoints",
        "outside": last,
    }
    ok(
        tmp_path / "new", "--stages=squeeze",
        *(f"--config.networks.{name}.checkpoint={path}" for name, path in where.items()),
    )  # fmt: skip
    for name in ("first", "second"):
        ours, theirs = (root / "squeeze" / name for root in (tmp_path / "new", reference))
        read = [(f / "weights.safetensors").read_bytes() for f in (ours, theirs)]
        assert read[0] == read[1]
        records = [json.loads((f / "record.json").read_text()) for f in (ours, theirs)]
        assert records[0]["top1"] == records[1]["top1"]
    student = json.loads((reference / STUDENT / "record.json").read_text())
    imported = json.loads((tmp_path / "new/squeeze/outside/record.json").read_text())
    assert imported["top1"] == student["top1"] and imported["batch_norms"] == 0


@pytest.mark.usefixtures("fast_alike")
def test_a_teacher_is_trained_further_from_weights(tmp_path, reference):
    """At a rate that moves nothing they stay; images are read as is stated for these weights."""
    weights = reference / "squeeze/first/weights.safetensors"
    mean, std = (0.7,), (0.2,)
    given = (
        "--stages=squeeze", "--config.squeeze.learning_rate=1e-30",
        "--config.squeeze.weight_decay=0.0", "--config.squeeze.optimiser=sgd",
        *(f"--config.networks.first.{field}={value}" for field, value in
          (("start_from", weights), ("mean", mean), ("std", std))),
    )  # fmt: skip
    out = ok(tmp_path / "new", *given)
    assert f"training first further, from {weights}" in out
    folder = tmp_path / "new/squeeze/first"
    found, before = (unpack_variables(f.read_bytes()) for f in (folder / WEIGHTS, weights))
    assert jax.tree.all(jax.tree.map(np.array_equal, found["params"], before["params"]))
    moved = jax.tree.map(np.array_equal, found["batch_stats"], before["batch_stats"])
    assert not any(jax.tree.leaves(moved))  # it was trained: the statistics are of its batches
    fresh = unpack_variables((tmp_path / "new/squeeze/second" / WEIGHTS).read_bytes())
    second = unpack_variables((reference / "squeeze/second" / WEIGHTS).read_bytes())
    assert not np.array_equal(jax.tree.leaves(fresh)[0], jax.tree.leaves(second)[0])

    context = Context(resolve(tiny.get_config()), str(tmp_path / "new"))
    top1 = json.loads((folder / "record.json").read_text())["top1"]
    for normalisation, equal in ((Normalisation(mean, std), True), (None, False)):
        how = normalisation or context.inputs.normalisation
        tested = training.test(
            context.networks.build("first"), found, *context.inputs.test_set(), how
        )
        assert (tested.top1 == top1) == equal
    again = refused(tmp_path / "new", *given[:-3], f"--config.networks.first.start_from={folder}")
    assert "network.start_from" in again and "was made from other settings" in again


@pytest.mark.usefixtures("fast_alike")
def test_a_teacher_that_was_refused_is_made_as_the_message_says(tmp_path, reference):
    """Where nothing was made, nothing is of other settings."""
    folder = reference / "squeeze/first"
    given = ("--stages=squeeze", f"--config.networks.first.start_from={folder}")
    given += ("--config.dataset.mean=(0.7,)", "--config.dataset.std=(0.2,)")
    status, _, said = call(TINY, f"--workdir={tmp_path / 'run'}", *given)
    assert status == 2
    flags = re.findall(r"--config\.networks\.first\.(?:mean|std)=[\d.,]+", said)
    assert len(flags) == 2, said
    ok(tmp_path / "run", *given, *(flag.rstrip(".,") for flag in flags))


@pytest.mark.usefixtures("fast_alike")
def test_weights_that_were_made_for_other_pixels_are_refused(tmp_path, reference):
    """Of a teacher, of a training's checkpoints; of older teachers, which do not state it."""
    others = ("--config.dataset.mean=0.7,", "--config.dataset.std=0.2,")
    only = ("--stages=squeeze", "--config.squeeze.teachers=first,outside", *others,
            "--config.recover.pool=first")  # fmt: skip
    old = shutil.copytree(reference / "squeeze/first", tmp_path / "old")
    record = workdir.read_record(old / "record.json")
    del record["normalisation"]
    workdir.write_record(old / "record.json", record)
    (last,) = {max((reference / STUDENT / "checkpoints").iterdir(), key=lambda f: int(f.name))}
    for path, name in ((reference / "squeeze/first", "first"), (old / WEIGHTS, "first"),
                       (last, "outside")):  # fmt: skip
        given = (*only, f"--config.networks.{name}.checkpoint={path}")
        status, _, err = call(TINY, f"--workdir={tmp_path / 'run'}", *given)
        assert status == 2 and "was made for images of mean (" in err
        remedy = [word for word in err.split() if word.startswith(f"--config.networks.{name}.")]
        assert len(remedy) == 2 and "Traceback" not in err
        ok(tmp_path / "run", *given, *remedy)
        shutil.rmtree(tmp_path / "run")
    stated = ("--config.networks.first.mean=0.7,", "--config.networks.first.std=0.2,")
    assert "warning" in ok(tmp_path / "run", *given, *remedy, *stated,
                           f"--config.networks.first.checkpoint={old}")  # fmt: skip


def test_a_teacher_is_tested_anew_on_other_images(tmp_path, reference):
    """Its weights are the same; its accuracy is that of these images, and stays where they do."""
    given = (
        "--stages=squeeze",
        f"--config.networks.first.checkpoint={reference / 'squeeze/first'}",
    )
    ok(tmp_path / "a", f"--from={reference}", *given)
    record = tmp_path / "a/squeeze/first" / "record.json"
    right, when = workdir.read_record(record), record.stat().st_mtime_ns
    ok(tmp_path / "a", *given)
    assert record.stat().st_mtime_ns == when
    for name in ("first", "second"):  # imported, and trained here
        record = tmp_path / "a/squeeze" / name / "record.json"
        right = workdir.read_record(record)
        weights = (record.parent / WEIGHTS).read_bytes()
        workdir.write_record(record, {**right, "tested": "others", "top1": 0.123})
        assert f"testing {name} again" in ok(tmp_path / "a", *given)
        assert workdir.read_record(record) == right
        assert (record.parent / WEIGHTS).read_bytes() == weights
    workdir.write_record(record, {k: v for k, v in right.items() if k != "tested"})  # an older one
    before = snapshot(tmp_path / "a")
    ok(tmp_path / "a", *given)
    assert snapshot(tmp_path / "a") == before


def test_weights_that_do_not_fit_leave_nothing_behind(tmp_path, reference):
    """What the message says to state can be stated in the same working directory."""
    weights = reference / "squeeze/first/weights.safetensors"
    (tmp_path / "w.safetensors").write_bytes(weights.read_bytes())  # without its record
    root, only = tmp_path / "run", ("--stages=squeeze", "--config.squeeze.teachers=first,outside")
    given = (*only, "--config.recover.pool=first", f"--from={reference}",
             f"--config.networks.first.checkpoint={tmp_path / 'w.safetensors'}")  # fmt: skip
    status, _, err = call(TINY, f"--workdir={root}", *given, "--config.networks.first.width=0.5")
    assert status == 2 and "--config.networks.first.width=0.125" in err
    assert not (root / "squeeze/first").exists()
    ok(root, *given, "--config.networks.first.width=0.125")
    assert (root / "squeeze/first/weights.safetensors").read_bytes() == weights.read_bytes()


def test_weights_are_read_before_anything_is_trained(tmp_path, reference):
    """Whatever the order of the teachers: those that train would take hours first."""
    (tmp_path / "w.safetensors").write_bytes((reference / "squeeze/first" / WEIGHTS).read_bytes())
    for field in ("checkpoint", "start_from"):
        root = tmp_path / field
        status, out, err = call(
            TINY, f"--workdir={root}", "--stages=squeeze", "--config.recover.pool=first",
            "--config.squeeze.teachers=outside,first", "--config.networks.first.width=0.5",
            f"--config.networks.first.{field}={tmp_path / 'w.safetensors'}",
        )  # fmt: skip
        assert status == 2 and "w.safetensors" in err and "outside" not in out
        assert not (root / "squeeze/outside").exists()
    # Of those with weights, the ones that are only read come before one that trains further.
    second = reference / "squeeze/second" / WEIGHTS
    status, out, err = call(
        TINY, f"--workdir={tmp_path / 'both'}", "--stages=squeeze", "--config.recover.pool=first",
        "--config.squeeze.teachers=second,first", "--config.networks.first.width=0.5",
        "--config.analyse.network=first",
        f"--config.networks.second.start_from={second}",
        f"--config.networks.first.checkpoint={tmp_path / 'w.safetensors'}",
    )  # fmt: skip
    assert status == 2 and "w.safetensors" in err and not (tmp_path / "both/squeeze").exists()


# --- adopting -------------------------------------------------------------------------------


def test_a_smaller_pool_adopts_its_teachers(tmp_path, reference):
    root = tmp_path / "sre2l"
    out = ok(
        root, f"--from={reference}", "--stages=squeeze", "--config.recover.pool=first",
        "--config.squeeze.teachers=first,outside",
    )  # fmt: skip
    assert f"adopted squeeze/first from {reference}" in out and "adopted recover" not in out
    assert sorted(p.name for p in (root / "squeeze").iterdir()) == ["first", "outside"]
    ours, theirs = (p / "squeeze/first/weights.safetensors" for p in (root, reference))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.stat().st_ino != theirs.stat().st_ino and not ours.is_symlink()
    # Labels and students of the controls do not depend on the pool.
    assert (root / "controls/random_real/relabel/manifest.json").exists()
    assert not (root / "recover").exists() and not (root / "validate").exists()


@pytest.mark.usefixtures("fast_alike")
def test_students_of_hard_labels_need_no_soft_ones(tmp_path, reference):
    hard = ("--config.validate.loss=ce", "--config.validate.controls=random_real_hard")
    root = tmp_path / "run"
    out = ok(root, f"--from={reference}", *hard)
    assert "relabel" not in out and not list(root.glob("**/relabel"))
    found = json.loads((root / "summary.json").read_text())
    assert "relabel" not in found and found["validate"]["outside"]["top1"] > 0
    status, out, err = call(TINY, *hard, "--plan")
    assert status == 0 and "no soft labels: validate.loss is ce" in out and "takes" in out, err
    assert "relabel takes" not in out

    # As a control of a run with soft labels they are the same students.
    beside = tmp_path / "beside"
    ok(beside, f"--from={reference}", "--config.validate.controls=synthetic_hard")
    summary = json.loads((beside / "summary.json").read_text())
    assert summary["controls"]["synthetic_hard"]["outside"]["top1"] > 0
    theirs = beside / "controls/synthetic_hard" / STUDENT
    ours, controls = (results(p) for p in (root / STUDENT, theirs))
    assert ours and ours == controls
    assert results(beside / STUDENT) != controls


def test_everything_that_fits_is_adopted(tmp_path, reference):
    before, root = snapshot(reference), tmp_path / "copy"
    out = ok(root, f"--from={reference}", "--config.validate.seeds=(0, 1)")
    for folder in (
        "squeeze/second",
        "recover",
        "relabel",
        STUDENT,
        f"controls/full_real/{STUDENT}",
    ):
        assert f"adopted {folder} from" in out
    for work in ("squeeze first", "recover: ", "relabel synthetic", "validate synthetic/outside/0"):
        assert work not in out
    assert "validate synthetic/outside/1: 12/12" in out
    assert snapshot(reference) == before
    theirs = results(reference)
    assert {k: v for k, v in results(root).items() if k in theirs and k != "diversity"} == {
        k: v for k, v in theirs.items() if k != "diversity"
    }


@pytest.mark.usefixtures("fast_alike")
def test_what_is_computed_in_bfloat16_is_said(tmp_path, reference):
    root = tmp_path / "half"
    narrow = [f"--config.{stage}.dtype=bfloat16" for stage in ("recover", "relabel", "validate")]
    ok(root, f"--from={reference}", *narrow)
    ours, theirs = results(root), results(reference)
    for path in theirs:
        same = path.startswith("squeeze/") or path.startswith("controls/") and "/images/" in path
        assert same == (ours[path] == theirs[path]) or path.endswith("record.json")
    precision = json.loads((root / "summary.json").read_text())["precision"]
    assert precision == {"squeeze": "float32", **dict.fromkeys(
        ("recover", "relabel", "validate"), "bfloat16"
    )}  # fmt: skip
    assert "bfloat16" in (root / "report.html").read_text()


def test_a_run_stopped_in_recover_goes_on_with_the_same_command(finished, reference):
    (finished / "recover" / "manifest.json").unlink()
    next((finished / "recover" / "units").iterdir()).unlink()
    ok(finished, f"--from={reference}")
    assert_same(finished, reference)


def test_a_workdir_does_not_adopt_from_itself(finished):
    assert "is the working directory itself" in refused(finished, f"--from={finished}")


# --- two runs -------------------------------------------------------------------------------


def test_a_locked_workdir_is_refused_and_a_dead_lock_taken_over(finished, reference):
    shutil.rmtree(finished / "analyse")
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        lock = {"host": socket.gethostname(), "pid": holder.pid, "alive": 0.0}
        (finished / ".lock").write_text(json.dumps(lock))
        err = refused(finished)
        assert f"in use by process {holder.pid} on {socket.gethostname()}" in err
    finally:
        holder.kill()
        holder.wait()
    (finished / "recover" / ".manifest.json.1a2b.tmp").write_text("half")
    ok(finished)
    assert_same(finished, reference)  # nothing half written
    assert not (finished / ".lock").exists()


# --- damage ---------------------------------------------------------------------------------


def replace_by_another(path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


@pytest.mark.parametrize("damage", [cut, flip, replace_by_another, os.unlink])
def test_a_damaged_image_is_named_set_aside_and_redone(finished, reference, damage):
    path = finished / "recover/images/00002/00001.png"
    damage(path)
    status, _, err = call(TINY, f"--workdir={finished}")
    assert status == 2 and str(path) in err and "Run the same command again" in err
    out = ok(finished)
    assert "recover: 12/12 iterations" in out  # one unit of four
    for aside in (finished / "recover/images").glob("*/*.set-aside-1"):
        aside.unlink()
    assert_same(finished, reference)


def test_an_image_of_another_size_is_redone(finished, reference):
    path = finished / "recover/images/00002/00001.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(path)
    status, _, err = call(TINY, f"--workdir={finished}")
    assert status == 2 and str(path) in err and "more are" not in err
    assert "recover: 12/12 iterations" in ok(finished)
    (path.parent / f"{path.name}.set-aside-1").unlink()
    assert_same(finished, reference)


def test_all_damaged_images_are_redone_at_once(finished, reference):
    """Of two units, one of which has lost both of its images."""
    images = finished / "recover/images"
    damaged = [images / "00000/00000.png", images / "00003/00001.png", images / "00002/00001.png"]
    for path in damaged:
        path.unlink()
    status, _, err = call(TINY, f"--workdir={finished}")
    assert status == 2 and "2 more are missing or damaged too" in err
    assert "recover: 24/24 iterations" in ok(finished)
    assert_same(finished, reference)


def test_an_image_damaged_before_the_manifest_is_redone_too(finished, reference):
    (finished / "recover/manifest.json").unlink()
    flip(finished / "recover/images/00000/00000.png")
    status, _, err = call(TINY, f"--workdir={finished}")
    assert status == 2 and "00000.png" in err
    assert "recover: 12/12 iterations" in ok(finished)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
def test_a_damaged_label_shard_is_named_set_aside_and_redone(finished, reference, damage):
    shard = finished / "relabel/labels-00000.array_record"
    shutil.rmtree(finished / STUDENT)
    data = shard.read_bytes()
    # The records stand at the file's beginning; most of the rest is padding.
    flip(shard, at=200 / len(data)) if damage is flip else damage(shard)
    status, out, err = call(TINY, f"--workdir={finished}")
    if damage is not os.unlink:  # a missing shard is simply made
        assert status == 2 and f"{shard} is damaged" in err and "Run the same command again" in err
        assert not (finished / STUDENT / "record.json").exists() and not shard.exists()
        ok(finished)
        (finished / "relabel/labels-00000.array_record.set-aside-1").unlink()
    assert_same(finished, reference)


@pytest.mark.parametrize("damage", [cut, flip, os.unlink])
def test_damaged_teacher_weights_are_named_and_redone(finished, reference, damage):
    weights = finished / "squeeze/first/weights.safetensors"
    shutil.rmtree(finished / "relabel")
    damage(weights)
    status, _, err = call(TINY, f"--workdir={finished}")
    assert status == 2 and f"{weights} is damaged" in err and f"Delete {weights.parent}" in err
    shutil.rmtree(weights.parent)
    ok(finished)
    assert_same(finished, reference)


@pytest.mark.parametrize("damage", [cut, flip])
@pytest.mark.parametrize(
    "name", ["squeeze/first/record.json", f"{STUDENT}/record.json", "recover/manifest.json"]
)
def test_a_damaged_record_is_named_and_redone(finished, reference, name, damage):
    path = finished / name
    if damage is flip:  # of a digit: other numbers, and still JSON
        text = path.read_text()
        at = text.index(".") + 1
        path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        json.loads(path.read_text())
    else:
        damage(path)
    err = refused(finished)
    assert f"{path} is damaged" in err and "move it away" in err
    path.unlink()
    ok(finished)
    assert_same(finished, reference)


def test_a_folder_without_fingerprint_is_not_continued(finished, reference):
    (finished / STUDENT / "fingerprint.json").unlink()
    out = ok(finished, "--stages=validate")
    assert f"{finished / STUDENT} has no fingerprint.json; it is set aside" in out
    shutil.rmtree(finished / f"{STUDENT}.set-aside-1")
    ok(finished)
    assert_same(finished, reference)


def test_a_control_s_images_are_those_of_its_settings(finished, reference):
    """Other real images under the same name are written anew, also where labels are online."""
    images = finished / "controls/random_real/images"
    workdir.write_fingerprint(images, {"of": "others"})
    for path in sorted((images / "00001").iterdir()):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    shutil.rmtree(finished / "controls/random_real/relabel")
    ok(finished)
    assert_same(finished, reference)


def test_half_of_a_control_s_images_are_completed(finished, reference):
    shutil.rmtree(finished / "controls/random_real/relabel")
    for path in (finished / "controls/random_real/images/00003").iterdir():
        path.unlink()
    ok(finished)
    assert_same(finished, reference)
    # Threads write them in any order: that the last is there says nothing of the first.
    (finished / "controls/random_real/images/00000/00001.png").unlink()
    ok(finished)
    assert_same(finished, reference)


def test_the_full_real_set_has_as_many_steps_and_at_least_a_teacher_s_epochs():
    """Four classes of two images in batches of four, six epochs: twelve steps."""
    e = resolve(tiny.get_config())

    def epochs(images: int, **squeeze) -> int:
        config = dataclasses.replace(e, squeeze=dataclasses.replace(e.squeeze, **squeeze))
        return validate.epochs_of_size(config, images)

    assert (e.validate.epochs, e.validate.batch_size, e.squeeze.batch_size) == (6, 4, 96)
    assert epochs(8) == 6  # a set of the synthetic size
    assert epochs(20, epochs=1) == 3  # 12 steps of 5 a pass
    assert epochs(400, epochs=1) == 1 and epochs(400, epochs=7) == 7
    assert epochs(400, epochs=1, least_steps=50) == 10  # 5 steps a pass of a teacher's batches
