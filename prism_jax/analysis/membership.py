"""Membership inference, scored: likelihood ratios over shadow runs, and what an attacker gains.

R shadow runs, each with a random half of N canaries, are made in pairs: what one has, the other
has not. An attacker knows all runs but a pair, and is asked about the canaries of either.

Carlini et al., Membership inference attacks from first principles, S&P 2022 (arXiv 2112.03570).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from prism_jax.errors import UserError

FEWEST = 6  # runs: of those that are left without a pair, two have a canary and two have not
LEVEL = 0.95  # of every interval


def confidence(logits_NK: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)) of the labels' probability p, which is nearly normal over runs (sec. V)."""
    logits_NK = np.asarray(logits_NK, np.float64)
    rows = np.arange(len(logits_NK))
    others_NK = logits_NK.copy()
    others_NK[rows, labels_N] = -np.inf
    return logits_NK[rows, labels_N] - special.logsumexp(others_NK, axis=1)


def likeness(distances_N: np.ndarray) -> np.ndarray:
    """How like its nearest image one is, from their root mean square distance in levels of 255.

    Half a level, which is what rounding leaves, is added: a copy has a finite value.
    """
    return -np.log(0.5 + np.asarray(distances_N, np.float64))


def likelihood_ratios(values_RN: np.ndarray, member_RN: np.ndarray) -> np.ndarray:
    """The attacker's scores: log N(value; runs with the canary) - log N(value; runs without).

    The means are each canary's, the variances those of all canaries ("fixed variance", section
    VI). Both runs of a pair are left out of what either is scored by, so that a canary's own value
    has no part and both means have as many others: what is no member gets no other score.

    Args:
      values_RN: what was observed of every canary in every run; finite.
      member_RN: whether the run had it; runs 2j and 2j + 1 are complements.

    Returns:
      float64 (R, N).

    Raises:
      UserError: too few runs.
    """
    values_RN, member_RN = np.asarray(values_RN, np.float64), np.asarray(member_RN, bool)
    runs = len(values_RN)
    if runs < FEWEST or runs % 2:
        raise UserError(
            f"likelihood ratios of {runs} shadow runs; they need an even number of at least "
            f"{FEWEST}"
        )
    assert (member_RN[::2] != member_RN[1::2]).all() and np.isfinite(values_RN).all()
    scores_RN = np.empty_like(values_RN)
    for first in range(0, runs, 2):
        known = np.setdiff1d(np.arange(runs), (first, first + 1))
        with_N, with_variance = _normal(values_RN[known], member_RN[known])
        without_N, without_variance = _normal(values_RN[known], ~member_RN[known])
        for run in (first, first + 1):
            scores_RN[run] = stats.norm.logpdf(values_RN[run], with_N, with_variance**0.5)
            scores_RN[run] -= stats.norm.logpdf(values_RN[run], without_N, without_variance**0.5)
    return scores_RN


def _normal(values_RN: np.ndarray, chosen_RN: np.ndarray) -> tuple[np.ndarray, float]:
    """Every canary's mean over the chosen runs, and the variance around them of all."""
    count_N = chosen_RN.sum(0)
    mean_N = np.where(chosen_RN, values_RN, 0.0).sum(0) / count_N
    squares = np.where(chosen_RN, (values_RN - mean_N) ** 2, 0.0).sum()
    variance = squares / (count_N - 1).sum()
    return mean_N, max(variance, 1e-12)


# --- rates ----------------------------------------------------------------------------------


class Rate(NamedTuple):
    """True positives at a false-positive rate.

    Attributes:
      false: the rate that is not exceeded.
      allowed: how many false positives that are; 0: too few non-members to say anything.
      true, low, high: the rate, and its interval (Clopper-Pearson).
    """

    false: float
    allowed: int
    true: float
    low: float
    high: float


class Verdict(NamedTuple):
    """What an attack achieves.

    Attributes:
      auroc, low, high: the area, and its interval (bootstrap over canaries).
      rates: of true positives.
      members, others: numbers of scores.
    """

    auroc: float
    low: float
    high: float
    rates: tuple[Rate, ...]
    members: int
    others: int


def judge(
    scores_RN: np.ndarray,
    member_RN: np.ndarray,
    *,
    at: Sequence[float] = (0.01, 0.001),
    resamples: int = 400,
) -> Verdict:
    """Score an attack: a member's score is higher than a non-member's.

    A canary's scores in several runs are not independent. The bootstrap therefore draws whole
    canaries; the intervals of rates take scores for independent, and are too narrow.
    """
    scores_RN, member_RN = np.asarray(scores_RN), np.asarray(member_RN, bool)
    count = scores_RN.shape[1]
    draw = np.random.Generator(np.random.Philox(0))
    areas = [
        area(scores_RN[:, index], member_RN[:, index])
        for index in draw.integers(count, size=(resamples, count))
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(areas, [tail, 1 - tail])
    members = int(member_RN.sum())
    return Verdict(
        area(scores_RN, member_RN), float(low), float(high),
        tuple(rate(scores_RN, member_RN, false) for false in at),
        members, member_RN.size - members,
    )  # fmt: skip


def area(scores: np.ndarray, member: np.ndarray) -> float:
    """The area under the ROC curve: how often a member's score is higher, ties counting half."""
    ranks = stats.rankdata(scores, axis=None)[member.ravel()]
    members, others = len(ranks), member.size - len(ranks)
    return float((ranks.sum() - members * (members + 1) / 2) / (members * others))


def rate(scores: np.ndarray, member: np.ndarray, false: float) -> Rate:
    """True positives of the lowest threshold with at most this rate of false positives.

    A score equal to the threshold is no positive: of scores that are tied, all are or none.
    """
    inside, outside = scores[member], np.sort(scores[~member])
    allowed = int(false * len(outside) + 1e-9)
    threshold = outside[len(outside) - 1 - allowed]
    positive = int((inside > threshold).sum())
    interval = stats.binomtest(positive, len(inside)).proportion_ci(LEVEL, "exact")
    found = positive / len(inside)
    return Rate(false, allowed, found, float(interval.low), float(interval.high))


def roc(scores: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False- and true-positive rates of all thresholds."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(member.ravel(), scores.ravel())
    return false, true
