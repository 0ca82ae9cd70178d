"""An audit: who has which canaries, tables of attacks, and shadow runs stopped and continued."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import pathlib
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.command import call

from prism_jax.analysis import audit, membership
from prism_jax.audit import canaries, observing
from prism_jax.audit.__main__ import main
from prism_jax.audit.rows import check_config, of_row, of_run
from prism_jax.audit.shadows import Shadows
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.main import parse
from prism_jax.types import Normalisation

ROOT = pathlib.Path(__file__).resolve().parent
TINY = f"--config={ROOT / 'configs' / 'tiny_audit.py'}"
LABELS = np.repeat(np.arange(3), 30)


def run(*arguments) -> tuple[int, str, str]:
    """The command in this process: (exit status, stdout, stderr)."""
    with contextlib.chdir(ROOT.parent):
        return call(*arguments, main=main)


# --- who has which --------------------------------------------------------------------------


def test_every_canary_is_in_half_of_the_runs_and_no_other_image_is_one():
    plan = canaries.plan_of(LABELS, canaries=8, always=4, runs=10, seed=3)
    assert len(set(plan.canaries_N.tolist())) == 24
    assert np.bincount(LABELS[plan.canaries_N]).tolist() == [8, 8, 8]
    assert (plan.member_RN.sum(0) == 5).all()
    assert (plan.member_RN[::2] != plan.member_RN[1::2]).all()
    assert len(np.unique(plan.member_RN, axis=0)) == 10
    for run_ in range(10):
        members, without = plan.chosen(run_, "members"), plan.chosen(run_, "without")
        assert set(members) == set(plan.canaries_N[plan.member_RN[run_]]) | set(plan.always_M)
        assert not set(without) & set(plan.canaries_N) and set(plan.always_M) <= set(without)
        for chosen in (members, without):
            assert np.bincount(LABELS[chosen]).tolist() == [8, 8, 8]  # 4 of their own, 4 of all
            assert (np.diff(chosen) > 0).all()
    # More runs keep what fewer have; another seed has other canaries.
    more = canaries.plan_of(LABELS, canaries=8, always=4, runs=12, seed=3)
    assert (more.member_RN[:10] == plan.member_RN).all()
    assert all(map(np.array_equal, more.without, plan.without))
    other = canaries.plan_of(LABELS, canaries=8, always=4, runs=10, seed=4)
    assert set(other.canaries_N) != set(plan.canaries_N)


def test_one_image_is_exchanged_for_another_of_its_class():
    plan = canaries.plan_of(LABELS, canaries=8, always=0, runs=6, seed=0)
    before, after = plan.chosen(0, "members"), plan.exchanged(0, 1, LABELS)
    (at,) = np.flatnonzero(before != after)
    assert LABELS[before[at]] == LABELS[after[at]] == 1
    assert after[at] in plan.canaries_N and after[at] not in before
    # None that is spared, as those that synthetic images start from.
    mine = before[(LABELS[before] == 1) & np.isin(before, plan.canaries_N)]
    (at,) = np.flatnonzero(before != plan.exchanged(0, 1, LABELS, set(mine[1:].tolist())))
    assert before[at] == mine[0]
    with pytest.raises(UserError, match="canaries of class 1 in run 0 all start synthetic images"):
        plan.exchanged(0, 1, LABELS, set(mine.tolist()))


@pytest.mark.parametrize(
    "numbers, said",
    [
        (dict(runs=5), "even, and at least 6"),
        (dict(runs=4), "even, and at least 6"),
        (dict(canaries=7), "must be even"),
        (dict(canaries=22), "has 30 training images, and 33 of every class"),
        (dict(always=20), "lower canaries or always"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(numbers, said):
    with pytest.raises(UserError, match=said):
        canaries.plan_of(LABELS, **{"canaries": 8, "always": 0, "runs": 6, "seed": 0, **numbers})


def test_the_runs_of_a_row_differ_in_seeds_and_images_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT.parent)
    shadows = Shadows(tmp_path / "run", parse([TINY], [])[0])
    assert len(shadows.experiments) == 6 * 3
    first, again = (c for c in shadows.experiments if c.row == "prism" and c.seed < 2)
    a, b = shadows.experiments[first], shadows.experiments[again]
    assert (a.seed, a.squeeze.seed, a.validate.seeds) == (0, 0, (0,))
    assert of_run(a, b.dataset.path, 1) == b and a.dataset.path != b.dataset.path
    kinds = {cell.row: shadows.teachers(cell).name for cell in shadows.experiments}
    assert kinds == {"without": "without", "medoids": "members", "prism": "members"}
    # What decides a cell's numbers does not say where the working directory is.
    elsewhere = Shadows(tmp_path / "moved", parse([TINY], [])[0])
    assert elsewhere.digest(first) == shadows.digest(first) != shadows.digest(again)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_shipped_audits_can_be_used(name, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    config = parse([f"--config=configs/audit/{name}.py"], problems := [])[0]
    check_config(config)
    experiments = {row: of_row(config, row) for row in config.rows}
    assert not problems and set(config.without) == {"without"}
    assert {e.recover.initialise for e in experiments.values()} == {"real", "noise"}
    strengths = {e.generate.strength for row, e in experiments.items() if row.startswith("d4m")}
    assert len(strengths) == 3
    assert experiments["without"] == experiments["prism_real"]  # but for its images
    assert experiments["medoids"].generate.anchors == "medoid"
    others = config.shadows * config.canaries * experiments["medoids"].dataset.num_classes // 2
    assert others >= 1000  # of which 0.1 % is one
    assert config.gradients.row in config.rows


def test_what_cannot_be_audited_is_one_message(tmp_path):
    status, _, err = run(TINY, f"--workdir={tmp_path}", "--config.shadows=5")
    assert (status, "even, and at least 6" in err) == (2, True)
    status, _, err = run(TINY, f"--workdir={tmp_path}", "--config.gradients.iterations=(0,12)")
    assert (status, "each must be in [0, 12)" in err) == (2, True)
    status, _, err = run(TINY, f"--workdir={tmp_path}", "--config.gradients.row=none")
    assert (status, "it must be a row: medoids, prism" in err) == (2, True)
    assert not list(tmp_path.iterdir())  # before anything is written
    with contextlib.chdir(ROOT.parent):
        Shadows(tmp_path, parse([TINY], [])[0]).write_data()
    status, _, err = run(TINY, f"--workdir={tmp_path}", "--config.seed=1")
    assert (status, "other images are canaries here" in err) == (2, True)
    path, record = tmp_path / "plan.json", workdir.read_record(tmp_path / "plan.json")
    workdir.write_record(path, {**record, "images": {**record["images"], "test": "others"}})
    status, _, err = run(TINY, f"--workdir={tmp_path}")
    assert (status, "was begun on other images than the data set has now" in err) == (2, True)
    del record["images"]  # of an older audit
    workdir.write_record(path, record)
    with contextlib.chdir(ROOT.parent):
        Shadows(tmp_path, parse([TINY], [])[0]).write_data()
    assert workdir.read_record(path) == record


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config=configs/digits_ipc10.py",), "has no ipc, shadows, canaries, always, rows"),
        (("--config=configs/compare/digits.py",), "nothing to audit; --config takes a file of"),
        ((TINY, "--config.gradients.images=None"), "has no gradients.images, so nothing to audit"),
        ((TINY, "--config.gradients.iterations=()"), "gradients.iterations is (); each must be"),
        ((TINY, "--config.gradients.iterations=(0.5,)"), "iterations is (0.5,); each must be"),
        *((((TINY, f"--config.gradients.alphas={alphas}"), "one or more numbers, each positive"))
          for alphas in ("()", "(-1.0,)", "(0.0,1.0)", "('a',)")),
        ((TINY, "--config.gradients.draws=0"), "gradients.draws is 0; noise is what differs"),
        ((TINY, "--config.seed=-1"), "seed has -1; a seed is a whole number"),
        ((TINY, f"--config.seed={2**32}"), "zero or positive, below 4294967296"),
        ((TINY, "--stages=squeeze"), "--stages is a flag of prism_jax.main, and means nothing to"),
        ((TINY, "--plan", "--target=h100"), "--target is a flag of prism_jax.main"),
        ((TINY, "--config.rows.prism=None"), "it must be a row: medoids"),
        ((TINY, *(f"--config.rows.{row}=None" for row in ("prism", "medoids", "without"))),
         "all of without, medoids, prism are left out"),
        ((TINY, "--config.rows.prism=('tests/configs/tiny_ipc.py','parallel.deterministic=False')"),
         "parallel.deterministic is True (without/ipc2/seed0/own) and False (prism/"),
    ],
)  # fmt: skip
def test_what_is_no_audit_is_one_message(tmp_path, arguments, said):
    status, _, err = run(*arguments, f"--workdir={tmp_path}")
    assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_an_audit_cannot_lie_in_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    for path, said in (
        ("gs://bucket/x", "is in an object store"),
        (tmp_path / "file", "is a file; name a folder"),
    ):
        status, _, err = run(TINY, f"--workdir={path}")
        assert status == 2 and said in err and len(err.splitlines()) == 1
    assert not (ROOT.parent / "gs:").exists()


@pytest.mark.parametrize("row", ["medoids", "without"])
def test_a_row_that_is_none_is_left_out(tmp_path, row):
    status, out, err = run(TINY, f"--config.rows.{row}=None", "--plan", f"--workdir={tmp_path}")
    assert status == 0 and out.count("to do ") == 12 and f"{row}/" not in out, err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("recover.logits_by=uniform", "recover.logits_by is 'uniform' (fixed)"),
        ("recover.alpha_ce=0.5", "recover.alpha_ce 0.5 (1)"),
        ("recover.perturb_steps=2", "recover.perturb_steps 2 (0)"),
        ("recover.targets=groups", "recover.targets is 'groups' (running)"),
        ("relabel.labels_from=there", "relabel.labels_from is from elsewhere"),
        ("recover.initialise=folder", "recover.initialise_from is from elsewhere"),
        ("networks.first.start_from=w.pth", "first is from elsewhere"),
    ],
)
def test_a_row_that_the_study_or_its_premise_does_not_cover_is_refused(tmp_path, override, said):
    config = parse([TINY], [])[0]
    needs = {
        "recover.initialise=folder": ["recover.initialise_from=set"],
        "recover.perturb_steps=2": ["recover.perturb_rho=0.1"],
    }
    row = (*needs.get(override, ()), override)
    words = ",".join(repr(word) for word in (*config.rows.prism, *row))
    status, _, err = run(TINY, f"--workdir={tmp_path}", f"--config.rows.prism=({words})")
    assert (status, said in err) == (2, True), err
    assert not list(tmp_path.iterdir())


def test_the_teacher_is_attacked_as_it_reads_images(monkeypatch):
    """By its own normalisation; the student by the data set's."""
    ours, its = Normalisation((0.5,), (0.5,)), Normalisation((0.1,), (0.9,))
    used = []
    monkeypatch.setattr(observing.validate, "load", lambda *a: "student")
    monkeypatch.setattr(observing.validate, "folder", lambda *a: pathlib.Path("student"))
    monkeypatch.setattr(observing.workdir, "read_record", lambda path: {"top1": 1.0})
    images = np.zeros((4, 2, 2, 1), np.uint8)
    labelled = SimpleNamespace(images_uint8_NHWC=images)
    monkeypatch.setattr(observing.recover, "synthetic_set", lambda context: labelled)

    def forward(module, normalisation, mesh):
        used.append(normalisation)
        return lambda variables, images: np.eye(4)

    monkeypatch.setattr(observing.training, "jitted_forward", forward)
    context = SimpleNamespace(
        config=SimpleNamespace(
            validate=SimpleNamespace(students=("s",), seeds=(0,)),
            relabel=SimpleNamespace(teachers=("t",)),
        ),
        inputs=SimpleNamespace(normalisation=ours),
        networks=SimpleNamespace(
            build=lambda name, student: name, normalisation=lambda name: its,
            load=lambda name: "teacher", folder=lambda name: pathlib.Path(name),
        ),
    )  # fmt: skip
    observing.observe(context, images, np.arange(4))
    assert used == [ours, its]


