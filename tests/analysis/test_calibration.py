"""What probabilities are worth, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from prism_jax.analysis import calibration


def logits(*confidences: float) -> np.ndarray:
    """Of two classes, the first with these probabilities."""
    p = np.array(confidences)
    return np.log(np.stack([p, 1 - p], axis=1))


def test_calibration_error_by_hand():
    # Bins of a fifth. In (0.8, 1]: 0.9 and 0.95, one right. In (0.6, 0.8]: 0.7, right.
    found = calibration.reliability(logits(0.9, 0.95, 0.7), np.array([0, 1, 0]), bins=5)
    assert found.count_B.tolist() == [0, 0, 0, 1, 2]
    assert found.accuracy_B[3:].tolist() == [1.0, 0.5]
    assert found.confidence_B[3:] == pytest.approx([0.7, 0.925])
    assert found.error == pytest.approx((0.3 + 2 * 0.425) / 3)
    assert found.overconfidence == pytest.approx((-0.3 + 2 * 0.425) / 3)
    # Twins: bins that count alike; confidence less accuracy of all together.
    assert found.error != pytest.approx((0.3 + 0.425) / 2)
    assert found.error != pytest.approx(abs((0.9 + 0.95 + 0.7) / 3 - 2 / 3))


def test_probabilities_that_hold_have_no_error():
    labels = np.array([0] * 3 + [1])
    assert calibration.reliability(logits(*[0.75] * 4), labels).error == pytest.approx(0.0)
    assert calibration.reliability(logits(*[0.75] * 4), 1 - labels).error == pytest.approx(0.5)
    sure = calibration.reliability(np.array([[1000.0, 0.0]]), np.array([0]))
    assert sure.count_B[-1] == 1 and sure.error == 0.0


def test_agreement_counts_predictions_not_right_ones():
    a, b = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 1, 0]]
    share = calibration.agreement([a, b, 7 * a + 1])
    assert share.tolist() == [[1.0, 0.5, 1.0], [0.5, 1.0, 0.5], [1.0, 0.5, 1.0]]


def test_the_most_confused_are_shares_of_their_own_class():
    counts = np.array([[8, 2, 0], [1, 0, 1], [0, 0, 100]])
    shares = counts / counts.sum(1, keepdims=True)
    for given in (counts, shares):
        found = calibration.most_confused(np.array(given))
        assert [(c.of, c.taken_for) for c in found] == [(1, 0), (1, 2), (0, 1)]
        assert [c.share for c in found] == pytest.approx([0.5, 0.5, 0.2])
    assert len(calibration.most_confused(counts, most=1)) == 1
