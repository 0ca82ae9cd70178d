"""Pages about finished runs: what is on them, that they only read, what they refuse."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.command import finished, reference, snapshot
from helpers.networks import NoNorm
from old.make_workdir import ARCHIVE

from configs.digits import config as digits
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.config import resolve
from prism_jax.data import image_set, orbax_files, workdir
from prism_jax.data.weights import RECORD
from prism_jax.errors import UserError
from prism_jax.pipeline import sets
from prism_jax.report import __main__ as command
from prism_jax.report import accuracy, costs, features, gathered, measures, pictures
from prism_jax.report.finished import Run, open_runs
from prism_jax.report.gathered import Gathered, Options
from prism_jax.stages import validate
from prism_jax.stages.makers.optimise import kept_folder

__all__ = ["finished", "reference"]  # fixtures

FLAGS = {"network": None, "classes": "", "images": 10_000, "seed": 0, "data": None}
CHARTS = ("grid", "cosines", "accuracy_by_class", "confusions", "reliability", "losses_0")


@pytest.fixture(scope="module")
def opened(reference) -> Run:
    return open_runs([str(reference)])[0]


@pytest.fixture(scope="module")
def test_images(opened) -> measures.Real:
    return measures.real_images(opened, "test", most=10_000, seed=0)


def refused(*arguments: str) -> str:
    """What the command says that cannot be used."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert command.main([*map(str, arguments)]) == 2
    return said.getvalue()


