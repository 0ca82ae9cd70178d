"""A part of Pillow's bilinear enlargement, to its bits, where the whole would not fit anywhere.

A picture of 1 x 30,000 pixels enlarged to 256 rows has two thousand million, of which a square of
224 is wanted. Pillow enlarges along rows and then along columns, with levels rounded in between.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

_BITS = 22  # of the fraction of Pillow's weights for 8-bit levels
_TAPS = 3


def window(
    image: Image.Image,
    convert: Callable[[Image.Image], Image.Image],
    size: tuple[int, int],
    box: tuple[int, int, int, int],
) -> np.ndarray:
    """``convert(image).resize(size, BILINEAR).crop(box)`` for a size above the image's.

    Returns:
      uint8 (H, W, C).
    """
    left, top, right, bottom = box
    first_W, weights_WT = _weights(image.width, size[0], left, right)
    first_H, weights_HT = _weights(image.height, size[1], top, bottom)
    x, y = int(first_W[0]), int(first_H[0])
    end_x = min(image.width, int(first_W[-1]) + _TAPS)
    end_y = min(image.height, int(first_H[-1]) + _TAPS)
    part_HWC = np.asarray(convert(image.crop((x, y, end_x, end_y))))
    part_HWC = part_HWC.reshape(*part_HWC.shape[:2], -1)
    narrow_WHC = _weighted(part_HWC.swapaxes(0, 1), first_W - x, weights_WT)
    return _weighted(narrow_WHC.swapaxes(0, 1), first_H - y, weights_HT)


def _weights(side: int, new_side: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """What each of some output positions is made of along one side.

    Operation by operation as in ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's
    ``Resample.c``, for these positions alone.

    Returns:
      int64 first_N, the first input position; int64 weights_NT of it and those after it, as
      multiples of ``2**-_BITS``.
    """
    centre_N = (np.arange(start, stop) + 0.5) * (side / new_side)
    first_N = np.maximum((centre_N - 0.5).astype(np.int64), 0)
    end_N = np.minimum((centre_N + 1.5).astype(np.int64), side)
    at_NT = first_N[:, None] + np.arange(_TAPS)
    weights_NT = np.maximum(1.0 - np.abs(at_NT - centre_N[:, None] + 0.5), 0.0)
    weights_NT[at_NT >= end_N[:, None]] = 0.0
    sums_N = (weights_NT[:, 0] + weights_NT[:, 1]) + weights_NT[:, 2]
    return first_N, (weights_NT / sums_N[:, None] * (1 << _BITS) + 0.5).astype(np.int64)


def _weighted(pixels_NxC: np.ndarray, first_M: np.ndarray, weights_MT: np.ndarray) -> np.ndarray:
    """Weighted sums along the first axis, rounded to levels."""
    sums = np.full((len(first_M), *pixels_NxC.shape[1:]), 1 << (_BITS - 1), np.int64)
    for tap, weights_M in enumerate(weights_MT.T):
        at_M = np.minimum(first_M + tap, len(pixels_NxC) - 1)  # beyond the end weights are zero
        sums += pixels_NxC[at_M] * weights_M[:, None, None]
    return (sums >> _BITS).astype(np.uint8)
