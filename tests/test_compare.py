"""A comparison: every cell once, teachers shared, tables with their controls; and it continues."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import itertools
import json
import pathlib
import shutil
import signal

import numpy as np
import pytest
from helpers.command import call, snapshot
from helpers.compiling import only_fast_programs
from PIL import Image

from configs.digits import config as digits
from prism_jax import cells as runs
from prism_jax import compare, environment, parallel
from prism_jax.analysis import comparison
from prism_jax.analysis.cells import Entry, to_records
from prism_jax.analysis.differences import Choices
from prism_jax.analysis.intervals import Resampling
from prism_jax.config import resolve, to_dict
from prism_jax.data import answers, workdir
from prism_jax.errors import Unreachable, UserError
from prism_jax.main import parse
from prism_jax.stages import fingerprints, imported
from prism_jax.stages.context import Context
from prism_jax.stages.fingerprints import BITS_VERSION

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

ROOT = pathlib.Path(__file__).resolve().parent
TINY = f"--config={ROOT / 'configs' / 'tiny_compare.py'}"
TINY_IPC = "tests/configs/tiny_ipc.py"
DIFFUSION = f"--config={ROOT / 'configs' / 'tiny_diffusion_compare.py'}"
ONE = (TINY, "--config.seeds=(0,)", "--config.ipcs=(2,)")


def run(*arguments) -> tuple[int, str, str]:
    """The command in this process: (exit status, stdout, stderr)."""
    with contextlib.chdir(ROOT.parent):
        return call(*arguments, main=compare.main)


def config(*overrides):
    return parse([TINY, *overrides], [])[0]


def test_cells_and_their_experiments(monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    c = config()
    with c.unlocked():
        c.dataset = {"image_size": 16}
    assert compare.experiment_of(c, runs.Cell("prism", 1, 0, "own")).dataset.image_size == 16
    cells = compare.cells(c)
    # Two seeds, two IPCs: two methods under two protocols, the controls under one.
    assert len(cells) == len(set(cells)) == 2 * 2 * (2 * 2 + 1)
    assert cells[0] == runs.Cell("prism", 1, 0, "own")
    assert [cell[:3] for cell in cells if cell.protocol == "short"][:4] == [
        ("random_real", 1, 0), ("prism", 1, 0), ("gvbsm", 1, 0), ("random_real", 2, 0),
    ]  # fmt: skip
    short = compare.experiment_of(c, compare.Cell("gvbsm", 2, 1, "short"))
    assert (short.seed, short.validate.seeds, short.recover.ipc) == (1, (2, 3), 2)
    assert short.recover.method == "gvbsm" and short.recover.iterations == 3
    assert short.relabel.teachers == ("first",) and short.validate.controls == ()
    own = compare.experiment_of(c, compare.Cell("gvbsm", 2, 1, "own"))
    assert own.relabel.teachers == ("second",) and own.validate.controls == ("random_real",)
    controls = compare.experiment_of(c, compare.Cell("random_real", 1, 0, "short"))
    assert controls.validate.controls == ("random_real_hard", "full_real")
    assert controls.recover.iterations == 0 and controls.recover.pool == ()


@pytest.mark.parametrize(
    "name",
    ["digits", "digits:quick", "cifar10", "diffusion_digits", "cifar10:ipc1",
     "cifar10:ipc50", "cifar10:variants", "cifar10:crop", "cifar10:batch", "cifar10:published",
     "cifar10:ipc1,published", "cifar10:crop,published", "imagenette", "imagenet",
     "studies:crop", "studies:batch", "studies:selection", "studies:crop,digits",
     "studies:selection,digits", "studies:regularisation",
     "studies:text_to_image", "studies:regularisation,digits", "studies:regularisation,digits,clip",
     "studies:text_to_image,digits"],
)  # fmt: skip
def test_every_cell_of_the_shipped_comparisons_can_be_used(name, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    file, _, argument = name.partition(":")
    path = f"configs/compare/{file}.py" + (f":{argument}" if argument else "")
    c = parse([f"--config={path}"], problems := [])[0]
    cells = [cell for cell in compare.cells(c) if cell.seed == 0]
    experiments = {cell: compare.experiment_of(c, cell) for cell in cells}
    assert not problems
    assert len({runs.digest_of(e) for e in experiments.values()}) == len(cells)
    compare.choices_of(c)
    compare.check_config(c)
    # All share their teachers, and the process.
    runs.check_environment(experiments)
    assert len({e.squeeze for e in runs.with_all_teachers(experiments).values()}) == 1


def test_programs_of_finished_cells_are_given_up_where_memory_grows(monkeypatch):
    # Shares of the machine's memory as they are asked for: before, and after it is given up.
    shares, given_up = iter([0.1, 0.3, 0.2, 0.35, 0.45, 0.05, 0.24]), []
    monkeypatch.setattr(environment, "used_memory", lambda: next(shares))
    monkeypatch.setattr(parallel, "forget_programs", lambda: given_up.append(True))
    most = runs._forget(runs.MOST_MEMORY)
    assert most == 0.25 and not given_up
    most = runs._forget(most)  # 0.3, then 0.2: data, which may double
    assert most == 0.4 and len(given_up) == 1
    most = runs._forget(most)  # 0.35
    assert most == 0.4 and len(given_up) == 1
    most = runs._forget(most)  # 0.45, then 0.05
    assert most == 0.25 and len(given_up) == 2
    assert runs._forget(most) == 0.25 and len(given_up) == 2


@pytest.mark.parametrize("kind", [UserError, Unreachable])
def test_a_refusal_names_its_cell_and_no_flag_that_is_not_there(kind):
    cell = runs.Cell("prism", 1, 0, "own")
    with pytest.raises(kind) as refused, runs._named(cell):
        raise kind("use another --workdir (with --from=x)")
    said = str(refused.value)
    assert said.startswith("prism/ipc1/seed0/own: use another --workdir")
    assert "take no --from" in said
    with pytest.raises(kind, match="^prism/ipc1/seed0/own: no such file$"), runs._named(cell):
        raise kind("no such file")


def test_used_memory_is_that_of_the_system():
    before = environment.used_memory()
    held = b"1" * (1 << 28)
    grown = (environment.used_memory() - before) * environment.memory()
    assert 0.9 * len(held) < grown < 1.5 * len(held)


def test_finished_cells_stay_finished_where_a_younger_field_means_what_they_had():
    experiment = resolve(digits(10))
    before = to_dict(experiment)
    del before["generate"]["encode_batch_size"]
    assert runs.digest_of(experiment) == workdir.digest({"bits_version": BITS_VERSION, **before})
    apart = dataclasses.replace(experiment.generate, encode_batch_size=4)
    other = dataclasses.replace(experiment, generate=apart)
    assert runs.digest_of(other) != runs.digest_of(experiment)


@pytest.mark.parametrize("study", ["regularisation", "text_to_image"])
@pytest.mark.parametrize("dataset", ["imagenet", "digits"])
def test_studies_of_images_train_as_the_study_of_teachers_does(study, dataset, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    selection = resolve(parse([f"--config=configs/methods/prism_selection.py:{dataset}"], [])[0])
    c = parse([f"--config=configs/compare/studies.py:{study},{dataset}"], [])[0]
    for cell in compare.cells(c):
        e = compare.experiment_of(c, cell)
        assert e.relabel == selection.relabel
        assert e.validate == dataclasses.replace(selection.validate, controls=e.validate.controls)
        assert e.recover.ipc == {"imagenet": 1200, "digits": 10}[dataset]
    with pytest.raises(UserError, match="cannot be loaded"):
        parse([f"--config=configs/compare/studies.py:{study},cifar10"], [])
    with pytest.raises(UserError, match="the word clip"):
        parse([f"--config=configs/compare/studies.py:{study},imagenet,clip"], [])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One seed and one IPC of the tiny comparison, stopped once and continued."""
    root = tmp_path_factory.mktemp("compare") / "run"
    arguments = (*ONE, f"--workdir={root}")
    run_cell, count = compare.Comparison._run, []

    def stopping(self, cell, squeezed, stop, provenance):
        count.append(cell)
        if len(count) == 3:
            stop.signum = signal.SIGTERM
        run_cell(self, cell, squeezed, stop, provenance)

    compare.Comparison._run = stopping
    try:
        status, _, err = run(*arguments)
    finally:
        compare.Comparison._run = run_cell
    assert status == 128 + signal.SIGTERM and "Run the same command again" in err
    shutil.copy(root / "records.json", root.parent / "stopped.json")
    status, out, err = run(*arguments)
    assert status == 0, err
    assert out.count("cell 1 of 3") == 1  # of five, two were finished
    return root, out


