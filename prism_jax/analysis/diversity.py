"""How much the images of a class differ from each other, and from the images they began as."""

from __future__ import annotations

from collections.abc import Callable

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


def intra_class_cosine(embeddings_ND: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Mean cosine similarity of two distinct images of one class: low is diverse.

    For unit vectors u_i of a class of n images, the mean over ordered pairs i != j is
    ``(|sum_i u_i|^2 - n) / (n (n - 1))``. Classes count alike, whatever their sizes; a class of
    one image has no pair and is left out.

    Args:
      embeddings_ND: one embedding per image. One of length zero is similar to nothing.
      labels_N: the class of each image.

    Returns:
      A number in [-1, 1], or None where no class has two images.
    """
    vectors_ND = np.asarray(embeddings_ND, np.float64)
    lengths_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    units_ND = np.divide(
        vectors_ND, lengths_N1, out=np.zeros_like(vectors_ND), where=lengths_N1 > 0
    )
    labels_N = np.asarray(labels_N)
    means = []
    for label in np.unique(labels_N):
        units_nD = units_ND[labels_N == label]
        n = len(units_nD)
        if n > 1:
            pairs = np.square(units_nD.sum(axis=0)).sum() - np.square(units_nD).sum()
            means.append(pairs / (n * (n - 1)))
    return float(np.clip(np.mean(means), -1.0, 1.0)) if means else None


def distance(images_a_NHWC: Images, images_b_NHWC: Images) -> float:
    """Root mean square difference of two uint8 image sets' pixels, in units of [0, 1]."""
    assert images_a_NHWC.shape == images_b_NHWC.shape
    assert images_a_NHWC.dtype == images_b_NHWC.dtype == np.uint8
    total = 0.0
    for part in chunks(len(images_a_NHWC)):
        difference = images_a_NHWC[part].astype(np.float64) - images_b_NHWC[part]
        total += np.square(difference / 255).sum()
    return float(np.sqrt(total / np.prod(images_a_NHWC.shape)))
