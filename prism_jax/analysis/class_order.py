"""Find out from logits and labels how a network was misread: its classes, or its pixels.

Two mistakes give a network that looks untrained: classes in another order than the network's, and
pixels normalised in another way than at its training. Whether another reading is better is
decided by tests on the same images; see :func:`far_above` and :func:`find_order`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.special import log_softmax
from scipy.stats import binom

# A suspicion is reported when chance would bring it about less than once in a million times;
# that leaves room for the dozen suspicions that are tried.
SIGNIFICANCE = 1e-6


class Finding(NamedTuple):
    """Another class order that fits far better than the stated one.

    Attributes:
      order_K: the output of the head that each class of the data set turns out to be.
      why: the mistake that explains it; None where it is only estimated from the images.
      top1: under this order; of an estimated one, on images it was not estimated from.
      stated_top1: under the stated order.
    """

    order_K: np.ndarray
    why: str | None
    top1: float
    stated_top1: float


def ranks(logits_NH: np.ndarray, labels_N: np.ndarray, order_K: np.ndarray) -> np.ndarray:
    """The rank of each image's class among the classes' logits: 0 is a correct prediction.

    Args:
      logits_NH: of the whole head.
      labels_N: classes of the data set.
      order_K: the output of the head that is each class.

    Returns:
      (N,) int; of equal logits the lower class comes first. H where a logit is not finite.
    """
    logits_NK = logits_NH[:, order_K]
    own_N1 = np.take_along_axis(logits_NK, labels_N[:, None], axis=1)
    before = np.arange(len(order_K)) < labels_N[:, None]
    rank_N = ((logits_NK > own_N1) | ((logits_NK == own_N1) & before)).sum(1)
    return np.where(np.isfinite(logits_NK).all(1), rank_N, logits_NH.shape[1])


def confusion(logits_NH: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """How often each output of the head is the largest for each class: int64 counts (K, H)."""
    counts_KH = np.zeros((classes, logits_NH.shape[1]), np.int64)
    finite_N = np.isfinite(logits_NH).all(1)
    np.add.at(counts_KH, (labels_N[finite_N], logits_NH[finite_N].argmax(1)), 1)
    return counts_KH


def likelihoods(logits_NH: np.ndarray, labels_N: np.ndarray, classes: int) -> np.ndarray:
    """The sum over each class's images of the log-softmax of every output: float64 (K, H).

    It also tells outputs apart that are the largest for no image of a class.
    """
    sums_KH = np.zeros((classes, logits_NH.shape[1]), np.float64)
    finite_N = np.isfinite(logits_NH).all(1)
    for c in np.unique(labels_N[finite_N]):
        sums_KH[c] = log_softmax(logits_NH[finite_N & (labels_N == c)], axis=1).sum(0)
    return sums_KH


def assign(gain_KH: np.ndarray, stated_K: np.ndarray | None) -> np.ndarray:
    """The one-to-one order that gains most; with :func:`likelihoods` the likeliest one.

    The assignment problem is solved exactly; of equally good orders, one that keeps the stated
    places.

    Args:
      gain_KH: of each output for each class.
      stated_K: the order the user stated; None: none.
    """
    gain_KH = gain_KH.astype(np.float64)
    if stated_K is not None:
        # Less than one image that is not told apart, even over all classes.
        gain_KH[np.arange(len(stated_K)), stated_K] += 0.5 / len(stated_K)
    return linear_sum_assignment(gain_KH, maximize=True)[1]


def least_gain(classes: int) -> float:
    """The gain in top-1, over chance or over another reading, below which nothing is reported.

    A network with random weights tells images apart a little, so that the best of all orders
    raises it: with ten classes by 0.22 at most (192 networks, three data sets). Five times the
    chance level, but at least 0.1 and at most 0.3, is more than that, and less than what a
    trained network gains.
    """
    return float(np.clip(5 / classes, 0.1, 0.3))


def looks_trained(right_N: np.ndarray, classes: int) -> bool:
    """Whether a network is visibly better than chance."""
    return bool(right_N.mean() >= 1 / classes + least_gain(classes))


def far_above(right_N: np.ndarray, stated_right_N: np.ndarray, classes: int) -> bool:
    """Whether one way of reading predictions is far better than another on the same images.

    It must be both certain (McNemar's exact test: among images that just one of the two gets
    right, either is as likely if they are equally good) and large (``least_gain``).
    """
    gained = int((right_N & ~stated_right_N).sum())
    lost = int((stated_right_N & ~right_N).sum())
    if gained - lost < least_gain(classes) * len(right_N) or gained == 0:
        return False
    return bool(binom.sf(gained - 1, gained + lost, 0.5) < SIGNIFICANCE)


def find_order(
    logits_NH: np.ndarray,
    labels_N: np.ndarray,
    stated_K: np.ndarray | None,
    classes: int,
    *,
    class_names: Sequence[str] | None = None,
    official_names: Sequence[str] | None = None,
) -> Finding | None:
    """Find out whether the network's classes stand in another order than stated.

    First the usual mistakes: each is one fixed order, and is compared with the stated one on the
    images of the classes it moves. Then the likeliest of all orders, by the assignment problem.
    Chosen among K! it fits any images too well, so the images are halved within each class and
    either half is judged by the order that the other one gave.

    An order is reported where ``far_above`` holds on the images of the classes it moves, and the
    network looks trained under it: classes that a random network confuses are no permutation.

    Args:
      logits_NH: of the whole head.
      labels_N: classes of the data set.
      stated_K: the output of the head that is each class, as stated; None: not stated.
      classes: K.
      class_names: of the labels, for instance folder names.
      official_names: of the data set, in its official order.

    Returns:
      The finding, or None where no order is far above the stated one.
    """
    never = np.zeros(len(labels_N), bool)
    stated = never if stated_K is None else ranks(logits_NH, labels_N, stated_K) == 0
    best, best_order, why = stated, stated_K, None
    suspects = (
        [] if stated_K is None
        else candidates(stated_K, logits_NH.shape[1], class_names, official_names)
    )  # fmt: skip
    for reason, order_K in suspects:
        right = ranks(logits_NH, labels_N, order_K) == 0
        moved = (order_K != stated_K)[labels_N]
        better = looks_trained(right, classes) and right.sum() > best.sum()
        if better and far_above(right[moved], stated[moved], classes):
            best, best_order, why = right, order_K, reason

    half_N = _halves(labels_N)
    right, moved = never.copy(), never.copy()
    for half in (0, 1):
        seen, unseen = half_N == half, half_N != half
        order_K = assign(likelihoods(logits_NH[seen], labels_N[seen], classes), best_order)
        right[unseen] = ranks(logits_NH[unseen], labels_N[unseen], order_K) == 0
        moved[unseen] = best_order is None or (order_K != best_order)[labels_N[unseen]]
    if looks_trained(right, classes) and far_above(right[moved], best[moved], classes):
        best, why = right, None
        best_order = assign(likelihoods(logits_NH, labels_N, classes), best_order)
    if best is stated:
        return None
    assert best_order is not None  # it came with a better reading
    return Finding(best_order, why, float(best.mean()), float(stated.mean()))


class Misread(NamedTuple):
    """Another normalisation of the pixels under which a network is far better.

    Attributes:
      name: of the normalisation.
      finding: the class order that goes with it; None: the stated one.
      top1: of it, on the images it was tried on.
      stated_top1: of the stated normalisation on the same images.
    """

    name: str
    finding: Finding | None
    top1: float
    stated_top1: float


def find_normalisation(
    readings: Iterable[tuple[str, np.ndarray]],
    labels_N: np.ndarray,
    stated_right_N: np.ndarray,
    order_K: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    official_names: Sequence[str] | None = None,
) -> Misread | None:
    """Find out whether a network is far better on pixels normalised in another way.

    Each reading is judged under the stated class order and, for both mistakes may be made at
    once, under the order that :func:`find_order` finds in it.

    Args:
      readings: name of a normalisation and the logits (N, H) under it.
      labels_N: classes of the data set.
      stated_right_N: which images are right as they were normalised so far.
      order_K: the output of the head that is each class.
      class_names, official_names: see :func:`find_order`.

    Returns:
      The best of those that are far above the stated one, or None.
    """
    classes, best, found = len(order_K), stated_right_N, None
    for name, logits_NH in readings:
        finding = find_order(
            logits_NH,
            labels_N,
            order_K,
            classes,
            class_names=class_names,
            official_names=official_names,
        )
        right = ranks(logits_NH, labels_N, finding.order_K if finding else order_K) == 0
        if right.sum() > best.sum() and far_above(right, stated_right_N, classes):
            best = right
            found = Misread(name, finding, float(right.mean()), float(stated_right_N.mean()))
    return found


def _halves(labels_N: np.ndarray) -> np.ndarray:
    """0 or 1 per image, in turn within each class."""
    half_N = np.zeros(len(labels_N), np.int32)
    for c in np.unique(labels_N):
        (at,) = np.nonzero(labels_N == c)
        half_N[at] = np.arange(len(at)) % 2
    return half_N


def candidates(
    stated_K: np.ndarray,
    head: int,
    class_names: Sequence[str] | None,
    official_names: Sequence[str] | None,
) -> list[tuple[str, np.ndarray]]:
    """The orders that usual mistakes lead to, each with its explanation; the stated one is not.

    Args:
      stated_K: the output of the head that is each class, as stated.
      head: how many outputs there are.
      class_names, official_names: see :func:`find_order`.
    """
    classes = len(stated_K)
    found: list[tuple[str, np.ndarray]] = []

    def suspect(why: str, order_K: np.ndarray) -> None:
        if not any(np.array_equal(order_K, known) for known in [stated_K, *(o for _, o in found)]):
            found.append((why, order_K))

    for first in (0, 1):
        numbers = [str(first + i) for i in range(classes)]
        span = f"{first}, {first + 1}, {first + 10}, ..."
        rank = _ranked(numbers)
        suspect(f"the network was trained on folders sorted as text ({span})", stated_K[rank])
        suspect(
            f"your labels number folders sorted as text ({span}), the network counts them in "
            "numeric order",
            stated_K[np.argsort(rank)],
        )
    if class_names is not None:
        as_text = "the network's classes are your class names sorted as text"
        suspect(as_text, stated_K[_ranked(class_names)])
        as_numbers = "the network's classes are your class names in numeric order (2 before 10)"
        suspect(as_numbers, stated_K[_ranked(class_names, _natural)])
    suspect(
        "shifted by one: the network counts from one, or has a background class first",
        (stated_K + 1) % head,
    )
    suspect(
        "shifted by one: your labels count from one, the network from zero", (stated_K - 1) % head
    )
    if official_names is not None:
        by_name = _ranked(official_names, str.casefold)
        suspect(
            "the network's classes are sorted by class name, yours are in the official order",
            stated_K[by_name],
        )
        official = {_plain(name): i for i, name in enumerate(official_names)}
        named = [official.get(_plain(name)) for name in class_names or ()]
        matched = sorted(i for i in named if i is not None) == list(range(classes))
        suspect(
            "your classes are sorted by class name, the network has the official order",
            stated_K[np.array(named) if matched else np.argsort(by_name)],
        )
    return found


def _ranked(names: Sequence[str], key: Callable[[str], Any] | None = None) -> np.ndarray:
    """The place of each name among the sorted names."""
    in_order = sorted(range(len(names)), key=lambda i: key(names[i]) if key else names[i])
    return np.argsort(np.array(in_order))


def _natural(name: str) -> list[Any]:
    """A key that sorts the numbers in names as numbers."""
    return [int(s) if i % 2 else s for i, s in enumerate(re.split(r"([0-9]+)", name))]


def _plain(name: str) -> str:
    """A class name without case and punctuation: "French horn" is "french_horn"."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