def test_one_that_was_stopped_has_the_records_of_what_was_finished(finished, tmp_path):
    root, _ = finished
    stopped = root.parent / "stopped.json"
    early, late = (workdir.read_record(p)["cells"] for p in (stopped, root / "records.json"))
    assert len(early) == 2 and len(late) == 5
    assert all(cell in late for cell in early)
    assert compare.main([f"--records={stopped}", f"--workdir={tmp_path}"]) == 0
    assert (tmp_path / "accuracy_over_cost.png").exists()
    assert "| prism " in (tmp_path / "table.md").read_text()


def test_every_cell_is_made_once_and_teachers_are_shared(finished):
    root, _ = finished
    cells = sorted(str(p.parent.relative_to(root / "cells")) for p in root.rglob("cell.json"))
    assert len(cells) == 5 and "gvbsm/ipc2/seed0/short" in cells
    weights = {p.read_bytes() for p in root.glob("cells/*/*/*/*/squeeze/first/weights.safetensors")}
    weights.add((root / "teachers/squeeze/first/weights.safetensors").read_bytes())
    assert len(weights) == 1
    images = [
        [p.read_bytes() for p in sorted((root / f"cells/prism/ipc2/seed0/{which}").rglob("*.png"))
         if "recover/images" in str(p)]
        for which in ("own", "short")
    ]  # fmt: skip
    assert len(images[0]) == 8 and images[0] == images[1]
    assert list(root.glob("teachers/squeeze/*/statistics/conv-*/record.json"))
    assert not list(root.glob("cells/gvbsm/**/shards"))

    before = snapshot(root, "cells", "teachers")
    status, out, _ = run(*ONE, f"--workdir={root}")
    assert status == 0 and "cell 1" not in out
    assert snapshot(root, "cells", "teachers") == before


