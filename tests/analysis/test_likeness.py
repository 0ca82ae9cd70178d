"""How like real images a set is: numbers worked out by hand, each with a twin that is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from prism_jax.analysis import likeness
from prism_jax.diffusion.quality import nearest

# Four real points on a line; with one neighbour the radii are 1, 1, 2 and 4.
LINE = np.array([[0.0], [1.0], [3.0], [7.0]])


def test_density_and_coverage_by_hand():
    made = np.array([[0.5], [2.5], [100.0]])
    # 0.5 is within 1 of 0 and of 1; 2.5 within 2 of 3 (0.5), not within 1 of 1, nor 4 of 7 (4.5).
    found = likeness.manifold(LINE, made, neighbours=1)
    assert found == likeness.Manifold(density=3 / (1 * 3), coverage=3 / 4)
    # Twins: over the real images; the image itself as its nearest neighbour, so that no ball is.
    assert found.density != 3 / 4
    assert likeness.manifold(LINE, made + 1000.0, neighbours=1) == likeness.Manifold(0.0, 0.0)
    # On the border is outside, as in the released code: 2 is at 1 of 1, whose radius is 1.
    border = likeness.manifold(LINE, np.array([[2.0]]), neighbours=1)
    assert border == likeness.Manifold(density=1.0, coverage=1 / 4)


def test_the_same_images_cover_everything():
    points = np.random.default_rng(0).standard_normal((300, 4))  # more than one chunk
    found = likeness.manifold(points, points)
    assert found is not None and found.coverage == 1.0
    # Each ball holds its own image and the k - 1 within its radius.
    assert found.density == pytest.approx(1.0)
    assert likeness.manifold(points[:5], points) is None


def test_frechet_of_two_normal_distributions_by_hand():
    # Means 3 apart, variances 1 and 4 on one axis, equal on the other: 9 + (2 - 1)^2.
    a = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]]) * np.sqrt(1.5)
    b = a * np.array([2.0, 1.0]) + np.array([3.0, 0.0])
    assert likeness.frechet(a, b) == pytest.approx(10.0)
    assert likeness.frechet(a, a) == pytest.approx(0.0, abs=1e-9)
    assert likeness.frechet(a, b) != pytest.approx(9 + 3.0)  # the twin: variances less one another
    assert likeness.frechet(a[:1], b) is None


def test_frechet_equals_the_matrix_root_s():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((50, 6)), rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6))
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum()
    expected += np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert likeness.frechet(a, b) == pytest.approx(expected)
    few = rng.standard_normal((4, 6))  # fewer than dimensions: its covariance has no inverse
    assert likeness.frechet(few, a) == pytest.approx(likeness.frechet(a, few))


def test_nearness_finds_copies_and_what_is_nearer_than_unseen_images():
    train = np.array([[0.0, 0.0], [10.0, 0.0]])
    of_test = nearest(np.array([[0.0, 2.0], [10.0, 4.0], [10.0, 2.0]]), train)
    made = np.array([[0.0, 0.0], [10.0, 1.0], [5.0, 0.0]])
    found = likeness.nearness(nearest(made, train), of_test)
    assert found.copies == 1
    assert found.distance == pytest.approx(1.0 / 2.0)  # medians of (0, 1, 5) and (2, 2, 4)
    assert found.near == pytest.approx(2 / 3)
    assert likeness.nearness(nearest(made + 3.0, train), of_test).copies == 0
