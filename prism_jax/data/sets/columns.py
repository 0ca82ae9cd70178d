"""Which class each column of a set's soft labels is, as its hard labels bear it out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from prism_jax.data.datasets import plain
from prism_jax.data.sets.base import Found
from prism_jax.data.sets.classes import numbers_of
from prism_jax.errors import UserError


def least_agreement(classes: int, count: int) -> float:
    """The share of images whose largest soft label is their class, from which on labels fit.

    It is above chance by more than its deviation, and by more than columns in a wrong order have
    of classes that keep their place: one on average, hardly ever five. Labels of a weak teacher
    are above it; a handful of images is not asked for more than nine in ten.
    """
    chance = 1 / classes
    deviation = math.sqrt(chance * (1 - chance) / count)
    return min(chance + max(deviation, (1 - chance) * min(0.1, 4 / classes)), 0.9)


def in_our_order(
    path: str,
    found: Found,
    order_K: np.ndarray,
    places_N: np.ndarray,
    labels_N: np.ndarray,
    official: Sequence[str] | None,
) -> tuple[np.ndarray, str | None]:
    """The soft labels of some images, a column for each of our labels.

    Columns are in the order of the set's numbers. Of names without numbers nobody says an order:
    sorted as text, unless another usual one clearly fits the hard labels better.

    Args:
      path: of the set, for messages.
      found: it, with soft labels.
      order_K: the position in its classes of each of our labels.
      places_N, labels_N: the images, and our labels of them.
      official: names of the data set's classes, in its order.

    Returns:
      Float32 logits (N, K), and what a person should know of the order.

    Raises:
      UserError: no order fits the hard labels.
    """
    assert found.soft_NK is not None
    soft_NK = found.soft_NK[places_N]
    readings = {"in the order of its numbers": order_K}
    if not found.numbered:
        readings = {words: _inverse(at)[order_K] for words, at in _orders(found, order_K, official)}
    right = {words: soft_NK[:, at].argmax(1) == labels_N for words, at in readings.items()}
    usual = next(iter(readings))
    best = max(right, key=lambda words: right[words].sum())
    gained = int((right[best] & ~right[usual]).sum())
    lost = int((right[usual] & ~right[best]).sum())
    taken = best if gained - lost > 2 * math.sqrt(gained + lost) else usual
    said = "; ".join(f"{words}: {fits.mean():.1%}" for words, fits in right.items())
    count, classes = len(labels_N), len(order_K)
    if right[taken].mean() < least_agreement(classes, count):
        raise UserError(
            f"{path}: its soft labels contradict its labels. The largest one is the class of its "
            f"image for so many, with the columns {said} (chance is about {1 / classes:.1%}). "
            f"They are in another order, or of other images. Number the labels as the columns are "
            f"(their names go to class_names of an .npz, or to the schema of a parquet file), or "
            f"leave out relabel.labels_from=set, and labels are made here"
        )
    if taken == usual:
        return soft_NK[:, readings[usual]], None
    return soft_NK[:, readings[taken]], (
        f"the columns of its soft labels are taken {taken}, which fits its labels (the largest "
        f"one is the class of its image for so many, {said})"
    )


def _orders(
    found: Found, order_K: np.ndarray, official: Sequence[str] | None
) -> list[tuple[str, np.ndarray]]:
    """The orders in which people write the columns of classes that have names alone, each once."""
    names = found.classes
    orders = [("sorted as text", np.arange(len(names)))]
    if numbers := numbers_of(names):
        orders.append(("by the numbers in their names", np.argsort(numbers, kind="stable")))
    orders.append(("as the data orders its classes", order_K))
    at = {plain(name): position for position, name in enumerate(names)}
    if official and {*map(plain, official)} == at.keys() and len(at) == len(official):
        official_K = np.array([at[plain(name)] for name in official], np.int64)
        orders.append(("in the data set's official order", official_K))
    _, first = np.unique(found.labels_N, return_index=True)
    orders.append(("as its images name them first", np.argsort(first)))
    different: dict[bytes, tuple[str, np.ndarray]] = {}
    for words, at_K in orders:
        different.setdefault(at_K.astype(np.int64).tobytes(), (words, at_K))
    return [*different.values()]


def _inverse(order_K: np.ndarray) -> np.ndarray:
    return np.argsort(order_K)