def test_a_cell_whose_record_is_of_an_older_version_is_recorded_anew(finished, tmp_path):
    """And nothing of it is made again: students without answers stay as they are."""
    root, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    path = copy / "cells/prism/ipc2/seed0/short/cell.json"
    record, students = json.loads(path.read_text()), path.parent / "validate"
    record.pop("checksum")
    workdir.write_record(path, {k: v for k, v in record.items() if k not in ("version", "right")})
    (students / "outside/0/answers.json").unlink()
    before = snapshot(students)
    status, out, err = run(*ONE, f"--workdir={copy}")
    assert status == 0 and "cell 1 of 1: prism/ipc2/seed0/short" in out, err
    assert snapshot(students) == before
    found = workdir.read_record(path)
    assert found["version"] == record["version"]
    right = record["right"]["synthetic"]["test"]["outside"]
    assert found["right"]["synthetic"]["test"]["outside"] == [None, right[1]]
    table = (copy / "table.md").read_text()
    assert "1 seed(s) of images, 1 or 2 student(s)" in table.split("#### short, IPC 2, outside")[1]


@pytest.mark.parametrize(
    ("own", "made"), [("None", 0), ("('validate.controls=random_real','validate.epochs=2')", 2)]
)
def test_what_was_found_of_images_stays_where_the_protocol_that_found_it_goes(
    finished, tmp_path, own, made
):
    """Left out, or with other students; what every cell knows of its images is the same."""
    root, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(root, copy)

    def similar(of):
        lines = list(csv.DictReader(io.StringIO((of / "table.csv").read_text())))
        return {(x["method"], x["protocol"]): x["intra_class_cosine"] for x in lines
                if x["set"] == "synthetic"}  # fmt: skip

    before = similar(root)
    assert all(before.values()) and before["prism", "own"] == before["prism", "short"]
    status, out, err = run(*ONE, f"--config.protocols.own={own}", f"--workdir={copy}")
    assert status == 0 and out.count(": prism/") + out.count(": gvbsm/") == made, err
    after = similar(copy)
    assert after == {key: before[key] for key in after} and ("gvbsm", "short") in after
    # A finished cell that does not say it is no reason to leave it out.
    for path in (copy / "cells/prism").rglob("cell.json"):
        record = workdir.read_record(path)
        record["summary"].pop("analyse")
        workdir.write_record(path, record)
    other = "('validate.controls=random_real','validate.epochs=1')"
    status, _, err = run(*ONE, f"--config.protocols.own={other}", f"--workdir={copy}")
    assert status == 0 and similar(copy)["prism", "own"] == before["prism", "own"], err


def test_nothing_is_added_to_cells_of_other_images_or_weights(finished, tmp_path):
    """The settings name files; a table of before and after they changed would be of neither."""
    root, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(root, copy)
    path = copy / "cells/prism/ipc2/seed0/short/cell.json"
    record = workdir.read_record(path)
    assert set(record["read"]) == {
        "train images", "test images", "teacher first", "teacher second", "teacher outside",
    }  # fmt: skip
    more = (TINY, "--config.seeds=(0,)", "--config.ipcs=(1,2)", f"--workdir={copy}")
    for what in ("test images", "teacher second"):
        workdir.write_record(path, {**record, "read": {**record["read"], what: "another"}})
        before = snapshot(copy)
        status, _, err = run(*more)
        assert status == 2 and f"(prism/ipc2/seed0/short) were made from other {what}" in err
        assert snapshot(copy) == before
    # What is finished is shown, wherever its images are now.
    assert run(*ONE, f"--workdir={copy}")[0] == 0
    del record["read"]  # of an older comparison
    workdir.write_record(path, record)
    status, _, err = run(*more)
    assert status == 0, err