# --- tables ---------------------------------------------------------------------------------


def attack(row: str, kind: str, shift: float) -> audit.Attack:
    draw = np.random.default_rng(0)
    plan = canaries.plan_of(LABELS, canaries=18, always=0, runs=20, seed=0)
    values = draw.standard_normal(plan.member_RN.shape) + shift * plan.member_RN
    top1 = (None,) * 20 if kind == "set" else (0.5,) * 10 + (0.7,) * 10
    return audit.Attack(row, kind, values, plan.member_RN, top1)


def test_tables_say_what_was_found_and_what_cannot_be_told():
    attacks = [attack("without", "set", 0.0), attack("medoids", "set", 9.0),
               attack("medoids", "student", 1.0)]  # fmt: skip
    found = audit.documents(attacks, None)
    assert set(found) == {"table.md", "table.csv", "roc.png"}
    text = found["table.md"].decode()
    # 540 scores of others: 1 % are five, and no false positive is 0.1 % or less.
    assert (
        "20 shadow runs, 54 canaries" in text and "(1 % are 5 scores, 0.1 % are 0 scores)" in text
    )
    (line,) = [x for x in text.splitlines() if x.startswith("| medoids | 1.000")]
    assert "| 100.00 (99.32 to 100.00) | – | – |" in line
    (line,) = [x for x in text.splitlines() if "| 60.0 |" in x]  # the mean of top-1
    rows = list(csv.DictReader(io.StringIO(found["table.csv"].decode())))
    assert len(rows) == 6 and rows[1]["allowed"] == "0"
    by_chance = next(r for r in rows if r["row"] == "without")
    assert float(by_chance["auroc"]) == pytest.approx(0.5, abs=0.05)
    assert found["roc.png"].startswith(b"\x89PNG")


