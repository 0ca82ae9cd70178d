"""Charts: every number of sets and classes can be drawn, and says what it is given."""

from __future__ import annotations

import inspect
import io

import numpy as np
import pytest
from PIL import Image

from prism_jax.analysis import charts
from prism_jax.analysis.calibration import reliability

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
