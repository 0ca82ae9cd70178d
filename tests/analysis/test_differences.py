"""What the tables of a comparison say of hand-made answers, and against whom."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from prism_jax.analysis import cells, comparison, differences
from prism_jax.analysis.cells import Entry
from prism_jax.analysis.differences import (
    BEST,
    OWN_RANDOM,
    OWN_SELECTED,
    REFERENCE,
    SELECTED,
    Choices,
)
from prism_jax.analysis.intervals import Resampling
from prism_jax.data import answers
from prism_jax.errors import UserError

HOW = Resampling(resamples=1000)
IMAGES = 200


def right(count: int) -> str:
    """The first answers right, of ``IMAGES``."""
    return answers.pack_right(np.arange(IMAGES) < count)


def entry(
    row: str, seed: int, tests: dict[str, int], held: dict[str, int] | None = None,
    protocol: str = "single",
) -> Entry:  # fmt: skip
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
    return Entry(row, 1, seed, protocol, summary, None, found)


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
    assert "2 seed(s) of images, 2 student(s), 200 test images; who is best is" in text
    assert "is chosen by these test images." in text
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


def test_under_its_own_protocol_a_method_is_measured_by_its_own_controls():
    """Labels and training differ between rows: b's medoids are ahead of a's, by its labels."""
    own = [
        entry(row, 0, {"synthetic": at, "random_real": at - 5, "medoids": at - 3,
                       "real_herding": at - 4}, protocol="own")
        for row, at in (("a", 100), ("b", 150))
    ]  # fmt: skip
    own.append(entry("random_real", 0, {"synthetic": 20}, protocol="own"))
    settings = {"reference": "a", "selected_real": ("medoids", "real_herding")}
    found = table(own, **settings)
    assert found.against == {OWN_RANDOM: None, OWN_SELECTED: None}
    by_label = {line.tested.label: line for line in found.lines}
    for row in "ab":
        values = {why: d.value for why, d in by_label[row].differences.items()}
        assert values == {OWN_RANDOM: pytest.approx(5 / 200), OWN_SELECTED: pytest.approx(3 / 200)}
        assert by_label[row].against[OWN_SELECTED].startswith(f"{row}: real images nearest")
    assert not any(by_label[label].differences for label in by_label if label not in "ab")
    text = differences.markdown([found], Choices(HOW))
    assert f"- {OWN_RANDOM} | - {OWN_SELECTED} |" in text and "and not by other methods" in text
    assert "| random real, soft labels | 10.0 [6.0, 14.0] | – | – |" in text
    lines = list(csv.DictReader(io.StringIO(differences.table_csv([found]))))
    assert {x["against"] for x in lines if x["method"] == "b" and x["why"]} == {
        "b: random real, soft labels", "b: real images nearest to the anchors",
    }  # fmt: skip
    # Twin: under one protocol they are measured by one.
    alike = [Entry(*e[:3], "single", *e[4:]) for e in map(dataclasses.astuple, own)]
    assert table(alike, **settings).against[SELECTED] == "real images nearest to the anchors"


@pytest.mark.parametrize("loss, measured", [("ce", True), ("kl", False)])
def test_a_method_of_hard_labels_is_measured_by_random_images_with_hard_labels(loss, measured):
    """Of one with soft labels they would say what its labels gain, not its images."""
    made = entry("a", 0, {"synthetic": 100, "random_real_hard": 90}, protocol="own")
    found = table([dataclasses.replace(made, summary=made.summary | {"protocol": {"loss": loss}})])
    (line,) = [line for line in found.lines if line.tested.label == "a"]
    values = {why: d.value for why, d in line.differences.items()}
    assert values == ({OWN_RANDOM: pytest.approx(10 / 200)} if measured else {})


def test_who_is_best_is_said_by_the_seeds_that_all_have():
    """Stopped in the second seed, in which everybody is worse."""
    found = table([*(entry("a", s, {"synthetic": 150 - 40 * s}) for s in range(2)),
                   entry("b", 0, {"synthetic": 140})])  # fmt: skip
    assert found.against == {BEST: "a"}
    text = differences.markdown([found], Choices(HOW))
    assert "| b (1 of 2 seeds) | 70.0 [" in text and "| a | 65.0 [" in text
    entries = [entry("a", s, {"synthetic": 150}) for s in range(2)]
    whole = comparison.markdown([*entries, entry("b", 0, {"synthetic": 140})])
    assert "| b | 70.0 (1 of 2) |" in whole and "| a | 75.0 ± 0.0 |" in whole
    assert "up to 2 (in brackets: of fewer) seed(s)" in whole
    assert "brackets" not in comparison.markdown(entries)
    tex = comparison.latex([*entries, entry("b", 0, {"synthetic": 140})])
    assert "b & 70.0 (1 of 2)" in tex and r"a & 75.0 $\pm$ 0.0" in tex


def test_who_is_best_is_not_chosen_over_different_seeds():
    """Seed 9 is easier than the others: c is worse than a and b, and ahead of them."""
    three = [*(entry("a", s, {"synthetic": 140}) for s in (0, 1)),
             entry("b", 1, {"synthetic": 150}), entry("c", 9, {"synthetic": 190})]  # fmt: skip
    found = table(three)
    assert found.against == {BEST: "b"} and found.apart == ("c",)
    text = differences.markdown([found], Choices(HOW))
    assert "these test images, but not among c, for want of seeds in common." in text
    # Of equally many those that share more seeds.
    more = [*three, *(entry("c", s, {"synthetic": 100}) for s in (5, 6)),
            *(entry("d", s, {"synthetic": 120}) for s in (5, 6))]  # fmt: skip
    assert table(more).against == {BEST: "d"} and table(more).apart == ("a", "b")
    # No two: nobody is best.
    none = table([three[0], three[3]])
    assert none.against == {} and none.apart == ("a", "c")
    # One alone is the best of itself; and all that share a seed are compared.
    assert table(three[3:]).against == {BEST: "c"}
    assert "but not" not in differences.markdown([table(three[:3])], Choices(HOW))


def test_students_and_the_seeds_of_their_images_are_told_apart():
    several = [entry("a", s, {"synthetic": 150}) for s in range(2)]
    for e in several:
        e.right["synthetic"]["test"]["net"] *= 3
    fewer = entry("b", 0, {"synthetic": 140})
    text = differences.markdown([table([*several, fewer])], Choices(HOW))
    assert "1 or 2 seed(s) of images, 1 or 6 student(s)" in text
    assert "drawn with all of its students" in text and "one seed, they are drawn" not in text
    assert "| b (1 of 2 seeds) |" in text
    of_one = differences.markdown([table(several[:1])], Choices(HOW))
    assert "1 seed(s) of images, 3 student(s)" in of_one
    assert "says nothing of images of another seed" in of_one and "all of its" not in of_one
    text = differences.markdown([table([several[0], fewer])], Choices(HOW))
    assert "| b (1 of 3 students) |" in text


def test_every_interval_is_a_line_of_the_csv():
    found = table(CELLS, reference="prism", selected_real=("medoids",))
    lines = list(csv.DictReader(io.StringIO(differences.table_csv([found]))))
    assert len(lines) == 5 + 5 * 3 - 3  # accuracies, and all but those from themselves
    [line] = [
        x for x in lines if (x["method"], x["set"], x["why"]) == ("d4m", "synthetic", SELECTED)
    ]
    assert line["against"] == "real images nearest to the anchors"
    assert (line["seeds"], line["students"], line["images"]) == ("2", "2", "200")
    assert line["holds_zero"] == "True"
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


def test_what_is_no_record_of_a_comparison_is_refused():
    """A summary has a schema too."""
    with pytest.raises(UserError, match="which would say choices and cells"):
        cells.from_records({"schema": 1, "config": "digits"})


def test_squeeze_of_older_records_was_one_number():
    new = {"networks": {"squeeze": 40.0}, "seconds": {"recover": 5.0, "relabel": 2.0}, "bytes": {}}
    old = {"seconds": {"squeeze": 40.0, "recover": 5.0, "relabel": 2.0}, "bytes": {}}
    written = dataclasses.replace(CELLS[0], costs={"synthetic": old, "medoids": new})
    [found], _ = cells.from_records(cells.to_records([written], Choices(HOW)))
    assert found.costs == {"synthetic": new, "medoids": new}