def test_noise_over_change_is_the_median_over_images():
    found = {
        "noise": [1.0, 10.0],
        "change": {"exchanged_00": [2.0, 2.0], "exchanged_01": [1.0, 1.0],
                   "exchanged_02": [4.0, 5.0], "reseeded": [5.0, 5.0]},
        "along": {"exchanged_00": [0.2, 1.0], "exchanged_01": [0.5, 1.0],
                  "exchanged_02": [0.4, 1.0], "reseeded": [9.0, 9.0]},
    }  # fmt: skip
    images, along, seeds = audit.ratios(found)
    assert images.tolist() == [0.5, 5.0] and seeds.tolist() == [0.2, 2.0]
    assert along.tolist() == [0.1, 0.5]
    assert audit.nearest_alpha({"alphas": [0.001, 0.02, 1.0], "alpha": 0.01}) == 1
    study = {"row": "a", "teachers": ["t"], "draws": 9, "alphas": [0.1, 1.0], "iterations": []}
    assert "alpha 0.1." in "\n".join(audit._of_study({**study, "alpha": 0.1}))
    asked = "alpha 0.1 (of those asked for the nearest to the row's own, 0.01)."
    assert asked in "\n".join(audit._of_study({**study, "alpha": 0.01}))
    assert audit.pairs([[1.0, 0.5, 0.0], [0.5, 1.0, 0.1], [0.0, 0.1, 1.0]]) == "0.200"


