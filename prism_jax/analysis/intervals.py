"""Intervals of accuracies and of their differences: paired by seed and by test image.

Two sets of images are tested on the same images by students of the same seeds, and what is hard for
one is mostly hard for the other. So seeds and images are drawn again together for all sets: both
factors of a two-way layout with replacement and apart from each other (the pigeonhole bootstrap,
Owen 2007, arXiv 0712.1111). An interval is between quantiles of what is drawn.

Students are nested in the seeds of the images that they train on: five on one set are no five sets.
A seed of images is drawn with all of its students, so that an interval says how images of another
seed would do. Where all are of one seed of images, its students are drawn, and the interval is of
students on that set alone.

With few seeds the interval knows little of how much they differ: with one, nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prism_jax import rng

AT_ONCE = 250  # draws of images whose weights are in memory together

Key = tuple[int, int]  # the seed of images, and which student on them
# Whether each answer is right, bool (N,).
Right = Mapping[Key, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resampling:
    """How it is drawn: how often, by which seed, and the share that an interval holds."""

    resamples: int = 10_000
    seed: int = 0
    level: float = 0.95


class Interval(NamedTuple):
    """A value and what it lies between, and what it is of.

    Attributes:
      seeds: of images; students: on all of them together; images: that they were tested on.
    """

    value: float
    low: float
    high: float
    seeds: int
    students: int
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
        """Of two sets, over the seeds and students that both have; None where there is none."""
        keys = [key for key in self._keys[name] if (other, key) in self._at]
        return self._interval(keys, lambda counts: counts(name) - counts(other)) if keys else None

    def _interval(self, keys: Sequence[Key], of: Callable[..., np.ndarray]) -> Interval:
        def counts(table: np.ndarray) -> Callable[[str], np.ndarray]:
            return lambda name: table[[self._at[name, key] for key in keys]]

        right_S, drawn_SR = of(counts(self._right_P)), of(counts(self._drawn_PR))
        seeds, cluster_S = np.unique([seed for seed, _ in keys], return_inverse=True)
        if len(seeds) == 1:
            cluster_S = np.arange(len(keys))
        times_SR = _draws(cluster_S.max() + 1, self._how).T[cluster_S]
        # Where seeds have as many students each, as many are drawn every time.
        drawn_R = (times_SR * drawn_SR).sum(0) * (len(keys) / times_SR.sum(0))
        outside, count = (1 - self._how.level) / 2, len(keys) * self._images
        low, high = np.quantile(drawn_R, [outside, 1 - outside])
        value, low, high = (float(x) / count for x in (right_S.sum(), low, high))
        return Interval(value, low, high, len(seeds), len(keys), self._images)


@functools.cache
def _draws(count: int, how: Resampling) -> np.ndarray:
    """How often each of some seeds, or of one seed's students, is drawn: (resamples, count)."""
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
