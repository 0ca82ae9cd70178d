"""What a classifier's probabilities are worth, and how far classifiers agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

BINS = 15  # as Guo et al. choose


class Reliability(NamedTuple):
    """Predictions by their confidence, in bins of equal width over [0, 1].

    Attributes:
      count_B: how many predictions are in a bin.
      confidence_B: their mean probability, NaN in an empty bin.
      accuracy_B: the share that is right, NaN in an empty bin.
    """

    count_B: np.ndarray
    confidence_B: np.ndarray
    accuracy_B: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al., ICML 2017)."""
        filled = self.count_B > 0
        gaps = np.abs(self.confidence_B - self.accuracy_B)[filled]
        return float(np.average(gaps, weights=self.count_B[filled]))

    @property
    def overconfidence(self) -> float:
        """Mean confidence less accuracy: above 0 where probabilities promise too much."""
        filled = self.count_B > 0
        gaps = (self.confidence_B - self.accuracy_B)[filled]
        return float(np.average(gaps, weights=self.count_B[filled]))


def reliability(logits_NK: np.ndarray, labels_N: np.ndarray, *, bins: int = BINS) -> Reliability:
    """Sort predictions by the probability of the class that is predicted.

    Args:
      logits_NK: of at least one image.
      labels_N: the right classes.
      bins: a probability on the border of two belongs to the lower one.
    """
    probability_NK = softmax(np.asarray(logits_NK, np.float64), axis=1)
    predicted_N = probability_NK.argmax(1)
    top_N = probability_NK[np.arange(len(predicted_N)), predicted_N]
    bin_N = np.clip(np.ceil(top_N * bins).astype(int) - 1, 0, bins - 1)
    count_B = np.bincount(bin_N, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence_B = np.bincount(bin_N, top_N, bins) / count_B
        accuracy_B = np.bincount(bin_N, predicted_N == labels_N, bins) / count_B
    return Reliability(count_B, confidence_B, accuracy_B)


def agreement(logits: Sequence[np.ndarray]) -> np.ndarray:
    """The share of images on which two classifiers predict the same class, for every two of T.

    Args:
      logits: (N, K) of each, of the same images.

    Returns:
      float64 (T, T), ones on the diagonal.
    """
    predicted_TN = np.stack([np.asarray(x).argmax(1) for x in logits])
    return (predicted_TN[:, None] == predicted_TN[None]).mean(axis=-1)


class Confused(NamedTuple):
    """A class that is taken for another one."""

    of: int
    taken_for: int
    share: float


def most_confused(counts_KK: np.ndarray, *, most: int = 20) -> list[Confused]:
    """The most frequent mistakes, as shares of their class' images; none that never happens.

    Args:
      counts_KK: how often a class (row) is taken for a class (column).
    """
    total_K1 = np.maximum(counts_KK.sum(1, keepdims=True), 1)
    share_KK = counts_KK / total_K1
    np.fill_diagonal(share_KK, 0.0)
    order = np.argsort(-share_KK, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, share_KK.shape), strict=True)
    return [Confused(int(k), int(j), float(share_KK[k, j])) for k, j in pairs if share_KK[k, j] > 0]