def _recorded(root, experiment):
    """A comparison whose one cell is finished, as far as its record says, and that record."""
    cell = runs.Cell("prism", 2, 0, "own")
    made = compare.Comparison(root, {cell: experiment}, {}, None, "seconds")
    context = Context(experiment, str(made.folder(cell)))
    record = {
        "experiment": made.digest(cell),
        "version": compare.RECORD_VERSION,
        "read": runs.read_by(context, root),
    }
    made.folder(cell).mkdir(parents=True)
    workdir.write_record(made.folder(cell) / "cell.json", record)
    return made, made.folder(cell) / "cell.json", record


def _forget(path, record, what):
    """As an older cell's record is."""
    read = {k: v for k, v in record["read"].items() if k != what}
    workdir.write_record(path, {**record, "read": read})


def test_nothing_is_added_to_cells_that_began_with_other_images(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    start = tmp_path / "start"
    for cls, i in itertools.product(range(4), range(2)):
        (start / str(cls)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * cls + i).save(start / str(cls) / f"{i}.png")
    at = f"recover.initialise_from={start}"
    row = f"('{TINY_IPC}','recover.initialise=folder','{at}','recover.iterations=0')"
    experiment = compare.experiment_of(
        config(f"--config.rows.prism={row}"), runs.Cell("prism", 2, 0, "own")
    )
    made, path, record = _recorded(tmp_path / "run", experiment)
    made._check_finished()
    Image.effect_noise((8, 8), 90).save(start / "3" / "1.png")
    with pytest.raises(
        UserError, match=r"\(prism/ipc2/seed0/own\) were made from other initial im"
    ):
        made._check_finished()
    _forget(path, record, "initial images")
    shutil.rmtree(start)
    made._check_finished()
    # Images that another cell made are that one's: its digest is part of this one's.
    there = str(tmp_path / "run" / "cells" / "d4m" / "images")
    inside = dataclasses.replace(experiment.recover, initialise_from=there)
    context = Context(dataclasses.replace(experiment, recover=inside), str(tmp_path))
    assert "initial images" not in runs.read_by(context, tmp_path / "run")


@pytest.mark.parametrize("what", ["generator", "CLIP", "labels"])
def test_nothing_is_added_to_cells_of_other_networks_or_labels_of_others(
    what, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT.parent)
    e = compare.experiment_of(config(), runs.Cell("prism", 2, 0, "own"))
    e = {
        "generator": lambda: dataclasses.replace(
            e,
            recover=dataclasses.replace(e.recover, maker="generate"),
            generate=dataclasses.replace(e.generate, directory="there"),
        ),
        "CLIP": lambda: dataclasses.replace(e, recover=dataclasses.replace(e.recover, clip=0.5)),
        "labels": lambda: dataclasses.replace(
            e, relabel=dataclasses.replace(e.relabel, labels_from="there")
        ),
    }[what]()
    content = ["before"]
    monkeypatch.setattr(fingerprints, "generator", lambda context: {"files": content[0]})
    monkeypatch.setattr(fingerprints, "clip", lambda context: {"image_encoder": content[0]})
    monkeypatch.setattr(imported, "digest_of_labels", lambda context: content[0])
    made, path, record = _recorded(tmp_path / "run", e)
    assert what in record["read"] and len(record["read"]) == 6
    made._check_finished()
    content[0] = "after"
    with pytest.raises(UserError, match=f"were made from other {what} than"):
        made._check_finished()
    _forget(path, record, what)
    made._check_finished()


def test_the_tables_hold_every_method_and_its_controls(finished):
    root, out = finished
    table = (root / "table.md").read_text()
    assert table in out
    for row in ("prism", "gvbsm", "prism: random real, soft labels", "random real, hard labels",
                "full real training set"):  # fmt: skip
        assert f"\n| {row} |" in table
    own, short = table.split("### Costs")[0].split("### Protocol: ")[1:]
    assert own.startswith("own") and "full real" not in own
    assert "random real, soft labels" in short and "prism:" not in short
    lines = list(csv.DictReader(io.StringIO((root / "table.csv").read_text())))
    assert len(lines) == 2 * 2 + 2 + 3  # own with a control each; short; the controls' sets
    record = json.loads(
        (root / "cells/prism/ipc2/seed0/own/validate/outside/0/record.json").read_text()
    )
    [line] = [x for x in lines if (x["method"], x["ipc"], x["protocol"], x["set"])
              == ("prism", "2", "own", "synthetic")]  # fmt: skip
    of_seeds = line["top1_per_seed"].split()
    assert of_seeds[0] == str(record["top1"]) and len(of_seeds) == 2
    assert int(line["recover_peak_bytes"]) > 1000
    assert (root / "accuracy_over_cost.png").read_bytes().startswith(b"\x89PNG")
    # Beside each accuracy what it took, and how certain it is.
    seconds = [float(line[f"{stage}_seconds"]) for stage in ("squeeze", "recover", "validate")]
    assert min(seconds) > 0 and float(line["bytes"]) == 8 * 64 + float(line["label_bytes"])
    certain = table.split("### How certain")[1]
    assert "#### short, IPC 2, outside" in certain
    assert "1 seed(s) of images, 2 student(s)" in certain
    answers = list(csv.DictReader(io.StringIO((root / "differences.csv").read_text())))
    [found] = [x for x in answers if (x["method"], x["protocol"], x["set"], x["why"])
               == ("prism", "own", "synthetic", "")]  # fmt: skip
    assert float(found["value"]) == pytest.approx(float(line["top1"]), abs=1e-6)
    tex = (root / "table.tex").read_text()
    assert tex.count(r"\toprule") == 2 and r"\multicolumn{1}{c}{IPC 2}" in tex


def test_the_plan_says_what_is_finished(finished):
    root, _ = finished
    status, out, _ = run(TINY, f"--workdir={root}", "--plan")
    assert status == 0
    assert out.count("done ") == 5 and out.count("to do ") == 15  # IPC 1's and the second seed's


def test_a_row_starts_from_the_images_of_one_before_it(monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    c = parse([DIFFUSION], [])[0]
    cells = {cell.row: cell for cell in compare.cells(c)}
    start = compare.start_of(c, cells["from_medoids"])
    assert (start.cell, start.control) == (cells["d4m"], "medoids")
    assert start.images == "cells/d4m/ipc2/seed0/single/controls/medoids/images"
    experiments = {cell: compare.experiment_of(c, cell) for cell in cells.values()}
    recover = experiments[cells["from_d4m"]].recover
    assert (recover.initialise, recover.initialise_from) == (
        "folder", "cells/d4m/ipc2/seed0/single/recover/images",
    )  # fmt: skip
    starts = {cell: found for cell in experiments if (found := compare.start_of(c, cell))}

    def digests(changed):
        found = compare.Comparison(pathlib.Path("x"), changed, starts, None, "seconds")
        assert found.experiments[cells["from_d4m"]].recover.initialise_from.startswith("x/cells/")
        return found._digests

    # A row is another one where that is which it starts from.
    other = dataclasses.replace(experiments[cells["d4m"]], seed=5)
    before, after = digests(experiments), digests({**experiments, cells["d4m"]: other})
    assert {cell.row for cell in before if before[cell] != after[cell]} == {
        "d4m", "from_d4m", "from_medoids",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("starts.from_d4m=random", "starts from 'random'; allowed: the rows before it"),
        ("starts.d4m=from_d4m", "starts from 'from_d4m'; allowed: the rows before it"),
        ("starts.from_d4m=d4m/no_anchors", "the sets of d4m that it can start from are medoids"),
        ("reference=nothing", "reference names 'nothing'; allowed: d4m, d4m/medoids"),
        ("selected_real=('prims',)", "selected_real names 'prims'"),
        ("resamples=3", "resamples is 3"),
        ("more_controls.guided=('medoids',)", "and guided has one of these too"),
    ],
)
def test_starts_and_choices_that_there_are_not_are_refused(tmp_path, override, said):
    status, _, err = run(DIFFUSION, f"--config.{override}", f"--workdir={tmp_path}")
    assert status == 2 and said in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config=configs/digits_ipc10.py",), "has no ipcs, seeds, student_seeds, rows"),
        (("--config=configs/audit/digits.py",), "nothing to compare; --config takes a file of"),
        ((TINY, "--config.seeds=()"), "has no cells: rows prism, gvbsm, random_real"),
        ((TINY, "--config.ipcs=()"), "short, ipcs (), seeds (0, 1); it needs one of each"),
        ((TINY, "--config.protocols.own=None", "--config.protocols.short=None"), "protocols none"),
        ((TINY, "--config.shared=None"), "has no shared, so nothing to compare"),
        ((TINY, "--config.rows.prism=()"), "rows.prism is empty"),
        ((TINY, f"--config.rows.gvbsm=('{TINY_IPC}','parallel.deterministic=False')"),
         "is True (prism/ipc1/seed0/own) and False (gvbsm/ipc1/seed0/own)"),
        ((TINY, "--config.protocols.short=('parallel.matmul_precision=highest',)"),
         "'highest' (random_real/ipc1/seed0/short); one process makes all cells"),
        ((TINY, "--stages=squeeze"), "--stages is a flag of prism_jax.main, and means nothing to"),
        ((TINY, "--from=/no/such/dir", "--processes=2"), "--processes is a flag of prism_jax.main"),
        ((TINY, "--config.seeds=(0.5,)"), "seeds has 0.5; a seed is a whole number"),
        ((TINY, "--config.seeds=('a',)"), "seeds has 'a'; a seed is a whole number"),
        ((TINY, "--config.shared=('recover.ipc=4',)", "--plan"),
         "prism/ipc1/seed0/own: recover.ipc is 4, and its column IPC 1"),
        ((TINY, "--config.control_sets=('random_real','full_real')"),
         "random_real is a row, and a set that the row random_real trains on beside"),
    ],
)  # fmt: skip
def test_what_is_no_comparison_is_one_message(tmp_path, arguments, said):
    status, _, err = run(*arguments, f"--workdir={tmp_path}")
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [ONE, ("--records=docs/results/cifar10_records.json",)])
def test_a_folder_that_cells_cannot_lie_in_is_one_message(arguments, tmp_path):
    (tmp_path / "file").touch()
    for where, said in (("gs://bucket/x", "is in an object store"), ("file", "is a file; name a")):
        path = where if ":" in where else tmp_path / where
        status, out, err = run(*arguments, f"--workdir={path}")
        assert status == 2 and said in err and len(err.splitlines()) == 1 and not out
    assert not (ROOT.parent / "gs:").exists()


