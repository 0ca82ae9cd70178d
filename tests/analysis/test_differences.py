"""What the tables of a comparison say of hand-made answers, and against whom."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from prism_jax.analysis import cells, comparison, differences
from prism_jax.analysis.cells import Entry
from prism_jax.analysis.differences import BEST, REFERENCE, SELECTED, Choices
from prism_jax.analysis.intervals import Resampling
from prism_jax.data import answers
from prism_jax.errors import UserError

HOW = Resampling(resamples=1000)
IMAGES = 200


def right(count: int) -> str:
    """The first answers right, of ``IMAGES``."""
    return answers.pack_right(np.arange(IMAGES) < count)


def entry(row: str, seed: int, tests: dict[str, int], held: dict[str, int] | None = None) -> Entry:
    """A cell in which each set's student answers so many right."""
    parts = {"test": tests} | ({"held_out": held} if held else {})
    found = {
        name: {part: {"net": [right(counts[name])]} for part, counts in parts.items()}
        for name in tests
    }
    numbers = ("top1", "top5", "best_top1")
    result = {
        name: {"net": dict.fromkeys(numbers, count / IMAGES) | {"top1_per_seed": [count / IMAGES]}}
        for name, count in tests.items()
    }
    summary = {
        "validate": result.pop("synthetic"),
        "controls": result,
        "recover": {"seconds_per_image": 1.0},
    }
    return Entry(row, 1, seed, "single", summary, None, found)


def table(entries, **choices):
    settings = Choices(HOW, controls=("random_real",), **choices)
    (found,) = differences.tables(cells.columns(entries), settings)
    return found


CELLS = [
    *(entry("random_real", s, {"synthetic": 120, "full_real": 190}) for s in range(2)),
    *(entry("prism", s, {"synthetic": 130 + s}) for s in range(2)),
    *(entry("d4m", s, {"synthetic": 150, "medoids": 149}) for s in range(2)),
]


def test_each_set_is_measured_by_the_reference_the_best_and_the_best_selection():
    found = table(CELLS, reference="prism", selected_real=("medoids", "random_real"))
    assert found.against == {
        REFERENCE: "prism", BEST: "d4m", SELECTED: "real images nearest to the anchors",
    }  # fmt: skip
    by_label = {line.tested.label: line for line in found.lines}
    assert list(by_label) == [
        "random real, soft labels", "full real training set", "prism", "d4m",
        "real images nearest to the anchors",
    ]  # fmt: skip
    prism, d4m = by_label["prism"], by_label["d4m"]
    assert prism.differences[REFERENCE] is None and d4m.differences[BEST] is None
    assert prism.accuracy.value == pytest.approx(130.5 / 200)
    assert prism.differences[BEST].value == pytest.approx(-19.5 / 200)
    assert not prism.differences[BEST].holds_zero
    assert d4m.differences[SELECTED].value == pytest.approx(1 / 200)
    assert d4m.differences[SELECTED].holds_zero  # one image, which is not drawn in a third
    text = differences.markdown([found], Choices(HOW))
    assert "| d4m | 75.0 [" in text and "| ~ +0.5 [+0.0, +1.5] |" in text
    assert "2 seed(s), 200 test images; who is best is chosen by these test images." in text
    # A row that selects is no method, whatever its accuracy.
    assert table(CELLS, selected_real=("d4m",)).against == {BEST: "prism", SELECTED: "d4m"}
    assert table(CELLS, reference="d4m/medoids").against[REFERENCE].startswith("real images")


def test_who_is_best_is_said_by_the_images_that_were_held_out():
    two = [
        entry("a", 0, {"synthetic": 150}, {"synthetic": 100}),
        entry("b", 0, {"synthetic": 140}, {"synthetic": 110}),
    ]
    found = table(two)
    assert found.against == {BEST: "b"} and found.chosen_by == "held_out"
    text = differences.markdown([found], Choices(HOW), ["resnet18"])
    assert "chosen by the held-out images" in text and "| a | 75.0 [" in text
    assert "resnet18 were not trained here, and may have seen the held-out images" in text
    # Twin: the test images would have said otherwise; so they do where one set has no others.
    two[0].right["synthetic"].pop("held_out")
    assert table(two).against == {BEST: "a"}


def test_every_interval_is_a_line_of_the_csv():
    found = table(CELLS, reference="prism", selected_real=("medoids",))
    lines = list(csv.DictReader(io.StringIO(differences.table_csv([found]))))
    assert len(lines) == 5 + 5 * 3 - 3  # accuracies, and all but those from themselves
    [line] = [
        x for x in lines if (x["method"], x["set"], x["why"]) == ("d4m", "synthetic", SELECTED)
    ]
    assert line["against"] == "real images nearest to the anchors"
    assert (line["seeds"], line["images"], line["holds_zero"]) == ("2", "200", "True")
    assert line["chosen_by"] == "test" and float(line["value"]) == pytest.approx(0.005)


def test_cells_without_answers_have_no_intervals():
    """Those of older work."""
    old = Entry("a", 1, 0, "single", CELLS[2].summary, None)
    assert list(differences.tables(cells.columns([old]), Choices(HOW))) == []
    none = {"synthetic": {"test": {"net": [None]}}}
    unkept = Entry("a", 1, 0, "single", CELLS[2].summary, None, none)
    assert list(differences.tables(cells.columns([unkept]), Choices(HOW))) == []
    found = comparison.documents([old], Choices(HOW))
    assert (
        b"How certain" not in found["table.md"] and len(found["differences.csv"].splitlines()) == 1
    )


def test_tables_come_back_from_their_records():
    choices = Choices(HOW, "prism", ("medoids",), ("random_real",))
    record = json.loads(json.dumps(cells.to_records(CELLS, choices)))
    assert cells.from_records(record) == (CELLS, choices)
    record["schema"] = 2
    with pytest.raises(UserError, match="schema 2"):
        cells.from_records(record)
