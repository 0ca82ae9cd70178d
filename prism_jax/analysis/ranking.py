"""DD-Ranking's scores (arXiv 2505.13300): accuracies less what labels and views alone give.

All accuracies are fractions. The released package (version 0.2) puts per cents into the same
formula: losses end at its lower bound, however large they are, and gains leave the scale. Both are
given; only the first tells methods apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

LOWEST, HIGHEST = math.exp(-1), math.e


class Score(NamedTuple):
    """A score.

    Attributes:
      value: of accuracies as fractions, between 0 and 1.
      as_released: of the same in per cent, as the released package has them: from -0.157 up.
    """

    value: float
    as_released: float


def squash(difference: float) -> float:
    """``(e^x - e^-1) / (e - e^-1)``: 0.269 for no difference, 0 for -1, 1 for 1."""
    return (math.exp(difference) - LOWEST) / (HIGHEST - LOWEST)


def _score(difference: float) -> Score:
    return Score(squash(difference), squash(100 * difference))


class LabelRobust(NamedTuple):
    """What is left of a set's accuracy without its soft labels.

    Attributes:
      recovery: HLR, the full real set's top-1 less the synthetic set's, both with hard labels.
      improvement: IOR, the synthetic set's top-1 less that of as many random real images, both
        by the method's own recipe.
      score: LRS.
    """

    recovery: float
    improvement: float
    score: Score


def label_robust(
    *, full_hard: float, made_hard: float, made: float, random: float, weight: float = 0.5
) -> LabelRobust:
    """The label-robust score: ``w IOR - (1 - w) HLR``, squashed.

    Args:
      full_hard: top-1 of students of the whole real set, hard labels.
      made_hard: of the synthetic images with hard labels.
      made: of the synthetic set by the method's own recipe.
      random: of as many random real images by the same recipe.
      weight: w.
    """
    recovery, improvement = full_hard - made_hard, made - random
    return LabelRobust(
        recovery, improvement, _score(weight * improvement - (1 - weight) * recovery)
    )


def augmentation_robust(
    *, made: float, random: float, made_plain: float, random_plain: float, weight: float = 0.5
) -> Score:
    """The augmentation-robust score: gains over random images with and without views, squashed.

    Args:
      made, random: top-1 with the method's views; ``..._plain``: without any.
      weight: of the gain with views.
    """
    return _score(weight * (made - random) + (1 - weight) * (made_plain - random_plain))