def test_two_runs_stand_side_by_side_and_are_only_read(reference, tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:  # of version 0.1, without its students' checkpoints
        archive.extractall(tmp_path, filter="data")
    old, to = tmp_path / "run", tmp_path / "out" / "page.html"
    monkeypatch.setitem(sys.modules, "umap", None)  # not installed
    before = snapshot(reference), snapshot(old)
    command.write([str(reference), str(old)], workdir.epath.Path(to), SimpleNamespace(**FLAGS))
    assert (snapshot(reference), snapshot(old)) == before

    html = re.sub(r"src=\"data:[^\"]*\"", "", to.read_text())
    for words in (
        "reference: tiny, preset prism", "run: tiny", "random real, hard labels",
        "pip install &#39;prism-jax[report]&#39;", "checkpoints of students are gone",
        "recover.keep_at=(1, 10, 100)", "needs the controls random_real, ",
    ):  # fmt: skip
        assert words in html
    assert not re.search(r"None|\bnan\b", html)
    for name in CHARTS:
        for form in ("png", "svg", "pdf"):
            assert (tmp_path / "out/page_figures" / f"{name}.{form}").stat().st_size > 1000
    numbers = json.loads((tmp_path / "out/page_figures/numbers.json").read_text())
    stated = json.loads((reference / "summary.json").read_text())
    rows = {(row["run"], row["trained on"]): row for row in numbers["Accuracy"]}
    top1 = stated["controls"]["full_real"]["outside"]["top1"]
    assert rows["reference", "full real training set"]["outside"] == top1
    sets = {row["set"]: row for row in numbers["Diversity and likeness/Numbers"]}
    assert sets["reference"]["cosine"] == pytest.approx(
        stated["analyse"]["intra_class_cosine"]["synthetic"]
    )
    assert sets["real test images"]["nearest"] == 1.0
    assert sets["initial images"]["copies"] == sets["random real images"]["copies"] == 8
    assert sets["reference"]["copies"] == 0


@pytest.mark.parametrize("of", [SYNTHETIC, "full_real"])
def test_students_are_the_tested_ones(opened, test_images, of):
    said = measures.predictions(opened, of, "outside", test_images)
    entry = opened.sets()[of]["outside"]
    counts = said.reliability.count_B
    assert counts.sum() == len(test_images.labels_N)
    assert np.nansum(counts * said.reliability.accuracy_B) / counts.sum() == pytest.approx(
        entry["top1"]
    )
    assert said.per_class_K.tolist() == pytest.approx(entry["per_class"])
    assert said.confusion_KK.sum(1) == pytest.approx(1.0)
    # The twin: another set's students are not these.
    other = measures.predictions(opened, "random_real", "outside", test_images)
    assert other.confusion_KK.tolist() != said.confusion_KK.tolist()


def test_images_kept_on_the_way_stand_in_their_order(finished):
    (run,) = open_runs([str(finished)])
    g = Gathered([run], Options(), gathered.class_names(run), [])
    assert pictures.strips(g) == [] and "keep_at" in g.notes[0]
    for iteration, grey in ((100, 200), (9, 90)):
        images = np.full((4, 8, 8, 1), grey, np.uint8)
        folder = kept_folder(run.root / "recover", iteration)
        image_set.write_images(folder, images, np.arange(4), np.zeros(4, int))
    assert list(run.kept()) == [9, 100]
    (picture,) = pictures.strips(g)
    assert not picture.is_chart and picture.forms["png"][:4] == b"\x89PNG"


def test_damage_is_named_and_left_as_it_is(finished):
    path = finished / "recover/images/00002/00001.png"
    shutil.copy(finished / "recover/images/00000/00000.png", path)
    before = snapshot(finished)
    (run,) = open_runs([str(finished)])
    with pytest.raises(Exception, match="not those that recover wrote"):
        run.images  # noqa: B018
    assert snapshot(finished) == before


def test_what_cannot_be_used_is_one_message(reference, finished, tmp_path):
    to = f"--to={tmp_path / 'page.html'}"
    assert "no working directory" in refused(tmp_path, to)
    assert "runs are only read" in refused(reference, f"--to={reference}/page.html")
    assert "ends in .html" in refused(reference, f"--to={tmp_path}/page")
    assert "named twice" in refused(reference, f"{reference}/", to)
    assert "--network=resnet50 is no network" in refused(reference, to, "--network=resnet50")
    assert "--classes names 'cat'" in refused(reference, to, "--classes=1,cat")
    for seed in (-1, 2**32):
        assert f"--seed is {seed}; it must be zero" in refused(reference, to, f"--seed={seed}")
    assert "--images=0" in refused(reference, to, "--images=0")
    ran = workdir.read_json(finished / "config.json")
    ran["experiment"]["dataset"]["num_classes"] = 3
    workdir.write_record(finished / "config.json", ran)
    assert "dataset.num_classes=4" in refused(reference, finished, to)
    (finished / "summary.json").unlink()
    said = refused(finished, to)
    assert "is not finished: it has no summary.json" in said
    assert "--stages=squeeze,recover,relabel,validate,analyse" in said  # whichever it last ran
    (finished / "config.json").write_text('{"model_type": "resnet"}')
    assert "its config.json is of something else" in refused(finished, to)
    assert not (tmp_path / "page.html").exists()


def test_other_real_images_than_the_runs_are_refused(reference, finished, tmp_path):
    """Positions would name other images, and nothing on the page would show it."""
    to = f"--to={tmp_path / 'page.html'}"
    recover, student = finished / "recover", finished / "validate" / "outside" / "0"
    for folder, key, said in (
        (recover, "data", "the images that recover began with of"),
        (student, "test", "the test images of"),
    ):
        fields = workdir.read_fingerprint(folder)
        workdir.write_fingerprint(folder, {**fields, key: {**fields[key], "digest": "other"}})
        assert said in refused(finished, to) and "name the run's with --data" in refused(
            finished, to
        )
        if folder == recover:
            workdir.write_fingerprint(folder, fields)
    assert "were tested on different images" in refused(reference, finished, to)


def test_a_student_that_is_still_training_is_not_measured(finished):
    (run,) = open_runs([str(finished)])
    assert run.student(SYNTHETIC, "outside", 0) is not None
    (finished / "validate" / "outside" / "0" / RECORD).unlink()
    assert run.student(SYNTHETIC, "outside", 0) is None


@pytest.mark.parametrize("kind", ["damaged", "of before"])
def test_a_checkpoint_of_before_the_end_is_no_student(finished, kind):
    """Its network is another than the one whose accuracy stands beside it."""
    (run,) = open_runs([str(finished)])
    trained = finished / "validate" / "outside" / "0"
    (last,) = (trained / "checkpoints").iterdir()
    steps = workdir.read_record(trained / RECORD)["steps"]
    assert last.name == str(steps)
    before = shutil.copytree(last, last.with_name(str(steps - 1)))
    if kind == "damaged":
        path = last / "default" / orbax_files.FILE
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        shutil.rmtree(last)
    said = f"Delete {trained} and run the same command again: outside is trained anew"
    with pytest.raises(UserError, match=re.escape(said)):
        run.student(SYNTHETIC, "outside", 0)
    synthetic = next(s for s in sets(run.context) if s.name == SYNTHETIC)
    with pytest.raises(UserError, match=re.escape(said)):
        validate.load(run.context, synthetic, "outside", 0)
    assert before.exists() and not list(last.parent.glob("*aside*"))


def test_labels_that_are_elsewhere_have_no_size(opened):
    def size(**changed):
        config = opened.config
        for section, fields in changed.items():
            now = dataclasses.replace(getattr(config, section), **fields)
            config = dataclasses.replace(config, **{section: now})
        context = SimpleNamespace(config=config, root=opened.root)
        return dataclasses.replace(opened, context=context).label_bytes

    assert size() == opened.summary["relabel"]["bytes"]
    assert size(relabel={"labels_from": "there"}) is None
    # What is stored is of the settings before.
    assert size(relabel={"mode": "online"}) == size(validate={"loss": "ce"}) == 0
    assert costs.Bytes(10, None, 100).share is None


def test_figures_of_an_earlier_page_are_gone(reference, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)  # which takes twenty seconds to begin
    beside = tmp_path / "page_figures"
    beside.mkdir()
    for name in ("losses_7.png", "mine.txt"):
        (beside / name).write_text("old")
    command.write([str(reference)], workdir.epath.Path(tmp_path / "page.html"),
                  SimpleNamespace(**FLAGS))  # fmt: skip
    assert (beside / "mine.txt").exists() and (beside / "losses_0.png").exists()
    assert not (beside / "losses_7.png").exists()


def test_real_images_are_drawn_evenly():
    labels_N = np.repeat(np.arange(4), (10, 2, 30, 8))
    at = measures.evenly(labels_N, most=20, seed=0)
    assert np.bincount(labels_N[at]).tolist() == [5, 2, 5, 5]
    assert (np.diff(at) > 0).all()
    assert at.tolist() == measures.evenly(labels_N, most=20, seed=0).tolist()
    assert at.tolist() != measures.evenly(labels_N, most=20, seed=1).tolist()
    assert measures.evenly(labels_N, most=50, seed=0).tolist() == list(range(50))


def test_nearness_and_copies_are_of_all_training_images(opened, test_images, monkeypatch):
    """Of the random ones all are copies, however few training images are looked at."""

    def measured(most):
        g = Gathered([opened], Options(most=most), ["a", "b", "c", "d"], [])
        train = measures.real_images(opened, "train", most=most, seed=0)
        assert len(train.labels_N) == min(most, train.total)
        network, _, sets = features.surroundings(g, train, test_images)
        table = features.likeness_table(network, sets)
        return sets[features.RANDOM].numbers, g.notes, table

    (whole, notes, _), (few, _, _) = measured(10_000), measured(40)
    assert not notes and whole.pixels.copies == 8 and whole.frechet != few.frechet
    assert few.pixels == whole.pixels
    assert few.features == pytest.approx(whole.features, rel=1e-5)
    monkeypatch.setattr(measures, "MOST_PIXELS", 1)
    none, notes, table = measured(40)
    assert none.features is none.pixels is None and "Nearness and copies: left out" in notes[0]
    cells = dict(zip(table.heads, table.rows[0], strict=True))
    assert cells["copies"].text == cells["nearest"].text == "–"
    covered, notes, _ = measured(10_000)
    assert not notes and covered.features == whole.features and covered.pixels is None


# --- cost -----------------------------------------------------------------------------------


def test_flop_of_a_forward_pass_by_hand():
    found = costs._forward_flop(NoNorm(num_classes=5), (8, 8, 1))
    assert found == 2 * 64 * 5 + 5  # products and their sums, and the bias


def test_the_cost_of_every_stage_follows_from_its_passes(opened):
    found = costs.stages(opened)
    first, second, outside = (
        costs.forward_flop(opened, name) for name in ("first", "second", "outside")
    )
    train = opened.summary["dataset"]["train_images"]
    assert found["squeeze"].flop == pytest.approx(3 * 2 * train * (first + second))
    assert found["relabel"].flop == pytest.approx(6 * 8 * first)
    assert found["validate"].flop == pytest.approx(3 * 6 * 8 * outside)
    drawn = opened.summary["recover"]["teachers_drawn"]["second"]
    assert found["recover"].flop == pytest.approx(2 * 12 * 8 * (first + drawn * second))
    seconds = [opened.record(name)["seconds"] for name in ("first", "second")]
    assert found["squeeze"].seconds == pytest.approx(sum(seconds))
    assert found["validate"].seconds == opened.summary["validate"]["outside"]["seconds"]

    size = costs.bytes_of(opened)
    assert size.images == 8 * 64 and size.real == train * 64
    assert size.labels == opened.summary["relabel"]["bytes"] > 0
    assert size.share == (size.images + size.labels) / size.real


# --- DD-Ranking -----------------------------------------------------------------------------


def stated(name: str, digest: str, top1: dict[str, float], **relabel) -> Run:
    """A run of which only a summary is known."""
    c = digits(10)
    c.relabel.update(relabel)
    sets = {of: {"resnet18": {"top1": value}} for of, value in top1.items()}
    summary = {"validate": sets.pop(SYNTHETIC), "controls": sets}
    return Run(name, SimpleNamespace(config=resolve(c)), summary, {"digest": digest})


def test_scores_of_runs_by_hand():
    views = {"synthetic": 0.45, "random_real": 0.40, "full_real": 0.56, "synthetic_hard": 0.16}
    plain = {"crop_min": 1.0, "mix": "none", "flip": False}
    runs = [
        stated("views", "a", views),
        stated("plain", "a", {"synthetic": 0.30, "random_real": 0.34}, **plain),
        stated("other", "b", {"synthetic": 0.9, "random_real": 0.1}, **plain),
    ]
    table = accuracy.scores(Gathered(runs, Options(), [], []))
    (row,) = table.rows
    values = [cell.value for cell in row]
    assert values[:2] == ["views", "resnet18"]
    assert values[2:4] == pytest.approx([0.05, 0.40])
    assert values[4:6] == pytest.approx([0.2006, -0.1565], abs=1e-4)
    gain = (np.exp(0.5 * 0.05 - 0.5 * 0.04) - np.exp(-1)) / (np.e - np.exp(-1))
    assert values[6] == pytest.approx(gain)

    # A twin that others label says nothing of views.
    labelled = {**plain, "teachers": ("mobilenet_v2",)}
    runs[1] = stated("plain", "a", {"synthetic": 0.30, "random_real": 0.34}, **labelled)
    ((*_, score, _),) = accuracy.scores(Gathered(runs, Options(), [], [])).rows
    assert score.value is None

    # Nor does one that is trained otherwise, or with labels of other groups of images.
    for section, field, value in (("validate", "weight_decay", 0.5), ("relabel", "bn_group", 5)):
        runs[1] = stated("plain", "a", {"synthetic": 0.30, "random_real": 0.34}, **plain)
        config = runs[1].config
        changed = dataclasses.replace(getattr(config, section), **{field: value})
        runs[1].context.config = dataclasses.replace(config, **{section: changed})
        ((*_, score, _),) = accuracy.scores(Gathered(runs, Options(), [], [])).rows
        assert score.value is None

    # Without that control there is no score of labels, without a twin none of views.
    del runs[0].summary["controls"]["synthetic_hard"]
    g = Gathered([runs[0], runs[2]], Options(), [], [])
    assert accuracy.scores(g) is None and "synthetic_hard" in g.notes[0]


def test_classes_of_a_picture():
    names = [f"n{i}" for i in range(40)]
    run = SimpleNamespace(manifest={"imagenet_indices": list(range(40))})

    def classes(*wanted: str, most: int = 10) -> list[int]:
        return gathered.chosen(Gathered([run], Options(classes=wanted), names, []), most)

    assert classes() == [1, 7, 2, 31]
    assert classes("n3", "12") == [3, 12]
    run.manifest = {}
    assert classes(most=3) == [0, 1, 2]


@pytest.mark.slow
def test_one_embedding_holds_all_runs_and_comes_again(opened):
    pytest.importorskip("umap", reason="umap-learn is not installed")
    train, test = (
        measures.real_images(opened, split, most=10_000, seed=0) for split in ("train", "test")
    )
    g = Gathered([opened], Options(), gathered.class_names(opened), [])
    network, around, sets = features.surroundings(g, train, test)
    first, again = (features.plane(g, network, around, sets).forms["png"] for _ in range(2))
    assert first == again
    other = g.options._replace(seed=1)
    moved = features.plane(Gathered([opened], other, g.names_K, []), network, around, sets)
    assert moved.forms["png"] != first
