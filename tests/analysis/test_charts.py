"""Charts: every number of sets and classes can be drawn, and says what it is given."""

from __future__ import annotations

import inspect
import io
import re

import numpy as np
import pytest
from PIL import Image

from prism_jax.analysis import audit, charts, comparison, figures, words
from prism_jax.analysis.calibration import reliability
from prism_jax.analysis.cells import Entry
from prism_jax.analysis.membership import FEWEST

RNG = np.random.default_rng(0)
FEW = ["zero", "one", "two"]


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def values(classes: int, missing: bool = False) -> np.ndarray:
    found = RNG.random(classes)
    found[0] = np.nan if missing else found[0]
    return found


@pytest.mark.parametrize("sets", [1, 4])
def test_the_plane_has_a_panel_for_every_set(sets):
    def points(count: int) -> charts.Points:
        return charts.Points(RNG.standard_normal((count, 2)), np.arange(count) % 3)

    given = {f"run {i}": points(6) for i in range(sets)}
    drawn = inspect.unwrap(charts.plane)(points(30), given, dict(enumerate(FEW)))
    assert [axes.get_title(loc="center") for axes in drawn.axes] == list(given)
    for axes in drawn.axes:  # three classes of real images and of the set's, in the same places
        assert [len(dots.get_offsets()) for dots in axes.collections] == [10, 2] * 3
        np.testing.assert_array_equal(
            axes.collections[0].get_offsets(), drawn.axes[0].collections[0].get_offsets()
        )
    assert len(charts.plane(points(30), given, dict(enumerate(FEW)))) > 10_000


@pytest.mark.parametrize("classes", [1, 40])
def test_numbers_by_class(classes):
    names = [f"class {k}" for k in range(classes)]
    sets = {"a": values(classes), "b": values(classes), "real": values(classes)}
    first = charts.by_class({"mean": sets}, ["real"], names, order_by="real")
    sets["a"] = sets["a"] / 2
    assert first != charts.by_class({"mean": sets}, ["real"], names, order_by="real")


def test_a_class_without_a_number_is_a_gap():
    sets = {"a": values(3, missing=True), "b": np.full(3, np.nan)}
    png = charts.by_class({"mean": sets, "variance": sets}, ["b"], FEW, order_by="a", percent=True)
    assert picture(png).shape[1] == 1620


@pytest.mark.parametrize("sets, classes", [(1, 40), (4, 3)])
def test_confusions_have_a_panel_for_every_set(sets, classes):
    shares = {f"run {i}": np.eye(classes) for i in range(sets)}
    right = charts.confusions(shares, [f"class {k}" for k in range(classes)])
    shares["run 0"] = np.roll(np.eye(classes), 1, axis=1)
    assert right != charts.confusions(shares, [f"class {k}" for k in range(classes)])


def test_reliabilities_of_any_number_of_students():
    logits, labels = RNG.standard_normal((50, 3)), RNG.integers(0, 3, 50)
    sets = {"a": reliability(logits, labels), "real": reliability(3 * logits, labels)}
    one = picture(charts.reliabilities({"resnet18": sets}, ["real"]))
    five = picture(charts.reliabilities({f"s{i}": sets for i in range(5)}, ["real"]))
    assert five.shape[0] > 1.5 * one.shape[0]


def test_no_two_of_many_runs_look_alike():
    names = [*map(str, range(14)), *"abcde"]
    styles = charts._styles(names, list("abcde"))
    for markers in ("marker", "linestyle"):  # lines have no markers where there are many classes
        looks = {(styles[name]["color"], styles[name][markers]) for name in names}
        assert len(looks) == len(names)


# --- names ----------------------------------------------------------------------------------

NAMES = ["$$ cash", "US$_A$", "a\\$b"]  # mathematics that cannot be read, that can, and escaped


def _plane():
    points = charts.Points(RNG.standard_normal((6, 2)), np.arange(6) % 3)
    return charts.plane, (points, dict.fromkeys(NAMES, points), dict(enumerate(NAMES))), {}


def _by_class(classes):
    numbers = {"mean": dict.fromkeys(NAMES, values(len(classes)))}
    return charts.by_class, (numbers, NAMES[:1], classes), {"order_by": NAMES[0]}


def _confusions():
    return charts.confusions, (dict.fromkeys(NAMES, np.eye(3)), NAMES), {}