@pytest.mark.parametrize(
    "unset",
    ["starts", "more_controls", "more_controls.d4m", "reference", "selected_real", "controls"],
)
def test_what_a_comparison_may_have_may_be_unset(tmp_path, unset):
    """Which leaves it out; what asks for it says so."""
    plain = ("--config.starts.from_medoids=None", "--config.selected_real=()")
    none = f"--config.{unset}=None"
    status, out, err = run(DIFFUSION, *plain, none, "--plan", f"--workdir={tmp_path}")
    assert status == 0 and out.count("to do ") == 4, err
    status, _, err = run(DIFFUSION, "--config.more_controls=None", "--plan")
    assert status == 2 and "the sets of d4m that it can start from are none" in err


def test_what_all_cells_ask_of_the_process_is_not_refused(monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    c = config("--config.shared=parallel.matmul_precision=highest")
    experiments = {cell: compare.experiment_of(c, cell) for cell in compare.cells(c)}
    assert {e.parallel.matmul_precision for e in experiments.values()} == {"highest"}
    runs.check_environment(experiments)


def test_records_and_where_tables_go_may_be_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    found = [entry("a", 0, 0.5)]
    records = to_records(found, Choices(Resampling(resamples=100)))
    workdir.write_record(tmp_path / "made" / "records.json", records)
    status, _, err = call("--records=~/made", "--workdir=~/tables", main=compare.main)
    assert status == 0 and (tmp_path / "tables" / "table.md").exists(), err
    assert not (tmp_path / "~").exists()
    # What has a checksum and a schema is not therefore a record of cells.
    workdir.write_record(tmp_path / "summary.json", {"schema": 1, "config": "digits"})
    status, _, err = call("--records=~/summary.json", main=compare.main)
    assert status == 2 and f"{tmp_path}/summary.json: these are no records" in err


@pytest.mark.slow
def test_a_generator_and_anchors_are_made_once_and_rows_start_where_they_say(tmp_path):
    status, _, err = run(DIFFUSION, f"--workdir={tmp_path}")
    assert status == 0, err
    cells = tmp_path / "cells"
    generators = list(tmp_path.rglob("squeeze/generator/weights.safetensors"))
    assert len(list((tmp_path / "generators").iterdir())) == 1 and len(generators) == 3
    assert len({path.read_bytes() for path in generators}) == 1
    assert not (tmp_path / "teachers/squeeze/generator").exists()
    own, taken = (cells / row / "ipc2/seed0/single/generate" for row in ("d4m", "guided"))
    assert (own / "latents").exists() and not (taken / "latents").exists()
    for path in (own / "anchors").iterdir():
        assert (taken / "anchors" / path.name).read_bytes() == path.read_bytes()

    def images(*parts):
        folder = cells.joinpath(*parts)
        return [p.read_bytes() for p in sorted(folder.rglob("*.png"))]

    d4m, medoids = (
        images("d4m/ipc2/seed0/single", *inside)
        for inside in (("recover", "images"), ("controls", "medoids", "images"))
    )
    assert len(d4m) == len(medoids) == 8 and d4m != medoids
    assert images("from_d4m/ipc2/seed0/single/recover/images") == d4m
    assert images("from_medoids/ipc2/seed0/single/recover/images") == medoids


def test_the_tables_are_made_anew_from_the_records(finished, tmp_path):
    root, _ = finished
    record = json.loads((root / "records.json").read_text())
    assert len(record["cells"]) == 5
    status, out, _ = run(f"--records={root}", f"--workdir={tmp_path}")
    assert status == 0
    for name in ("table.md", "table.tex", "table.csv", "differences.csv"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), name
    assert (tmp_path / "table.md").read_text() in out
    record["cells"][0]["summary"]["validate"]["outside"]["top1"] = 0.5
    (tmp_path / "other.json").write_text(json.dumps(record))
    for arguments, said in (
        ((f"--records={tmp_path / 'other.json'}",), "is damaged"),
        ((f"--records={tmp_path / 'none.json'}",), "there is no"),
        ((f"--records={root}", "--cost=euros"), "allowed: seconds, work, bytes, recover, memory"),
        ((f"--records={root}", "--plan"), "goes with --workdir and --cost, not --plan"),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and said in err


def test_the_plan_for_a_machine_adds_up_what_every_row_takes(tmp_path, monkeypatch):
    from prism_jax.accelerators import forecast, targets

    def stages(experiment, target, known):
        assert target.name == "h100"
        hours = 3.0 if experiment.recover.iterations else None
        return {
            "recover takes": forecast.Stage(hours, "so long"),
            "outside takes": forecast.Stage(0.5, "as long as that"),
        }

    monkeypatch.setattr(forecast, "stages", stages)
    monkeypatch.setattr(targets, "compiler_missing", lambda target: None)
    status, out, err = run(TINY, f"--workdir={tmp_path}", "--plan", "--target=h100")
    assert status == 0, err
    # 20 cells; images of two methods, two IPCs, two seeds, once for both protocols.
    assert "prism, IPC 2, short: 2 x" in out and out.count("recover takes so long") == 6
    assert f"in all {20 * 0.5 + 8 * 3:.1f} h" in out and "and 2 parts that are not forecast" in out
    assert list(tmp_path.iterdir()) == []
    status, _, err = run(TINY, "--target=h100")
    assert status == 2 and "--target=h100 goes with --plan" in err


def test_what_some_row_needs_is_said_before_any_work(tmp_path):
    absent = "networks.second.checkpoint=nowhere.pth"
    more = f"--config.rows.gvbsm=('{TINY_IPC}','{absent}')"
    status, _, err = run(*ONE, more, f"--workdir={tmp_path}")
    assert status == 2 and "the weights nowhere.pth" in err and "(for gvbsm)" in err
    assert list(tmp_path.iterdir()) == []
    # A row that is left out needs nothing.
    status, out, err = run(*ONE, "--config.rows.gvbsm=None", "--plan", f"--workdir={tmp_path}")
    assert status == 0 and "prism/ipc2" in out and "gvbsm" not in out, err
    names = [name for name in ("own", "single") if f"/{name}" in out]
    assert names, out
    left_out = f"--config.protocols.{names[0]}=None"
    status, out, err = run(TINY, left_out, "--plan", f"--workdir={tmp_path}")
    assert status == 0 and f"/{names[0]}\n" not in out, err


def test_what_cannot_be_compared_is_refused(tmp_path):
    status, _, err = run(TINY, "--config.shared=recover.ipd=3", f"--workdir={tmp_path}")
    assert status == 2 and "prism/ipc1/seed0/own" in err and "recover.ipd" in err
    other = f"--config.rows.gvbsm=('{TINY_IPC}','squeeze.epochs=7')"
    status, _, err = run(*ONE, other, f"--workdir={tmp_path}")
    assert status == 2 and "gvbsm/ipc2/seed0/own trains its teachers differently" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_a_row_whose_teachers_do_not_read_its_images_is_refused(tmp_path, plan):
    row = f"--config.rows.gvbsm=('{TINY_IPC}','recover.method=fadrm','recover.phase_sizes=4,8')"
    status, _, err = run(*ONE, row, f"--workdir={tmp_path}", *plan)
    assert status == 2 and "row gvbsm: teacher first does not read images of 4 px" in err
    assert list(tmp_path.iterdir()) == []


# --- tables by hand -----------------------------------------------------------------------------


def entry(row, seed, top1, *, ipc=1, protocol="single", control=None, **fields) -> Entry:
    def result(value):
        return {"net_a": {"top1": value, "top5": 1.0, "best_top1": value,
                          "top1_per_seed": [value]}}  # fmt: skip

    summary = {"validate": result(top1), "recover": {"seconds_per_image": 2.0 + seed}}
    if control is not None:
        summary["controls"] = {"random_real": result(control)}
    return Entry(row, ipc, seed, protocol, summary, fields.get("peak", 10**6))


def with_records(path, *entries, **choices):
    choices = Choices(**{"resampling": Resampling(resamples=100), **choices})
    workdir.write_record(path / "records.json", to_records(entries, choices))
    return path


def test_seeds_that_machines_shared_out_are_one_table(tmp_path):
    """The same bytes as of a comparison that has them all."""
    first, second = [entry("a", 0, 0.5), entry("b", 0, 0.3)], [entry("a", 1, 0.6)]
    one = with_records(tmp_path / "one", *first, reference="a")
    two = with_records(tmp_path / "two", *second, reference="a", selected_real=("b",))
    whole = with_records(tmp_path / "whole", *first, *second, reference="a", selected_real=("b",))
    for records, folder in ((f"{one},{two}/records.json", "merged"), (str(whole), "tables")):
        assert run(f"--records={records}", f"--workdir={tmp_path / folder}")[0] == 0
    for name in ("table.md", "table.tex", "table.csv", "differences.csv"):
        found, wanted = ((tmp_path / f / name).read_bytes() for f in ("merged", "tables"))
        assert found == wanted
    assert "55.0 ± 7.1" in (tmp_path / "merged" / "table.md").read_text()
    found, wanted = ((f / "records.json").read_bytes() for f in (tmp_path / "merged", whole))
    assert found == wanted
    assert not (tmp_path / "tables" / "records.json").exists()


def _tested(seed, images):
    right = {"synthetic": {"test": {"net_a": [answers.pack_right(np.ones(images, bool))]}}}
    return dataclasses.replace(entry("a", seed, 0.5), right=right)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([entry("a", 0, 0.6)], "both have a of 1 images per class, seed 0, under single"),
        ([dataclasses.replace(entry("a", 1, 0.6), summary={"protocol": {"epochs": 5}})],
         "the protocol of a at 1 under single is None in one and {'epochs': 5} in the other"),
        ([_tested(1, 90)], "the number of images of test is 100 in one and 90 in the other"),
    ],
)  # fmt: skip
def test_records_that_do_not_belong_together_are_refused(tmp_path, others, said):
    one = with_records(tmp_path / "one", _tested(0, 100))
    two = with_records(tmp_path / "two", *others)
    status, out, err = run(f"--records={one},{two}", f"--workdir={tmp_path / 'none'}")
    assert status == 2 and said in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "none").exists()
    other = with_records(tmp_path / "other", _tested(1, 100), reference="a")
    status, _, err = run(f"--records={one},{other}")
    assert status == 2 and "the reference is None in one and a in the other" in err
    status, _, err = run(f"--records={one},{one}")
    assert status == 2 and "twice" in err
    # What was recorded by several versions in one place is read as before.
    younger = dataclasses.replace(
        entry("a", 1, 0.6), summary={**entry("a", 1, 0.6).summary, "protocol": {"epochs": 5}}
    )
    mixed = with_records(tmp_path / "mixed", _tested(0, 100), younger)
    assert run(f"--records={mixed}")[0] == 0
    assert run(f"--records={one},{with_records(tmp_path / 'good', _tested(1, 100))}")[0] == 0


