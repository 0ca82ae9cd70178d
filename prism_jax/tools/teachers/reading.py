"""A network's outputs for the images of a source."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import numpy as np

from prism_jax import progress
from prism_jax.core import pixels
from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.sources import ImageSource
from prism_jax.tools.teachers.network import Weights
from prism_jax.types import Normalisation, PyTree

THREADS = 8


@functools.partial(jax.jit, static_argnums=0)
def _forward(module: nn.Module, variables: PyTree, images_uint8_BHWC, mean_C, std_C):
    return module.apply(
        variables, pixels.normalise(images_uint8_BHWC, Normalisation(mean_C, std_C))
    )


def read_logits(
    weights: Weights,
    source: ImageSource,
    at_N: np.ndarray,
    normalisation: Normalisation,
    *,
    title: str,
    batch_size: int = 64,
) -> np.ndarray:
    """Run a network over images of a source, in evaluation mode, decoding one batch ahead.

    Args:
      at_N: positions of the images.
      normalisation: of the pixels; an argument of the program, so that all share one.
      title: of the progress bar.

    Returns:
      float32 logits (N, H) of the whole head.
    """
    constants = [np.asarray(c, np.float32) for c in (normalisation.mean, normalisation.std)]
    batch_size = min(batch_size, len(at_N))
    parts = []
    with progress.task(title, len(at_N), unit="image") as bar:
        for images_BHWC, count in _batches(source, at_N, batch_size):
            logits = _forward(weights.module, weights.variables, images_BHWC, *constants)
            parts.append(np.asarray(logits, np.float32)[:count])
            bar.advance(count)
    return np.concatenate(parts)


def _batches(source: ImageSource, at_N: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size (the last is filled up) and how many images of each count."""
    with ThreadPoolExecutor(THREADS) as pool:

        def fetch(start: int):
            return [pool.submit(source.image, int(i)) for i in np.resize(at_N[start:], size)]

        waiting = fetch(0)
        for start in range(0, len(at_N), size):
            images = np.stack([image.result() for image in waiting])
            if start + size < len(at_N):
                waiting = fetch(start + size)
            yield images, min(size, len(at_N) - start)


def class_names(source: ImageSource, info: DatasetInfo) -> Sequence[str] | None:
    """The names of the labels: the storage's, or else the data set's; None: not known."""
    if source.class_names is not None:
        return source.class_names
    return info.class_names if source.num_classes == info.num_classes else None


def usual_normalisations(info: DatasetInfo) -> dict[str, Normalisation]:
    """The normalisations that networks for this data set are commonly trained with."""
    c = info.channels
    usual = {
        f"{info.name}'s own mean and std": info.normalisation,
        "ImageNet's mean and std": pixels.IMAGENET,
        "pixels in [-1, 1]": Normalisation((0.5,) * c, (0.5,) * c),
        "pixels in [0, 1]": Normalisation((0.0,) * c, (1.0,) * c),
        "pixels in [0, 255]": Normalisation((0.0,) * c, (1 / 255,) * c),
    }
    return {name: n for name, n in usual.items() if len(n.mean) == c}
