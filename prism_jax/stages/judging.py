"""What a squeezed teacher says of images that a generator made."""

from __future__ import annotations

import jax
import numpy as np

from prism_jax.core import pixels
from prism_jax.stages.context import Context
from prism_jax.types import Array, PyTree

BATCH = 100


def logits_of(context: Context, images_uint8_NHWC: np.ndarray) -> np.ndarray:
    """(N, classes) float32 of ``Experiment.judge``; batches are padded to one size."""
    pool = context.networks.pool([context.config.judge])
    teacher, normalisation = pool.teachers[0], context.inputs.normalisation

    @jax.jit
    def read(variables: PyTree, images_uint8_BHWC: Array) -> Array:
        images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
        return teacher.read(variables, images_BHWC, normalisation, statistics=False)[0]

    found, count = [], len(images_uint8_NHWC)
    for at in range(0, count, BATCH):
        index = np.arange(at, at + BATCH).clip(max=count - 1)
        found.append(np.asarray(read(pool.variables[0], images_uint8_NHWC[index])))
    return np.concatenate(found)[:count]
