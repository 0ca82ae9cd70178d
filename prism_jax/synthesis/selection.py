"""Which real images stand for their class: choices in a teacher's features, and by difficulty.

One class at a time, on the host and in float64: a choice depends neither on other classes nor on
devices. Positions are those among the images of the class, in the order of their source.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from prism_jax import environment
from prism_jax.core.clusters import kmeans, nearest_members


class Features(NamedTuple):
    """What is known of the N images of a class.

    Attributes:
      embedding_ND: a teacher's penultimate features.
      log_probability_N: that the teacher gives their class.
      complexity_N: see ``measuring.complexity``.
    """

    embedding_ND: np.ndarray
    log_probability_N: np.ndarray
    complexity_N: np.ndarray


class Choice(NamedTuple):
    """What a row of ``SELECTIONS`` is given: a class, how many are wanted, and a seed."""

    features: Features
    wanted: int
    random_state: int


def herding(choice: Choice) -> np.ndarray:
    """Greedily, the image with which the mean of the chosen comes nearest to that of the class.

    Chen, Welling and Smola (2010); without repetition, the first of equals.
    """
    rows_ND = np.asarray(choice.features.embedding_ND, np.float64)
    mean_D, total_D = rows_ND.mean(0), np.zeros(rows_ND.shape[1])
    chosen: list[int] = []
    for number in range(1, choice.wanted + 1):
        far_N = np.square(mean_D - (total_D + rows_ND) / number).sum(1)
        far_N[chosen] = np.inf
        chosen.append(int(far_N.argmin()))
        total_D += rows_ND[chosen[-1]]
    return np.array(chosen)


def medoids(choice: Choice) -> np.ndarray:
    """The images nearest to the centres of as many clusters, that of the largest first."""
    distances_NI = _clusters(choice, choice.wanted)
    return nearest_members(distances_NI, distances_NI.argmin(1))


def confident(choice: Choice) -> np.ndarray:
    """The images of whose class the teacher is surest, the surest first."""
    return np.argsort(-choice.features.log_probability_N, kind="stable")[: choice.wanted]


def balanced(choice: Choice) -> np.ndarray:
    """Of each cluster the image nearest to its centre, then of each one of its margin.

    In the manner of BPS (CVPR 2026): half of the images are of centres and half of margins, here
    of k-means' clusters, half as many as images. The margin's is the farthest from its centre; of
    all that are left where a cluster has no other. Where the number is odd, the smallest cluster
    has no margin.
    """
    distances_NI = _clusters(choice, -(-choice.wanted // 2))
    owner_N = distances_NI.argmin(1)
    centres = nearest_members(distances_NI, owner_N)
    own_N = distances_NI.min(1)
    chosen = centres.tolist()
    for cluster in range(choice.wanted - len(centres)):
        free_N = np.ones(len(owner_N), bool)
        free_N[chosen] = False
        mine_N = free_N & (owner_N == cluster)
        candidates = np.flatnonzero(mine_N if mine_N.any() else free_N)
        chosen.append(int(candidates[own_N[candidates].argmax()]))
    return np.array(chosen)


def _clusters(choice: Choice, count: int) -> np.ndarray:
    """Distances (N, count) to the centres of clusters, the largest cluster first."""
    rows_ND = choice.features.embedding_ND
    distances_NI = kmeans(rows_ND, count, random_state=choice.random_state)
    sizes_I = np.bincount(distances_NI.argmin(1), minlength=count)
    return distances_NI[:, np.argsort(-sizes_I, kind="stable")]


SELECTIONS: dict[str, Callable[[Choice], np.ndarray]] = {
    "real_herding": herding,
    "real_feature_medoids": medoids,
    "real_confident": confident,
    "real_balanced": balanced,
}


# --- difficulty (PSM) -------------------------------------------------------------------------


def difficulty_groups(difficulty_TN: np.ndarray, count: int) -> list[np.ndarray]:
    """Divide a class into groups of about equal size, from easy to hard.

    Images are ranked by each teacher, and by their mean rank (PSM, equation 4); the first of
    equals is the easier. A class with fewer images than groups gives them again, in turn.

    Args:
      difficulty_TN: of the images of the class in each teacher.

    Returns:
      ``count`` arrays of positions, each from easy to hard.
    """
    ranks_TN = np.argsort(np.argsort(difficulty_TN, 1, kind="stable"), 1, kind="stable")
    order_N = np.argsort(ranks_TN.sum(0), kind="stable")
    groups = np.array_split(order_N, min(count, len(order_N)))
    return [groups[number % len(groups)] for number in range(count)]


GROUPED: dict[str, Callable[[np.ndarray], int]] = {
    "real_group_easiest": lambda group: int(group[0]),
    "real_group_hardest": lambda group: int(group[-1]),
}


# --- retrieval (RETA) -------------------------------------------------------------------------


def retrieve(embedding_BD: np.ndarray, pool: Features, *, simplicity: float) -> np.ndarray:
    """For each image, the one of a class that is near in features and simple.

        argmin_o (1 - w) ||f(x) / |f(x)| - f(o) / |f(o)|||^2 + w c(o)

    RETA (CVPR 2026). Complexities c are brought to [0, 1] within the class.

    Args:
      embedding_BD: features of images of the class of ``pool``.
      simplicity: the weight w in [0, 1].

    Returns:
      (B,) positions; the first of equals.
    """
    with environment.one_thread():
        near_BN = _units(embedding_BD) @ _units(pool.embedding_ND).T
    complexity_N = np.asarray(pool.complexity_N, np.float64)
    span = np.ptp(complexity_N)
    complexity_N = (complexity_N - complexity_N.min()) / (span if span > 0 else 1.0)
    # Of unit vectors ||a - b||^2 = 2 - 2 a.b
    return ((1.0 - simplicity) * (2.0 - 2.0 * near_BN) + simplicity * complexity_N).argmin(1)


def _units(rows_ND: np.ndarray) -> np.ndarray:
    rows_ND = np.asarray(rows_ND, np.float64)
    lengths_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
    return np.divide(rows_ND, lengths_N1, out=np.zeros_like(rows_ND), where=lengths_N1 > 0)
