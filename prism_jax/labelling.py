"""Soft labels: the logits of an ensemble of teachers over augmented views of a set."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax import parallel, rng
from prism_jax.core.augment import Augment, augment
from prism_jax.core.ensemble import ENSEMBLES
from prism_jax.data.pipeline import epoch_order, num_batches
from prism_jax.teachers import TeacherPool
from prism_jax.types import SoftLabels

VIEWS = "relabel/view"
ORDER = "relabel/order"


@dataclasses.dataclass(frozen=True)
class LabelRecipe:
    """What decides the bits of the labels, beside the images and the teachers."""

    augment: Augment
    ensemble: str = "single"
    batch_size: int = 50
    precision: str = "float16"


class Labeller:
    """Labels whole batches, one per device at a time; a batch is never split.

    On part of a batch a dense layer gives other bits, so the batch is the unit of identity:
    any number of devices gives the same labels.
    """

    def __init__(
        self,
        pool: TeacherPool,
        recipe: LabelRecipe,
        *,
        devices: Sequence[jax.Device] | None = None,
        how: str = "shard_map",
    ):
        self.recipe = recipe

        def label(variables, seed, epoch, batch, images_uint8_BHWC):
            key = rng.stream(rng.root(seed), VIEWS, epoch, batch)
            images_BHWC, _ = augment(key, images_uint8_BHWC, recipe.augment, pool.normalisation)
            logits = [
                teacher.read(weights, images_BHWC, pool.normalisation, statistics=False).logits_BK
                for teacher, weights in zip(pool.teachers, variables, strict=True)
            ]
            return ENSEMBLES[recipe.ensemble](jnp.stack(logits)).astype(recipe.precision)

        devices = devices or jax.local_devices()[:1]
        self._map = parallel.LaneMap(label, pool.variables, arity=3, devices=devices, how=how)

    def epoch(
        self, images_uint8_NHWC: np.ndarray, epoch: int, *, seed: int
    ) -> Iterator[SoftLabels]:
        """Label one epoch: every image once, in the order of the stream "relabel/order".

        Yields:
          One record per batch, in order; the last one is ragged where the size does not divide.
        """
        count, size = len(images_uint8_NHWC), self.recipe.batch_size
        order = epoch_order(seed, ORDER, epoch, count)
        indices = [order[b * size : (b + 1) * size] for b in range(num_batches(count, size))]
        width = len(self._map)
        for first in range(0, len(indices), width):
            yield from self._label(
                images_uint8_NHWC, epoch, first, indices[first : first + width], seed
            )

    def _label(self, images, epoch, first, indices, seed) -> Iterator[SoftLabels]:
        """Label up to one batch per device; idle lanes repeat the first batch of the same shape."""
        for size in dict.fromkeys(len(index) for index in indices):
            mine = [(first + i, index) for i, index in enumerate(indices) if len(index) == size]
            padded = (
                (mine * len(self._map))[: len(self._map)] if len(mine) < len(self._map) else mine
            )
            lanes = [
                tuple(
                    self._map.place(value, lane)
                    for value in (np.int32(epoch), np.int32(batch), images[index])
                )
                for lane, (batch, index) in enumerate(padded)
            ]
            for (batch, index), logits in zip(mine, self._map(seed, lanes), strict=False):
                yield SoftLabels(epoch, batch, index.astype(np.int32), self._map.fetch(logits))


def relabel(
    pool: TeacherPool,
    images_uint8_NHWC: np.ndarray,
    *,
    epochs: int = 300,
    ensemble: str = "single",
    batch_size: int = 50,
    crop_min: float = 0.25,
    flip: bool = True,
    mix: str = "cutmix",
    seed: int = 0,
) -> list[SoftLabels]:
    """Label a set in memory.

    Args:
      pool: the label teachers, alone or combined by ``ensemble``.
      images_uint8_NHWC: the set; its order is what the records' indices mean.
      epochs: how many times every image is labelled, each time over another view.

    Returns:
      One record per batch and epoch. A student replays the views from the same ``seed``,
      ``crop_min``, ``flip`` and ``mix``.
    """
    labeller = Labeller(pool, LabelRecipe(Augment(crop_min, flip, mix), ensemble, batch_size))
    images = np.asarray(images_uint8_NHWC)
    return [r for epoch in range(epochs) for r in labeller.epoch(images, epoch, seed=seed)]
