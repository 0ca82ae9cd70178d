"""Figures: the pixels that must be exact, and that every shape of input can be drawn."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from prism_jax.analysis import figures


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def contains(canvas: np.ndarray, patch: np.ndarray) -> bool:
    """Whether a patch stands in a picture, exactly."""
    windows = np.lib.stride_tricks.sliding_window_view(canvas, patch.shape)[..., 0, :, :, :]
    rows, columns = np.nonzero((windows[:, :, 0, 0] == patch[0, 0]).all(-1))
    return any((windows[r, c] == patch).all() for r, c in zip(rows, columns, strict=True))


def enlarged(image_HWC: np.ndarray, factor: int) -> np.ndarray:
    return np.kron(image_HWC, np.ones((factor, factor, 1), np.uint8))


def test_small_images_are_enlarged_without_smoothing_in_pairs():
    rng = np.random.default_rng(0)
    initial_NHWC = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    synthetic_NHWC = rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    labels_N = np.array([0, 0, 1, 1])
    canvas = pixels(figures.grid(initial_NHWC, synthetic_NHWC, labels_N))
    gap = np.full((96, 2, 3), 255, np.uint8)
    for a, b in zip(initial_NHWC, synthetic_NHWC, strict=True):
        assert contains(canvas, np.concatenate([enlarged(a, 6), gap, enlarged(b, 6)], axis=1))
    swapped = [enlarged(synthetic_NHWC[0], 6), gap, enlarged(initial_NHWC[0], 6)]
    assert not contains(canvas, np.concatenate(swapped, axis=1))
    smooth = Image.fromarray(initial_NHWC[0]).resize((96, 96), Image.Resampling.BILINEAR)
    assert not contains(canvas, np.asarray(smooth))


def test_images_that_began_as_noise_stand_alone():
    synthetic_NHWC = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    alone = pixels(figures.grid(None, synthetic_NHWC, np.array([0, 1])))
    for image in synthetic_NHWC:
        assert contains(alone, enlarged(image, 6))
    twice = np.concatenate([enlarged(synthetic_NHWC[0], 6)] * 2, axis=1)
    gap = np.full((96, 2, 3), 255, np.uint8)
    pair = np.concatenate([twice[:, :96], gap, twice[:, 96:]], axis=1)
    pairs = pixels(figures.grid(synthetic_NHWC, synthetic_NHWC, np.array([0, 1])))
    assert contains(pairs, pair) and not contains(alone, pair)


def test_the_grid_stops_at_its_classes_and_slots():
    images_NHWC = np.zeros((12, 8, 8, 1), np.uint8)
    images_NHWC[:, 0, 0, 0] = 10 + np.arange(12)
    labels_N = np.repeat(np.arange(4), 3)
    canvas = pixels(figures.grid(images_NHWC, images_NHWC, labels_N, classes=2, slots=2))
    shown = [i for i in range(12) if contains(canvas, enlarged(images_NHWC[i].repeat(3, -1), 12))]
    assert shown == [0, 1, 3, 4]


def test_large_images_and_ragged_classes_fit():
    images_NHWC = np.zeros((5, 64, 224, 3), np.uint8)
    names = ["tench", "a name that goes on and on", "horn"]
    canvas = pixels(figures.grid(images_NHWC, images_NHWC, np.array([0, 1, 1, 1, 2]),
                                 class_names=names))  # fmt: skip
    assert canvas.shape[1] < 1300


@pytest.mark.parametrize("letter", ["\u9b5a", "e"], ids=["of no font", "twin, of one"])
def test_letters_that_no_font_has_are_said_once(letter, monkeypatch, recwarn):
    monkeypatch.setattr(figures, "_fonts", lambda: ["DejaVu Sans"])
    images_NHWC = np.zeros((2, 12, 12, 3), np.uint8)
    names = [3 * letter, f"fish {letter}"]
    figures.grid(images_NHWC, images_NHWC, np.arange(2), class_names=names)
    said = [str(one.message) for one in recwarn if "font" in str(one.message)]
    assert len(said) == (letter != "e")
    assert all("stand as boxes; install one" in one for one in said)


def test_other_fonts_come_after_our_own_and_only_where_they_are(monkeypatch):
    fonts = [
        SimpleNamespace(name=name) for name in ("Noto Sans", "DejaVu Sans", "Noto Sans CJK SC")
    ]
    monkeypatch.setattr(figures.font_manager.fontManager, "ttflist", fonts)
    found = figures._fonts.__wrapped__()
    assert found == ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans"]


def losses(units: int, *, undrawn: bool = True) -> list[dict]:
    lines = []
    for unit in range(units):
        for step in (0, 50, 99):
            ends = step in (0, 99)
            other = 8.0 / (step + 1) if ends and undrawn else None
            lines.append({"unit": unit, "step": step, "drawn": ["a"],
                          "ce": {"a": 1.0 / (step + 1 + unit), "b": other},
                          "bn": {"a": 4.0 / (step + 1 + unit), "b": other}})  # fmt: skip
    return lines


@pytest.mark.parametrize("lines", [losses(1), losses(3), losses(2, undrawn=False), losses(1)[:1]])
def test_recover_curves_draw_any_run(lines):
    png = figures.recover_curves(lines, primary="a")
    assert pixels(png).shape == (645, 1560, 3)
    assert png == figures.recover_curves(lines, primary="a")


@pytest.mark.parametrize("whose", ["drawn", "told"])  # statistics, logits
def test_recover_curves_show_who_supervised(whose):
    def curves(**more):
        return figures.recover_curves([line | more for line in losses(1)], primary="a")

    assert curves(**{whose: ["a", "b"]}) != curves()
    assert curves(**{whose: ["a"]}) == curves()  # what an older line, without "told", means


def test_the_ends_of_a_line_are_of_the_same_batches():
    """A batch that has no last value of a teacher does not move the first."""
    whole = [{0: 8.0, 99: 2.0}, {0: 6.0, 99: 1.0}]
    assert figures._ends([*whole, {0: 100.0}]) == {0: [8.0, 6.0], 99: [2.0, 1.0]}
    assert figures._ends([{50: 3.0}]) == {50: [3.0]} and figures._ends([]) == {}
    assert figures._ends([{99: 7.0}, {99: 7.0}, whole[0]]) == {0: [8.0], 99: [2.0]}
    lines = losses(3)
    at = lines.index(next(x for x in lines if (x["unit"], x["step"]) == (2, 99)))

    def drawn(first):
        lines[at]["bn"]["b"] = None  # the last of the third
        lines[at - 2]["bn"]["b"] = first
        return figures.recover_curves(lines, primary="a")

    assert drawn(1.0) == drawn(2.0)


def test_terms_that_are_zero_or_unknown_are_left_out():
    def drawn(a, b):
        lines = losses(1)
        for line in lines:
            line["bn"] = {"a": a, "b": b}
        return figures.recover_curves(lines, primary="a")

    assert drawn(0.0, None) == drawn(None, None)
    assert drawn(1e-3, None) != drawn(None, None)


@pytest.mark.parametrize("students", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_student_curves_draw_any_number_of_students(students):
    seeds = [[{"epoch": e, "top1": e / 10 + seed / 100} for e in range(9)] for seed in range(2)]
    curves = {
        "synthetic": {student: seeds for student in students},
        "full_real": {students[0]: [[{"epoch": 3, "top1": 0.9}, {"epoch": 4, "top1": None}]]},
        "something new": {},
    }
    assert pixels(figures.student_curves(curves)).std() > 5


def test_the_full_real_set_is_the_level_it_ends_at():
    def drawn(*top1s):
        lines = [{"epoch": 5 - e, "top1": x} for e, x in enumerate(reversed(top1s))]
        synthetic = [{"epoch": e, "top1": e / 100} for e in range(50)]
        return figures.student_curves(
            {"synthetic": {"a": [synthetic]}, "full_real": {"a": [lines]}}
        )

    assert drawn(0.3, 0.9) == drawn(0.9) != drawn(0.9, 0.3)
