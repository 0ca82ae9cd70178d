"""How like real images a set is, in the features of a network.

Features are those of one network throughout: numbers of different networks do not compare. Sets
of few images are far from any other by every one of these numbers, so that they say something only
beside those of as many real images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from prism_jax.data.lazy import chunks
from prism_jax.diffusion.quality import NEAREST

NEIGHBOURS = 5  # as Naeem et al. choose


class Manifold(NamedTuple):
    """How a set lies in balls around real images that reach to their k-th nearest other one.

    Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML 2020.

    Attributes:
      density: in how many of these balls an image of the set lies, over k; 1 for real images, on
        average.
      coverage: the share of the balls in which some image of the set lies.
    """

    density: float
    coverage: float


def manifold(
    real_ND: np.ndarray, made_MD: np.ndarray, *, neighbours: int = NEIGHBOURS
) -> Manifold | None:
    """Density and coverage of a set; None where there are too few real images for k neighbours."""
    if len(real_ND) <= neighbours or not len(made_MD):
        return None
    radii_N = np.concatenate(
        [
            np.partition(block, neighbours, axis=1)[:, neighbours]
            for block in _rows(real_ND, real_ND)
        ]
    )  # the nearest of all is the image itself
    inside, covered = 0, 0
    for at, block in zip(chunks(len(real_ND)), _rows(real_ND, made_MD), strict=True):
        within = block < radii_N[at, None]
        inside += int(within.sum())
        covered += int(within.any(axis=1).sum())
    return Manifold(inside / (neighbours * len(made_MD)), covered / len(real_ND))


def _rows(a_ND: np.ndarray, b_MD: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances of a part of ``a`` to all of ``b``, part by part."""
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    for at in chunks(len(a_ND)):
        yield cdist(a_ND[at], b_MD)


def frechet(a_ND: np.ndarray, b_MD: np.ndarray) -> float | None:
    """The Frechet distance of two sets' features, were they normally distributed.

    ``|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, with n - 1 below the covariances.
    It is the FID of Heusel et al. (NeurIPS 2017) in the features of any network, and is called so
    of Inception's alone.

    Returns:
      None where a set has fewer than two images.
    """
    if min(len(a_ND), len(b_MD)) < 2:
        return None
    a_ND, b_MD = np.asarray(a_ND, np.float64), np.asarray(b_MD, np.float64)
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a_ND, b_MD))
    # The root's trace by two symmetric problems: that of C_a C_b is the same, and ill-conditioned.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    common = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    means = np.square(a_ND.mean(0) - b_MD.mean(0)).sum()
    return float(max(0.0, means + np.trace(cov_a) + np.trace(cov_b) - 2 * common))


class Nearness(NamedTuple):
    """Distances to the nearest training image.

    Attributes:
      distance: their median, over that of test images: 1 is as far as unseen real images are.
      near: the share nearer to one than the nearest 1 % of test images are.
      copies: how many are a training image.
    """

    distance: float | None
    near: float
    copies: int


def nearness(of_made: np.ndarray, of_test: np.ndarray) -> Nearness:
    """How near images are to training images, from their ``nearest`` and that of test images."""
    usual = np.median(of_test)
    return Nearness(
        float(np.median(of_made) / usual) if usual > 0 else None,
        float(np.mean(of_made < np.quantile(of_test, NEAREST))),
        int((of_made == 0).sum()),
    )
