"""Costs beside accuracies, by hand."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
from types import SimpleNamespace

import numpy as np
import pytest

from configs.digits import config as digits
from prism_jax.analysis import comparison, expenses
from prism_jax.analysis.cells import Entry
from prism_jax.config import resolve
from prism_jax.data import workdir
from prism_jax.stages import costs
from prism_jax.stages.context import LabelledSet

STORED = {"images": 1000, "labels": 3000, "real": 40_000}
MADE = {
    "networks": {"first": 10.0, "generator": 30.0},
    "seconds": {"recover": 5.0, "relabel": 2.0},
    "bytes": STORED,
}


def entry(spent, *, seconds=(8.0, 4.0), top1=0.5) -> Entry:
    student = {"top1": top1, "top5": 1.0, "best_top1": top1, "top1_per_seed": [top1] * 2}
    summary = {
        "validate": {"net": {**student, "seconds": sum(seconds)}},
        "recover": {"seconds_per_image": 0.25},
    }
    return Entry("d4m", 1, 0, "single", summary, 10**6, {}, {"synthetic": spent})


def test_what_a_set_takes_and_gives():
    table = expenses.accuracies_and_costs([entry(MADE)])["single", 1]
    assert dict(zip(*table, strict=True)) == {
        "": "d4m", "squeeze": "40 s", "recover": "5.00 s", "relabel": "2.00 s",
        "images + labels": "4.00 kB", "of the real": "10.00%", "net": "50.0",
        "net: training": "6.00 s",  # of one student
        "net: per MB": "12500",  # 50 points for 0.004 MB
    }  # fmt: skip
    of = {name: cost.of(entry(MADE), "synthetic", "net") for name, cost in expenses.COSTS.items()}
    assert of == {"seconds": 53.0, "work": 13.0, "bytes": 4000.0, "recover": 0.25, "memory": 10**6}


def test_accuracies_of_fewer_seeds_are_marked():
    more = [dataclasses.replace(entry(MADE), row="more", seed=seed) for seed in range(2)]
    table = expenses.accuracies_and_costs([*more, entry(MADE)])["single", 1]
    at = table[0].index("net")
    assert [row[at] for row in table[1:]] == ["50.0", "50.0 (2 of 4)"]


def test_what_is_not_known_is_no_number():
    imported = {**MADE, "networks": {"first": None}, "bytes": {**STORED, "labels": None}}
    table = expenses.accuracies_and_costs([entry(imported)])["single", 1]
    row = dict(zip(*table, strict=True))
    assert row["squeeze"] == row["images + labels"] == row["net: per MB"] == "–"
    assert expenses.COSTS["seconds"].of(entry(imported), "synthetic", "net") is None
    # The axis leaves squeeze out where it is known of nobody.
    all_known = [entry(MADE), entry(imported)]
    assert expenses.cost_of("seconds", all_known, "synthetic") is expenses.COSTS["seconds"]
    found = expenses.cost_of("seconds", all_known[1:], "synthetic")
    assert found.of(entry(imported), "synthetic", "net") == 13.0
    assert expenses.cost_of("bytes", all_known[1:], "synthetic") is expenses.COSTS["bytes"]
    for cost in expenses.COSTS:  # at the left edge
        assert comparison.accuracy_over_cost([entry(imported)], cost).startswith(b"\x89PNG")


def test_images_that_begin_with_another_rows_count_what_made_those():
    own = {
        "networks": {"first": 10.0, "second": 7.0},
        "seconds": {"recover": 100.0, "relabel": 2.0},
        "bytes": STORED,
    }
    found = costs.after(own, MADE)
    # The network that both read is squeezed once.
    assert found["networks"] == {"first": 10.0, "generator": 30.0, "second": 7.0}
    assert found["seconds"] == {"recover": 105.0, "relabel": 2.0}
    assert expenses.stage_seconds(entry(found), "synthetic", "net")["squeeze"] == 47.0
    unknown = {**MADE, "seconds": {"recover": None, "relabel": 2.0}}
    assert costs.after(own, unknown)["seconds"]["recover"] is None


@pytest.mark.parametrize(
    ("recover", "asked"),
    [
        ({"initialise": "mosaic"}, True),
        ({"initialise": "real_confident"}, True),
        ({"initialise": "noise", "inject_from": "retrieved"}, True),
        ({"initialise": "real_random"}, False),
        ({"initialise": "real_herding", "iterations": 0}, True),
        ({"initialise": "real_random", "iterations": 0}, False),
    ],
)
def test_who_chose_the_real_images_is_among_those_who_made_the_set(recover, asked):
    config = resolve(digits(10))
    pool = {"pool": ("resnet18",), "scorer": "outside", **recover}
    config = dataclasses.replace(config, recover=dataclasses.replace(config.recover, **pool))
    made_by = costs.makers(SimpleNamespace(config=config))
    read = ["resnet18"] if recover.get("iterations", 1) else []  # else nobody of the pool was
    assert made_by == [*read, *(["outside"] if asked else [])]


@pytest.fixture(autouse=True)
def plain_fingerprints(monkeypatch):
    monkeypatch.setattr(costs.fingerprints, "relabel", lambda context, labelled: {})


def spent(tmp_path, name: str, *, soft: bool = True, **relabel) -> costs.Costs:
    """Of a set of ten images of four bytes, in a run whose images took seven seconds."""
    config = resolve(digits(1))
    config = dataclasses.replace(config, relabel=dataclasses.replace(config.relabel, **relabel))
    (tmp_path / "recover").mkdir()
    workdir.write_record(tmp_path / "recover/manifest.json", {"units": [{"seconds": 7.0}]})
    context = SimpleNamespace(
        config=config,
        root=tmp_path,
        inputs=SimpleNamespace(image_shape=(2, 2, 1), open=lambda split: range(100)),
        networks=SimpleNamespace(folder=lambda network: tmp_path / "squeeze" / network),
    )
    labels_N = np.repeat(np.arange(10, dtype=np.int32), 1)
    return costs.of(context, LabelledSet(name, tmp_path, lambda: None, labels_N, {}, soft))


def test_labels_that_are_made_while_students_train_take_nothing_beside_training(tmp_path):
    found = spent(tmp_path, "synthetic", mode="online")
    assert found["seconds"] == {"recover": 7.0, "relabel": 0.0}
    assert found["bytes"] == {"images": 40, "labels": 0, "real": 400}


def test_labels_from_elsewhere_are_not_known_to_take_nothing(tmp_path):
    found = spent(tmp_path, "synthetic", mode="online", labels_from="set")
    assert found["seconds"]["relabel"] is None and found["bytes"]["labels"] is None


def test_the_synthetic_images_with_hard_labels_took_what_the_synthetic_images_did(tmp_path):
    found = spent(tmp_path, "synthetic_hard", soft=False)
    assert found["seconds"] == {"recover": 7.0, "relabel": 0.0}
    assert "resnet18" in found["networks"] and found["bytes"]["labels"] == 0


def test_the_csv_says_of_real_images_nothing_that_is_the_methods():
    made = entry(MADE)
    student = made.sets["synthetic"]
    summary = made.summary | {
        "controls": dict.fromkeys(("random_real", "synthetic_hard"), student),
        "analyse": {"intra_class_cosine": {"synthetic": 0.5}},
    }
    text = comparison.table_csv([dataclasses.replace(made, summary=summary)])
    names = "recover_seconds_per_image", "recover_peak_bytes", "intra_class_cosine"
    rows = {row["set"]: [row[n] for n in names] for row in csv.DictReader(io.StringIO(text))}
    assert rows["synthetic"] == rows["synthetic_hard"] == ["0.25", "1000000", "0.5"]
    assert rows["random_real"] == ["", "", ""]


def test_an_axis_of_costs_that_nobody_knows_has_no_numbers():
    known, unknown = entry(MADE), entry({**MADE, "bytes": {**STORED, "labels": None}})

    def axis(*entries):
        drawn = inspect.unwrap(comparison.accuracy_over_cost)(entries, "bytes")
        (panel,) = drawn.axes
        drawn.draw_without_rendering()
        low, high = panel.get_xlim()
        return [x for x in panel.get_xticks() if low <= x <= high], panel.get_xlabel()

    numbers, words = axis(known)
    assert 4000.0 in numbers and words == "bytes of images and labels"
    assert axis(unknown) == ([], f"{words}\n(hollow: none, or not known)")
    assert axis(known, dataclasses.replace(unknown, row="other"))[0] == numbers


@pytest.mark.parametrize("cost", expenses.COSTS)
def test_every_cost_can_be_the_axis(cost):
    assert comparison.accuracy_over_cost([entry(MADE)], cost).startswith(b"\x89PNG")


def test_words_beside_lines_stand_apart_in_their_order():
    levels = {"c": 3.0, "a": 1.0, "b": 1.1, "d": 3.2, "e": 9.0}
    found = comparison.apart(levels, 0.5)
    assert list(found) == ["a", "b", "c", "d", "e"]
    assert list(found.values()) == [1.0, 1.5, 3.0, 3.5, 9.0]
