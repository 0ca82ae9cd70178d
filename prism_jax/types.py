"""The records that cross module boundaries, and the legend of shapes.

Shapes live in names: ``images_BHWC`` is an array of shape (B, H, W, C).

====  ==========================================================================
B     images in a batch
H W   height and width of an image in pixels
C     channels (of an image, or of a feature map)
K     classes
T     teachers in the pool, in the order of the config
D     dimensions of an embedding
N     images of a whole set
====  ==========================================================================

Images are NHWC always. ``uint8`` images are pixels in [0, 255]; ``float32`` images are in
the normalised space of their dataset, ``(pixel / 255 - mean) / std`` per channel, unless a
name says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
# What a function of JAX takes from the host too.
AnyArray: TypeAlias = jax.Array | np.ndarray
Integer: TypeAlias = jax.Array | np.integer | int
PyTree: TypeAlias = Any


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels scaled to [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Reading(NamedTuple):
    """What a teacher says about a batch: logits, its BatchNorms' moments, its convolutions' inputs.

    Both trees are nested as the network's modules are, and empty where they were not asked for.
    """

    logits_BK: Array
    statistics: PyTree
    conv_inputs: PyTree


class Draw(NamedTuple):
    """Who supervises what in one iteration. A weight of zero: that teacher is not run for it."""

    logit_weights_T: Array
    statistic_weights_T: Array


class View(NamedTuple):
    """One crop, flip and roll. Scalars for a whole batch, or a leading axis B for one per image.

    Attributes:
      crop: (..., 4) float32 (top, left, height, width) in pixels of the image.
      flip: (...) bool, horizontal.
      roll: (..., 2) int32 (down, right), with wrap-around, after the flip.
    """

    crop: AnyArray
    flip: AnyArray
    roll: AnyArray


class Mix(NamedTuple):
    """CutMix or MixUp of a batch with itself. One for all, or a leading axis B for one per image.

    Attributes:
      partner_B: int32 permutation; image i is mixed with image ``partner_B[i]``.
      box: (..., 4) int32 (top, left, bottom, right) taken from the partner; empty for MixUp.
      weight: (...) float32, the share of image i itself in the result; 1 means untouched.
      blend: (...) float32, MixUp's pixel weight of image i itself; 1 for CutMix.
    """

    partner_B: AnyArray
    box: AnyArray
    weight: AnyArray
    blend: AnyArray


class SynthState(NamedTuple):
    """What is optimised: the images of one batch, Adam's moments, iterations done.

    ``memory`` is what some methods remember of earlier iterations; most remember nothing.
    """

    images_BHWC: Array
    opt_state: PyTree
    step: Integer
    memory: PyTree = ()


class SoftLabels(NamedTuple):
    """One record of the label store: the ensemble's logits for one batch of one epoch.

    The view and the mix are not stored: they are functions of (seed, epoch, batch). Labels that
    somebody else made bring theirs along.

    Attributes:
      epoch, batch: coordinates of the record; ``batch`` counts within its epoch.
      index_B: int32, which images of the labelled set, in store order.
      logits_BK: float32; what a store gives back is rounded and pruned by ``core.codec``.
      shown: (View, Mix), with a leading axis B in each part, of labels from elsewhere; None: drawn.
    """

    epoch: int
    batch: int
    index_B: Any
    logits_BK: Any
    shown: tuple[View, Mix] | None = None


class Unit(NamedTuple):
    """One image batch of recover: ``group`` of slots and ``block`` of classes."""

    group: int
    block: int

    @property
    def name(self) -> str:
        return f"g{self.group:05d}_b{self.block:05d}"
