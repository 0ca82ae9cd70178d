"""What generated images are worth: copies and noise are seen."""

from __future__ import annotations

import numpy as np
import pytest

from prism_jax.diffusion.quality import Quality, nearest, quality
from prism_jax.errors import UserError

LABELS = np.zeros(400, np.int32)


def rows(seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 1)).astype(np.uint8)


def of(images: np.ndarray, predicted=LABELS) -> Quality:
    return quality(images, predicted[: len(images)], LABELS[: len(images)],
                   train=rows(0), test=rows(1))  # fmt: skip


def test_distances_by_hand():
    among = np.array([[0, 0], [3, 4]], np.uint8).reshape(2, 1, 2, 1)
    asked = np.array([[0, 1], [3, 4], [6, 8]], np.uint8).reshape(3, 1, 2, 1)
    assert nearest(asked, among).tolist() == [1, 0, 5]
    far = np.random.default_rng(0).normal(size=(600, 7))
    plain = np.linalg.norm(far[:, None] - far[None, :50], axis=-1).min(1)
    np.testing.assert_allclose(nearest(far, far[:50]), plain, atol=1e-7)
    many = np.random.default_rng(1).normal(size=(5000, 3))
    plain = np.linalg.norm(many[:300, None] - many[None, 300:], axis=-1).min(1)
    np.testing.assert_allclose(nearest(many[:300], many[300:]), plain, atol=1e-7)


def test_images_of_the_same_law_pass():
    found = of(rows(2))
    assert found.faults == () and found.recognised == 1
    assert 0.9 < found.distance < 1.1 and found.near < 0.02


def test_copies_fail_by_distance_and_nearness():
    said = of(rows(0)).faults
    assert len(said) == 2 and "distance 0.00" in said[0] and "near a training" in said[1]


def test_a_few_copies_among_new_images_fail_by_nearness_alone():
    mixed = np.concatenate([rows(2, 360), rows(0)[:40]])
    said = of(mixed).faults
    assert len(said) == 1 and "near a training image" in said[0]


def test_images_that_the_judge_does_not_know_fail():
    predicted = np.where(np.arange(400) < 24, 1, 0)
    found = of(rows(2), predicted)
    assert found.recognised == pytest.approx(0.94) and "recognised 94.0%" in found.faults[0]


def test_blurred_images_fail_by_distance():
    assert any("distance" in fault for fault in of(np.full((400, 2, 2, 1), 999.0)).faults)


def test_test_images_that_are_training_images_leave_the_distance_unknown():
    """A ratio to nothing: the run would end, after all training, with a number no JSON holds."""
    found = quality(rows(2), np.zeros(400), np.zeros(400), train=rows(0), test=rows(0))
    assert found.distance is None and "half of the test images are training" in found.faults[0]


def test_refused():
    with pytest.raises(UserError, match="not finite"):
        of(np.full((2, 2, 2, 1), np.nan))
    with pytest.raises(UserError, match="got 0, 400 and 400"):
        of(rows(0)[:0])
