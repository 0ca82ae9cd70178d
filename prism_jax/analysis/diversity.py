"""How much the images of a class differ from each other, and from the images they began as."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from prism_jax.data.lazy import Images, chunks
from prism_jax.types import Array


def embeddings(
    read_embedding: Callable[[np.ndarray], Array], images_NHWC: Images, batch_size: int
) -> np.ndarray:
    """Read the embeddings of a set in batches of one shape, so that one program reads it all.

    Args:
      read_embedding: images (B, H, W, C) to embeddings (B, D).
      images_NHWC: the set, in whatever form ``read_embedding`` takes.
      batch_size: images per call; the last batch is filled up with its last image.

    Returns:
      float32 (N, D).
    """
    found = []
    for start in range(0, len(images_NHWC), batch_size):
        batch_BHWC = images_NHWC[start : start + batch_size]
        missing = batch_size - len(batch_BHWC)
        full_BHWC = np.concatenate([batch_BHWC, np.repeat(batch_BHWC[-1:], missing, axis=0)])
        found.append(np.asarray(read_embedding(full_BHWC), np.float32)[: len(batch_BHWC)])
    return np.concatenate(found)


class Cosines(NamedTuple):
    """Of the pairs of distinct images of each class: float64 (K,), NaN where a class has no pair.

    PRISM's figure 4 shows both.
    """

    mean_K: np.ndarray
    variance_K: np.ndarray


def class_cosines(embeddings_ND: np.ndarray, labels_N: np.ndarray, classes: int) -> Cosines:
    """Mean and variance of the cosine similarity of two distinct images of a class.

    For unit vectors u_i of a class of n images, over ordered pairs i != j, the mean is
    ``(|sum_i u_i|^2 - n) / (n (n - 1))`` and the mean square ``(|U^T U|_F^2 - n) / (n (n - 1))``.

    Args:
      embeddings_ND: one embedding per image. One of length zero is similar to nothing.
      labels_N: the class of each image.
      classes: K.
    """
    units_ND, labels_N = unit_vectors(embeddings_ND), np.asarray(labels_N)
    mean_K, variance_K = np.full((2, classes), np.nan)
    for label in np.unique(labels_N):
        units_nD = units_ND[labels_N == label]
        n = len(units_nD)
        if n > 1:
            lengths_n = np.square(units_nD).sum(axis=1)
            pairs = np.square(units_nD.sum(axis=0)).sum() - np.square(units_nD).sum()
            squares = np.square(_smaller_product(units_nD)).sum() - np.square(lengths_n).sum()
            mean_K[label] = pairs / (n * (n - 1))
            variance_K[label] = max(0.0, squares / (n * (n - 1)) - mean_K[label] ** 2)
    return Cosines(mean_K, variance_K)


def intra_class_cosine(embeddings_ND: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Mean cosine similarity of two distinct images of one class: low is diverse.

    Classes count alike, whatever their sizes; a class of one image has no pair and is left out.

    Args:
      embeddings_ND, labels_N: see :func:`class_cosines`.

    Returns:
      A number in [-1, 1], or None where no class has two images.
    """
    means_K = class_cosines(embeddings_ND, labels_N, int(np.max(labels_N)) + 1).mean_K
    means = means_K[~np.isnan(means_K)]
    return float(np.clip(np.mean(means), -1.0, 1.0)) if len(means) else None


def vendi(embeddings_ND: np.ndarray) -> float:
    """How many images that have nothing in common would be as diverse: 1 to N.

    The Vendi score (Friedman and Dieng, TMLR 2023) with the cosine as similarity: the exponential
    of the entropy of the eigenvalues of the similarities over N.

    Args:
      embeddings_ND: one embedding per image, none of length zero.
    """
    units_ND = unit_vectors(embeddings_ND)
    values = np.linalg.eigvalsh(_smaller_product(units_ND) / len(units_ND))
    values = values[values > 0]
    return float(np.exp(-(values * np.log(values)).sum()))


def unit_vectors(embeddings_ND: np.ndarray) -> np.ndarray:
    """Embeddings at length one, float64; one of length zero stays."""
    vectors_ND = np.asarray(embeddings_ND, np.float64)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.divide(vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0)


def _smaller_product(units_ND: np.ndarray) -> np.ndarray:
    """U U^T or U^T U, whichever is smaller: their eigenvalues but for zeros, and norms, agree."""
    few = len(units_ND) <= units_ND.shape[1]
    return units_ND @ units_ND.T if few else units_ND.T @ units_ND


def distance(images_a_NHWC: Images, images_b_NHWC: Images) -> float:
    """Root mean square difference of two uint8 image sets' pixels, in units of [0, 1]."""
    assert images_a_NHWC.shape == images_b_NHWC.shape
    assert images_a_NHWC.dtype == images_b_NHWC.dtype == np.uint8
    total = 0.0
    for part in chunks(len(images_a_NHWC)):
        difference = images_a_NHWC[part].astype(np.float64) - images_b_NHWC[part]
        total += np.square(difference / 255).sum()
    return float(np.sqrt(total / np.prod(images_a_NHWC.shape)))
