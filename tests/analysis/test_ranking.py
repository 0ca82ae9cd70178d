"""DD-Ranking's scores: its documented values, and its formula written out once more."""

from __future__ import annotations

import math

import pytest

from prism_jax.analysis import ranking


def released(difference: float) -> float:
    """The package's own expression (ddranking 0.2, metrics/soft_label.py), of what it is given."""
    lower, upper = math.exp(-1), math.exp(1)
    return (math.exp(difference) - lower) / (upper - lower)


def test_the_documented_values():
    assert ranking.squash(0.0) == pytest.approx(0.269, abs=5e-4)
    assert ranking.squash(1.0) == 1.0
    assert ranking.squash(-1.0) == 0.0
    # 5 points above random, 40 below the full set.
    found = ranking.label_robust(full_hard=0.56, made_hard=0.16, made=0.45, random=0.40)
    assert (found.improvement, found.recovery) == pytest.approx((0.05, 0.40))
    assert found.score.value == pytest.approx(0.201, abs=5e-4)
    assert found.score.as_released == pytest.approx(-0.1565, abs=5e-5)


@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_scores_are_the_released_ones_of_fractions_and_of_per_cents(weight):
    top1 = {"full_hard": 0.9, "made_hard": 0.7, "made": 0.8, "random": 0.85}
    found = ranking.label_robust(**top1, weight=weight)
    difference = weight * (0.8 - 0.85) - (1 - weight) * (0.9 - 0.7)
    assert found.score.value == pytest.approx(released(difference))
    assert found.score.as_released == pytest.approx(released(100 * difference))

    gained = {"made": 0.8, "random": 0.7, "made_plain": 0.5, "random_plain": 0.55}
    score = ranking.augmentation_robust(**gained, weight=weight)
    assert score.value == pytest.approx(released(weight * 0.1 - (1 - weight) * 0.05))
    # Of accuracies that are hundredths of these, per cents are fractions: both agree.
    small = {name: value / 100 for name, value in gained.items()}
    assert ranking.augmentation_robust(**small, weight=weight).as_released == pytest.approx(
        score.value
    )


def test_the_released_scale_does_not_tell_methods_apart():
    far, near = (
        ranking.label_robust(full_hard=0.9, made_hard=hard, made=0.5, random=0.5).score
        for hard in (0.1, 0.6)
    )
    assert near.value - far.value > 0.05
    assert near.as_released == pytest.approx(far.as_released, abs=1e-6)
