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


def test_one_seed_is_the_binomial_of_its_images():
    # 400 images, of which the first is right on 30 that the second misses, and never the reverse:
    # of 400 draws Binomial(400, 30/400) differ.
    better, worse = np.arange(400) < 230, np.arange(400) < 200
    drawn = Drawn({"a": {0: better}, "b": {0: worse}}, HOW)
    found = drawn.difference("a", "b")
    assert (found.value, found.seeds, found.images) == (30 / 400, 1, 400)
    assert found[1:3] == pytest.approx(binomial(400, 30 / 400), abs=1 / 400)
    assert drawn.accuracy("a")[1:3] == pytest.approx(binomial(400, 230 / 400), abs=2 / 400)
    assert not found.holds_zero
    assert drawn.difference("b", "a")[:3] == (-found.value, -found.high, -found.low)


def test_seeds_that_differ_on_every_image_are_the_binomial_of_the_seeds():
    # Seed by seed the first is right on all images or on none: images add nothing.
    right = {seed: np.full(50, seed < 3) for seed in range(10)}
    never = {seed: np.zeros(50, bool) for seed in range(10)}
    found = Drawn({"a": right, "b": never}, HOW).difference("a", "b")
    assert found.value == pytest.approx(0.3) and found.seeds == 10
    assert found[1:3] == pytest.approx(binomial(10, 0.3), abs=1e-12)
    # Twin: images alone, seeds pooled, would have no width at all.
    pooled = {0: np.concatenate(list(right.values()))}
    assert pooled[0].mean() == found.value and found.high - found.low > 0.3


def test_both_factors_widen_an_interval():
    # Right where both a coin of the seed and one of the image say so: by the law of total
    # variance the share that is drawn varies by that of the product of two independent shares.
    seeds, images = 30, 200
    of_seed, of_image = np.arange(seeds) < 15, np.arange(images) < 100
    right = {s: of_image if of_seed[s] else np.zeros(images, bool) for s in range(seeds)}
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
    sets = {"a": dict(enumerate(better)), "b": dict(enumerate(hard))}
    paired = Drawn(sets, HOW).difference("a", "b")
    # Twin: drawn apart from each other, variances add up.
    apart = [Drawn({name: sets[name]}, HOW).accuracy(name) for name in sets]
    width = np.hypot(*(found.high - found.low for found in apart))
    assert not paired.holds_zero and abs(paired.value) < width / 2
    assert width > 3 * (paired.high - paired.low)


def test_equal_sets_differ_by_nothing_and_seeds_are_those_of_both():
    rng = np.random.default_rng(1)
    right = {seed: rng.random(70) < 0.7 for seed in range(3)}
    drawn = Drawn({"a": right, "b": dict(right), "c": {2: right[2], 5: right[1]}}, HOW)
    assert drawn.difference("a", "b")[:3] == (0, 0, 0) and drawn.difference("a", "b").holds_zero
    assert drawn.difference("a", "c")[:4] == (0, 0, 0, 1)
    lonely = Drawn({"a": right, "b": {7: right[0]}}, HOW)
    assert lonely.difference("a", "b") is None


def test_the_same_seed_draws_the_same():
    rng = np.random.default_rng(2)
    sets = {name: {s: rng.random(90) < 0.6 for s in range(2)} for name in "ab"}
    found = [Drawn(sets, Resampling(500, seed)).difference("a", "b") for seed in (0, 0, 1)]
    assert found[0] == found[1] and found[0][1:3] != found[2][1:3]
