"""Intervals by hand: binomial where one factor alone varies, and paired ones against unpaired."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from prism_jax.analysis.intervals import Drawn, Resampling

HOW = Resampling(resamples=20_000)


def binomial(count: int, share: float, level: float = 0.95) -> tuple[float, float]:
    """Between which shares of ``count`` draws lie, of which each is a hit with chance ``share``."""
    outside = (1 - level) / 2
    return tuple(stats.binom.ppf([outside, 1 - outside], count, share) / count)


def by_seed(right_SN: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Answers by seed of images, one student on each."""
    return {(seed, 0): right_N for seed, right_N in enumerate(right_SN)}


def test_one_seed_is_the_binomial_of_its_images():
    # 400 images, of which the first is right on 30 that the second misses, and never the reverse:
    # of 400 draws Binomial(400, 30/400) differ.
    better, worse = np.arange(400) < 230, np.arange(400) < 200
    drawn = Drawn({"a": {(0, 0): better}, "b": {(0, 0): worse}}, HOW)
    found = drawn.difference("a", "b")
    assert (found.value, *found[3:]) == (30 / 400, 1, 1, 400)
    assert found[1:3] == pytest.approx(binomial(400, 30 / 400), abs=1 / 400)
    assert drawn.accuracy("a")[1:3] == pytest.approx(binomial(400, 230 / 400), abs=2 / 400)
    assert not found.holds_zero
    assert drawn.difference("b", "a")[:3] == (-found.value, -found.high, -found.low)


def test_seeds_that_differ_on_every_image_are_the_binomial_of_the_seeds():
    # Seed by seed the first is right on all images or on none: images add nothing.
    right = {(seed, 0): np.full(50, seed < 3) for seed in range(10)}
    never = {key: np.zeros(50, bool) for key in right}
    found = Drawn({"a": right, "b": never}, HOW).difference("a", "b")
    assert found.value == pytest.approx(0.3) and found.seeds == 10
    assert found[1:3] == pytest.approx(binomial(10, 0.3), abs=1e-12)
    # Twin: images alone, seeds pooled, would have no width at all.
    pooled = np.concatenate(list(right.values()))
    assert pooled.mean() == found.value and found.high - found.low > 0.3


def test_both_factors_widen_an_interval():
    # Right where both a coin of the seed and one of the image say so: by the law of total
    # variance the share that is drawn varies by that of the product of two independent shares.
    seeds, images = 30, 200
    of_seed, of_image = np.arange(seeds) < 15, np.arange(images) < 100
    right = {(s, 0): of_image & of_seed[s] for s in range(seeds)}
    p, q = 1 / 2, 1 / 2
    vp, vq = p * (1 - p) / seeds, q * (1 - q) / images
    deviation = np.sqrt(vp * vq + vp * q**2 + vq * p**2)
    found = Drawn({"a": right}, HOW).accuracy("a")
    assert found.high - found.low == pytest.approx(2 * 1.96 * deviation, rel=0.05)
    # Twin: either factor alone is narrower than that.
    assert 2 * 1.96 * np.sqrt(vq * p**2) < 0.6 * (found.high - found.low)


def test_an_unpaired_bootstrap_is_wider():
    """What pairing is for: two sets that mostly fail on the same images."""
    rng = np.random.default_rng(0)
    hard = rng.random((3, 500)) < 0.5
    better = [hard[s] | (np.arange(500) < 12) for s in range(3)]
    sets = {"a": by_seed(better), "b": by_seed(hard)}
    paired = Drawn(sets, HOW).difference("a", "b")
    # Twin: drawn apart from each other, variances add up.
    apart = [Drawn({name: sets[name]}, HOW).accuracy(name) for name in sets]
    width = np.hypot(*(found.high - found.low for found in apart))
    assert not paired.holds_zero and abs(paired.value) < width / 2
    assert width > 3 * (paired.high - paired.low)


def test_equal_sets_differ_by_nothing_and_seeds_are_those_of_both():
    rng = np.random.default_rng(1)
    right = by_seed(rng.random((3, 70)) < 0.7)
    some = {(2, 0): right[2, 0], (5, 0): right[1, 0]}
    drawn = Drawn({"a": right, "b": dict(right), "c": some}, HOW)
    assert drawn.difference("a", "b")[:3] == (0, 0, 0) and drawn.difference("a", "b").holds_zero
    assert drawn.difference("a", "c")[:4] == (0, 0, 0, 1)
    lonely = Drawn({"a": right, "b": {(7, 0): right[0, 0]}}, HOW)
    assert lonely.difference("a", "b") is None


def test_the_same_seed_draws_the_same():
    rng = np.random.default_rng(2)
    sets = {name: by_seed(rng.random((2, 90)) < 0.6) for name in "ab"}
    found = [Drawn(sets, Resampling(500, seed)).difference("a", "b") for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0][1:3] != found[2][1:3]


def test_more_students_on_the_same_images_are_no_more_seeds():
    rng = np.random.default_rng(3)
    sets = {
        name: by_seed(rng.random((3, 80)) < np.array([[0.5], [0.6], [0.7]]) + more)
        for name, more in (("a", 0.1), ("b", 0.0))
    }
    often = {
        name: {(seed, i): right[seed, 0] for seed in range(3) for i in range(5)}
        for name, right in sets.items()
    }
    once, found = Drawn(sets, HOW), Drawn(often, HOW)
    for one, five in (
        (once.accuracy("a"), found.accuracy("a")),
        (once.difference("a", "b"), found.difference("a", "b")),
    ):
        assert five[:3] == pytest.approx(one[:3], abs=1e-12)
        assert (one[3:], five[3:]) == ((3, 3, 80), (3, 15, 80))
    # Twin: fifteen seeds, as it would be if every student had images of its own.
    pooled = {
        name: {(5 * s + i, 0): right_N for (s, i), right_N in right.items()}
        for name, right in often.items()
    }
    narrow, wide = (d.accuracy("a") for d in (Drawn(pooled, HOW), found))
    assert narrow.value == wide.value
    assert narrow.high - narrow.low < 0.8 * (wide.high - wide.low)


def test_a_seed_with_fewer_students_weighs_less():
    """All right with three students of one seed, none with the only one of the other."""
    right = {(0, i): np.ones(40, bool) for i in range(3)} | {(1, 0): np.zeros(40, bool)}
    found = Drawn({"a": right}, HOW).accuracy("a")
    assert found == (0.75, 0.0, 1.0, 2, 4, 40)  # either seed twice: 1/4 each


def test_students_on_one_set_are_drawn():
    """As independent seeds were: nothing else is left to draw."""
    right = {(7, i): np.full(50, i < 3) for i in range(10)}
    found = Drawn({"a": right}, HOW).accuracy("a")
    assert found[3:] == (1, 10, 50)
    assert found[1:3] == pytest.approx(binomial(10, 0.3), abs=1e-12)