def test_means_and_spreads_by_hand():
    entries = [
        entry("a", 0, 0.5), entry("a", 1, 0.6), entry("a", 2, 0.7),
        entry("b", 0, 0.25), entry("a", 0, 0.9, protocol="own", control=0.8),
        entry("a", 0, 0.4, ipc=10),
    ]  # fmt: skip
    single, own = comparison.grids(entries)
    assert single.columns == [(1, "net_a"), (10, "net_a")]
    assert comparison.spread(single.rows["a"][1, "net_a"]) == "60.0 ± 10.0"
    assert comparison.spread(single.rows["b"][1, "net_a"]) == "25.0"
    assert comparison.spread(single.rows["b"].get((10, "net_a"), ())) == "–"
    assert own.rows["a: random real, soft labels"] == {(1, "net_a"): [0.8]}
    text = comparison.markdown(entries)
    assert "| a | 60.0 ± 10.0 | 40.0 |" in text and "| b | 25.0 (1 of 3) |" in text
    assert "over up to 3 (in brackets: of fewer) seed(s) of images" in text
    # Twin: the population's deviation would be 8.2.
    assert "8.2" not in text
    tex = comparison.latex(entries)
    assert r"a & 60.0 $\pm$ 10.0 & 40.0 \\" in tex and r"net\_a" in tex
    costs = {(row[0], row[1]): row for row in comparison.costs(entries)}
    assert costs["a", "1"][2:4] == ["2.75 s", "1.00 MB"]
