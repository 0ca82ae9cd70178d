"""Anchors of a class: the points of latent space that its images start from.

One class at a time, on the host, in float64 and on one thread, since scikit-learn adds up what
each thread has found: so the bits depend neither on the number of threads nor on other classes.
(Another processor's linear algebra may still round otherwise.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from prism_jax import environment, rng
from prism_jax.core.clusters import nearest_members
from prism_jax.errors import UserError

if TYPE_CHECKING:  # scikit-learn takes a second to import: not before there is something to find
    from sklearn.cluster import MiniBatchKMeans

NEIGHBOURS = 20  # that an image is compared with, to tell whether it lies apart
FEWEST = 3  # images, of which one may lie apart


@dataclasses.dataclass(frozen=True)
class Clustering:
    """How anchors are found.

    Attributes:
      mode: a row of ``MODES``.
      expand: a chunk of the chunked modes has ``expand * ipc`` latents (D4M's km_expand).
      attempts: of k-means, the best of which counts; one where chunks are seen once.
      outliers: the share of a class's images that is left out first, as lying apart (VLCP: 0.1).
    """

    mode: str = "kmeans"
    expand: int = 10
    attempts: int = 1
    outliers: float = 0.0


class Anchors(NamedTuple):
    """The I anchors of one class.

    Attributes:
      latents_IHWC: float32.
      sizes_I: how many of the class's images belong to each; their shares are DDOQ's weights.
      nearest_I: for each, the position in its class of the nearest real image; all different.
    """

    latents_IHWC: np.ndarray
    sizes_I: np.ndarray
    nearest_I: np.ndarray


class Task(NamedTuple):
    """What a mode is given: latents of one class in a drawn order, and a seed."""

    clustering: Clustering
    latents_ND: np.ndarray
    ipc: int
    random_state: int


def kmeans(task: Task) -> np.ndarray:
    """All latents at once, until nothing moves."""
    from sklearn.cluster import KMeans

    model = KMeans(task.ipc, n_init=task.clustering.attempts, random_state=task.random_state)
    return model.fit(task.latents_ND).cluster_centers_


def minibatch(task: Task) -> np.ndarray:
    """Drawn batches of ``expand * ipc``; for classes that are large."""
    return _minibatch(task).fit(task.latents_ND).cluster_centers_


def chunked(task: Task) -> np.ndarray:
    """One pass, in chunks; the last one takes what is left over."""
    size = task.clustering.expand * task.ipc
    edges = [*range(size, len(task.latents_ND) - size + 1, size)]
    model = _minibatch(task)
    for chunk in np.split(task.latents_ND, edges):
        model.partial_fit(chunk)
    return model.cluster_centers_


def chunked_released(task: Task) -> np.ndarray:
    """One pass, in chunks; what is left over is dropped (D4M's released code)."""
    size = task.clustering.expand * task.ipc
    count = len(task.latents_ND)
    if count < size:
        raise UserError(
            f"anchors by 'chunked_released' need {size} images of every class (expand "
            f"{task.clustering.expand} x ipc {task.ipc}), but one has {count}; lower either, or "
            f"use 'chunked', which takes what there is"
        )
    model = _minibatch(task)
    for at in range(0, count - size + 1, size):
        model.partial_fit(task.latents_ND[at : at + size])
    return model.cluster_centers_


def _minibatch(task: Task) -> MiniBatchKMeans:
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(
        task.ipc,
        batch_size=task.clustering.expand * task.ipc,
        n_init=task.clustering.attempts,
        random_state=task.random_state,
    )


ONE_PASS = ("chunked", "chunked_released")
CHUNKS = (*ONE_PASS, "minibatch")  # of ``expand * ipc`` latents
MODES: dict[str, Callable[[Task], np.ndarray] | None] = {
    "kmeans": kmeans,
    "minibatch": minibatch,
    "chunked": chunked,
    "chunked_released": chunked_released,
    "medoid": kmeans,  # then the nearest real latents in their places
    "none": None,
}


def anchors(
    clustering: Clustering, latents_NHWC: np.ndarray, ipc: int, *, seed: int, cls: int
) -> Anchors:
    """The anchors of a class.

    Args:
      latents_NHWC: of the class's images, in the order of their source.
      seed, cls: address of what is drawn.

    Raises:
      UserError: an unknown mode, numbers out of range, or a class with too few images.
    """
    check(clustering)
    count, *shape = latents_NHWC.shape
    if clustering.mode == "none":
        return Anchors(np.zeros((ipc, *shape), np.float32), np.ones(ipc, np.int64), np.arange(ipc))
    if ipc > count:
        raise UserError(
            f"ipc {ipc} needs as many images of every class, but class {cls} has {count}; lower "
            f"ipc, or use anchors 'none' at strength 1"
        )
    rows_ND = np.asarray(latents_NHWC, np.float64).reshape(count, -1)
    if not np.isfinite(rows_ND).all():
        raise UserError(f"latents of class {cls} are not finite; encode its images in float32")
    from sklearn.metrics import pairwise_distances

    draw = rng.generator(seed, "diffusion/anchors", cls)
    with environment.one_thread():
        kept = inliers(rows_ND, clustering.outliers)
        if ipc > len(kept):
            raise UserError(
                f"ipc {ipc} needs as many images of every class, but class {cls} has {len(kept)} "
                f"without its outliers; lower ipc or the share of outliers"
            )
        order = draw.permutation(kept)
        random_state = int(draw.integers(2**31))
        task = Task(clustering, rows_ND[order], ipc, random_state)
        centres_of = MODES[clustering.mode]
        assert centres_of is not None  # "none" has returned
        centres_ID = centres_of(task)
        distances_NI = pairwise_distances(rows_ND[kept], centres_ID)
        if len(empty := _without_rows(distances_NI)):
            # Two equal centres, of which the second would weigh nothing: a real one in its place.
            taken = nearest_members(distances_NI, distances_NI.argmin(1))
            centres_ID = np.array(centres_ID)
            centres_ID[empty] = rows_ND[kept[taken[empty]]]
            distances_NI = pairwise_distances(rows_ND[kept], centres_ID)
    owner_N = _owners(distances_NI)
    nearest_I = kept[nearest_members(distances_NI, owner_N)]
    if clustering.mode == "medoid":
        centres_ID = rows_ND[nearest_I]
    return Anchors(
        centres_ID.reshape(ipc, *shape).astype(np.float32),
        np.bincount(owner_N, minlength=ipc),
        nearest_I,
    )


def _owners(distances_NI: np.ndarray) -> np.ndarray:
    """The centre that each row belongs to: the nearest.

    Where images are copies, centres may be equal, and the first would have all of their rows: these
    are dealt out, the nearest first, so that every centre has some.
    """
    owner_N = distances_NI.argmin(1)
    alike: dict[int, list[int]] = {}
    for empty in _without_rows(distances_NI):
        first = int(owner_N[distances_NI[:, empty].argmin()])
        alike.setdefault(first, [first]).append(int(empty))
    for first, centres in alike.items():
        rows = np.flatnonzero(owner_N == first)
        rows = rows[np.argsort(distances_NI[rows, first], kind="stable")]
        owner_N[rows] = np.resize(centres, len(rows))
    return owner_N


def _without_rows(distances_NI: np.ndarray) -> np.ndarray:
    """The centres to which no row is nearest."""
    counts = np.bincount(distances_NI.argmin(1), minlength=distances_NI.shape[1])
    return np.flatnonzero(counts == 0)


def check(clustering: Clustering) -> None:
    """Refuse numbers that no class can be clustered with.

    Raises:
      UserError: what was given, and what is allowed.
    """
    if clustering.mode not in MODES:
        raise UserError(f"anchors are {clustering.mode!r}; allowed: {', '.join(MODES)}")
    if not 0 <= clustering.outliers <= 0.5:
        raise UserError(f"the share of outliers is {clustering.outliers}; allowed: 0 to 0.5")
    if clustering.expand < 1 or clustering.attempts < 1:
        raise UserError(
            f"k-means has expand {clustering.expand} and attempts {clustering.attempts}; both are "
            f"at least 1"
        )
    if clustering.mode in ONE_PASS and clustering.attempts > 1:
        raise UserError(
            f"k-means has {clustering.attempts} attempts, and {clustering.mode}, which sees each "
            f"chunk once, makes one; set generate.attempts=1, or use 'minibatch'"
        )


def inliers(rows_ND: np.ndarray, outliers: float) -> np.ndarray:
    """Positions of the rows that do not lie apart from their neighbours (local outlier factor)."""
    count = len(rows_ND)
    if outliers == 0 or count < FEWEST:
        return np.arange(count)
    from sklearn.neighbors import LocalOutlierFactor

    factor = LocalOutlierFactor(min(NEIGHBOURS, count - 1), contamination=outliers)
    return np.flatnonzero(factor.fit_predict(rows_ND) == 1)


def fewest_inliers(count: int, outliers: float) -> int:
    """How many of so many rows are left by ``inliers``; more only where rows lie apart alike."""
    if count < FEWEST:
        return count
    return count - math.ceil(outliers * (count - 1))  # those below a quantile of their factors
