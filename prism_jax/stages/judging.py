"""What a squeezed teacher says of whole images: generated ones, or an imported set's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from prism_jax.core import pixels
from prism_jax.data.lazy import Images, chunks
from prism_jax.stages.context import Context
from prism_jax.types import Array, PyTree

BATCH = 100


def logits_of(context: Context, name: str, images_uint8_NHWC: Images) -> np.ndarray:
    """(N, classes) float32 of the teacher ``name``; batches are padded to one size."""
    read = context.once(f"judge:{name}", lambda: _reader(context, name))
    found, count = [], len(images_uint8_NHWC)
    for part in chunks(count, BATCH):
        rows = images_uint8_NHWC[part]
        padded = rows[np.arange(BATCH).clip(max=len(rows) - 1)]
        found.append(np.asarray(read(padded))[: len(rows)])
    return np.concatenate(found)


def _reader(context: Context, name: str) -> Callable[[np.ndarray], Array]:
    """The teacher, loaded and compiled once in a run."""
    pool, normalisation = context.networks.pool([name]), context.inputs.normalisation
    teacher, variables = pool.teachers[0], jax.device_put(pool.variables[0])

    @jax.jit
    def read(variables: PyTree, images_uint8_BHWC: Array) -> Array:
        images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
        return teacher.read(variables, images_BHWC, normalisation, statistics=False).logits_BK

    return lambda images_uint8_BHWC: read(variables, images_uint8_BHWC)