def _reliabilities():
    logits = RNG.standard_normal((50, 3))
    found = reliability(logits, RNG.integers(0, 3, 50))
    return charts.reliabilities, ({NAMES[0]: dict.fromkeys(NAMES, found)}, NAMES[1:]), {}


def _mosaics():
    images_NHWC = np.zeros((3, 8, 8, 3), np.uint8)
    rows = [figures.Strip(name, [images_NHWC[:1]]) for name in NAMES[:2]]
    return figures.strips, (rows,), {"heading": NAMES[2]}


def _recover():
    steps = [(0, 1.0), (99, 5e-4)]
    lines = [
        {"unit": 0, "step": step, "drawn": NAMES, **dict.fromkeys(("ce", "bn"), of)}
        for step, value in steps
        for of in [dict.fromkeys(NAMES, value)]
    ]
    return figures.recover_curves, (lines,), {"primary": NAMES[0]}


def _students():
    lines = [[{"epoch": e, "top1": e / 10} for e in range(3)]]
    return figures.student_curves, ({name: {NAMES[0]: lines} for name in NAMES[1:]},), {}


def _costs():
    trained = {NAMES[2]: {"top1": 0.5, "top1_per_seed": [0.5], "seconds": 4.0}}
    spent = {
        "networks": {},
        "seconds": {"recover": 1.0, "relabel": 2.0},
        "bytes": {"images": 1, "labels": 1},
    }
    made = {"validate": trained}
    entry = Entry(NAMES[0], 1, 0, NAMES[1], made, None, {}, {"synthetic": spent})
    return comparison.accuracy_over_cost, ([entry],), {}


def _roc():
    member_RN = np.arange(FEWEST * 4).reshape(FEWEST, 4) % 2 == np.arange(FEWEST)[:, None] % 2
    values = RNG.standard_normal(member_RN.shape)
    attacks = [audit.Attack(name, "set", values, member_RN, (None,) * FEWEST) for name in NAMES]
    return audit.roc, (attacks,), {}


def _gradients():
    found = {
        "iteration": 0, "noise": [1e-3, 1e3],
        **dict.fromkeys(("cosine_bn", "cosine_ce"), np.eye(2)),
        **dict.fromkeys(("change", "along"), {"exchanged_00": [1.0, 1.0], "reseeded": [1.0, 2.0]}),
    }  # fmt: skip
    study = {"alphas": [1e-3, 10.0], "alpha": 0.01, "iterations": [found]}
    return audit.gradients, (study,), {}


@pytest.mark.parametrize(
    "given, names",
    [
        (_plane, NAMES), (lambda: _by_class(NAMES), NAMES), (lambda: _by_class(["k"] * 40), NAMES),
        (_confusions, NAMES), (_reliabilities, NAMES), (_mosaics, NAMES), (_recover, NAMES),
        (_students, NAMES), (_costs, NAMES), (_roc, NAMES), (_gradients, []),
    ],
)  # fmt: skip
def test_names_are_drawn_as_they_are_written_and_numbers_are_plain(given, names):
    draw, of, more = given()
    svg = figures.in_forms(draw, *of, forms=("svg",), **more)["svg"].decode()
    drawn = re.findall(r"<!-- (.*?) -->", svg)  # what every piece of text says
    assert len(drawn) > 2 and not [text for text in drawn if "math" in text]
    for name in names:
        assert [text for text in drawn if name in text], name


def test_long_names_leave_room_for_what_they_name():
    names = [f"a class whose folder has a name without an end, or nearly, {k}" for k in range(10)]
    assert figures.short(names[0]) == "a class whose folde… nearly, 0"
    assert figures.short("x" * 30) == "x" * 30 and len(figures.short("x" * 31)) == 30
    assert max(map(len, words.ROW_LABELS.values())) <= figures.LONGEST_SET  # ours are whole
    sets = {name: np.eye(10) for name in names[:2]}
    drawn = inspect.unwrap(charts.confusions)(sets, names)
    drawn.draw_without_rendering()
    heights = [axes.get_position().height for axes in drawn.axes[:2]]
    assert min(heights) > 0.4  # of the figure's
    points = charts.Points(np.random.default_rng(0).random((20, 2)), np.arange(20) % 10)
    drawn = inspect.unwrap(charts.plane)(points, {"set": points}, dict(enumerate(names)))
    drawn.draw_without_rendering()
    legend = drawn.legends[0].get_window_extent()
    assert 0 <= legend.x0 and legend.x1 <= drawn.bbox.x1