# --- end to end -----------------------------------------------------------------------------


def observed(root: pathlib.Path) -> dict[str, str]:
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("cells/**/cell.json")}


@pytest.mark.slow
def test_an_audit_that_is_stopped_and_continued_is_the_uninterrupted_one(tmp_path):
    root = tmp_path / "run"
    make, count = Shadows.make, []

    def stopping(self, cell, context, made_by):
        count.append(cell)
        if len(count) == 6:  # in the middle of its images
            context.stop.signum = signal.SIGTERM
        return make(self, cell, context, made_by)

    Shadows.make = stopping
    try:
        status, _, err = run(TINY, f"--workdir={root}")
    finally:
        Shadows.make = make
    assert status == 128 + signal.SIGTERM and "Run the same command again" in err
    assert len(observed(root)) == 5 and not (root / "table.md").exists()
    stopped = root / "cells" / count[-1].name
    assert (stopped / "recover").exists() and not (stopped / "recover/manifest.json").exists()
    status, out, err = run(TINY, f"--workdir={root}")
    assert status == 0 and "cell 1 of 13" in out and str(root / "table.md") in out, err
    before = observed(root)
    assert len(before) == 18

    # What was stopped, once more in one go, with its teachers.
    shutil.rmtree(stopped)
    shutil.rmtree(root / "shadows" / "0001" / "members")
    tables = (root / "table.md").read_bytes()
    status, out, err = run(TINY, f"--workdir={root}")
    assert status == 0 and "cell 1 of 1:" in out, err
    assert observed(root) == before and (root / "table.md").read_bytes() == tables

    # Medoids are members, and what was made without the canaries knows none.
    rows = list(csv.DictReader(io.StringIO((root / "table.csv").read_text())))
    areas = {(r["row"], r["attack"]): float(r["auroc"]) for r in rows}
    assert areas["medoids", "set"] > 0.6 and abs(areas["without", "set"] - 0.5) < 0.15
    cell = json.loads((root / "cells/medoids/ipc2/seed0/own/cell.json").read_text())
    with contextlib.chdir(ROOT.parent):
        member = Shadows(root, parse([TINY], [])[0]).plan.member_RN[0]
    copies = np.array(cell["set"]) == membership.likeness(np.zeros(1))
    # Two of each of four classes, of which some are no canaries: images that every run has.
    assert 0 < copies.sum() <= 8 and member[copies].all()
    # The study: teachers' gradients, and what an image changes.
    study = json.loads((root / "gradients.json").read_text())["study"]
    assert [found["iteration"] for found in study["iterations"]] == [0, 5]
    assert study["teachers"] == ["first", "second"] and study["primary"] == "first"
    for found in study["iterations"]:
        assert min(found["norm_bn"]) > 0 and np.diag(found["cosine_bn"]) == pytest.approx(1.0)
        assert set(found["change"]) == {"exchanged_00", "exchanged_01", "reseeded"}
        assert all(min(sizes) > 0 for sizes in found["change"].values())
    # Nothing is done again.
    status, out, _ = run(TINY, f"--workdir={root}")
    assert status == 0 and "cell 1" not in out and observed(root) == before
