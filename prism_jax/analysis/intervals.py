"""Intervals of accuracies and of their differences: paired by seed and by test image.

Two sets of images are tested on the same images by students of the same seeds, and what is hard for
one is mostly hard for the other. So seeds and images are drawn again together for all sets: both
factors of a two-way layout with replacement and apart from each other (the pigeonhole bootstrap,
Owen 2007, arXiv 0712.1111). An interval is between quantiles of what is drawn.

With few seeds the interval knows little of how much they differ: with one, nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prism_jax import rng

AT_ONCE = 250  # draws of images whose weights are in memory together

# Whether each answer is right, bool (N,), by seed.
Right = Mapping[Any, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How it is drawn: how often, by which seed, and the share that an interval holds."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95


class Interval(NamedTuple):
    """A value and what it lies between, and how many seeds and images it is of."""

    value: float
    low: float
    high: float
    seeds: int
    images: int

    @property
    def holds_zero(self) -> bool:
        return self.low <= 0 <= self.high


class Drawn:
    """Sets whose images are drawn together.

    Args:
      sets: the answers to the same N images, by the names of sets.
    """

    def __init__(self, sets: Mapping[str, Right], how: Resampling):
        self._how = how
        self._keys = {name: list(right) for name, right in sets.items()}
        pairs = [(name, key) for name, right in sets.items() for key in right]
        self._at = {pair: i for i, pair in enumerate(pairs)}
        right_PN = np.stack([sets[name][key] for name, key in pairs])
        self._images = right_PN.shape[1]
        # Whole numbers: a difference of nothing is nothing.
        self._right_P, self._drawn_PR = right_PN.sum(1), _drawn(right_PN, how)

    def accuracy(self, name: str) -> Interval:
        """Of one set."""
        return self._interval(self._keys[name], lambda counts: counts(name))

    def difference(self, name: str, other: str) -> Interval | None:
        """Of two sets, over the seeds that both have; None where there is none."""
        keys = [key for key in self._keys[name] if (other, key) in self._at]
        return self._interval(keys, lambda counts: counts(name) - counts(other)) if keys else None

    def _interval(self, keys: Sequence[Hashable], of: Callable[..., np.ndarray]) -> Interval:
        def counts(table: np.ndarray) -> Callable[[str], np.ndarray]:
            return lambda name: table[[self._at[name, key] for key in keys]]

        count = len(keys) * self._images
        right_S, drawn_SR = of(counts(self._right_P)), of(counts(self._drawn_PR))
        drawn_R = (_draws_of_seeds(len(keys), self._how).T * drawn_SR).sum(0)
        outside = (1 - self._how.level) / 2
        low, high = np.quantile(drawn_R, [outside, 1 - outside])
        value, low, high = (float(x) / count for x in (right_S.sum(), low, high))
        return Interval(value, low, high, len(keys), self._images)


@functools.cache
def _draws_of_seeds(count: int, how: Resampling) -> np.ndarray:
    """How often each of some seeds is drawn, (resamples, count)."""
    draw = rng.generator(how.seed, "intervals/seeds", count)
    return draw.multinomial(count, np.full(count, 1 / count), how.resamples)


def _drawn(right_PN: np.ndarray, how: Resampling) -> np.ndarray:
    """Right answers among images that are drawn, the same for all P: whole numbers (P, R)."""
    draw, count = rng.generator(how.seed, "intervals/images"), right_PN.shape[1]
    found = []
    for start in range(0, how.resamples, AT_ONCE):
        drawn_RN = draw.integers(count, size=(min(AT_ONCE, how.resamples - start), count))
        weights_RN = np.stack([np.bincount(row, minlength=count) for row in drawn_RN])
        found.append(right_PN.astype(np.float32) @ weights_RN.T.astype(np.float32))  # exact
    return np.rint(np.concatenate(found, axis=1)).astype(np.int64)
