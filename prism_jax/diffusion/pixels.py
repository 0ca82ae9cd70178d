"""Pixels on disk and images in [-1, 1], which codecs read and write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from prism_jax.errors import UserError

RESAMPLERS = {
    "bicubic": Image.Resampling.BICUBIC,  # PIL's default, and D4M's
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}


def from_uint8(images_uint8: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1]."""
    return np.asarray(images_uint8, np.float32) / 127.5 - 1.0


def to_uint8(images_BHWC: np.ndarray, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """The nearest levels.

    Args:
      places: each image's class and slot, for the message.

    Raises:
      UserError: an image that is not finite.
    """
    images_BHWC = np.asarray(images_BHWC, np.float32)
    broken = np.flatnonzero(~np.isfinite(images_BHWC).all((1, 2, 3)))
    if len(broken):
        cls, slot = places[int(broken[0])]
        raise UserError(
            f"{len(broken)} of {len(images_BHWC)} generated images are not finite, first slot "
            f"{slot} of class {cls}: the weights are damaged, or the networks overflow in their "
            f"dtype; load the weights anew, or use float32"
        )
    return np.round(np.clip(images_BHWC / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def resize(images_uint8_BHWC: np.ndarray, size: int, resampler: str) -> np.ndarray:
    """Images of another side by PIL, a row of ``RESAMPLERS``; as they are if it is theirs."""
    if images_uint8_BHWC.shape[1:3] == (size, size):
        return images_uint8_BHWC
    grey = images_uint8_BHWC.shape[-1] == 1
    resized = [
        np.array(
            Image.fromarray(image[..., 0] if grey else image).resize(
                (size, size), RESAMPLERS[resampler]
            )
        )
        for image in images_uint8_BHWC
    ]
    return np.stack(resized).reshape(-1, size, size, images_uint8_BHWC.shape[-1])
