"""Pixels of more than 8 bits: scaled where their type has a range, refused where it has none.

Pillow itself clips them, so that most of such an image comes out white.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

_TIFF_BITS, _TIFF_WHITE = 258, 262  # tags: BitsPerSample, PhotometricInterpretation

# Where integers of Pillow's modes "I;16" and "I" span 16 bits from zero. TIFF states its bits.
_SIXTEEN = {"I;16": ("PNG", "ICO", "ICNS", "JPEG2000", "TIFF"), "I": ("PNG", "PPM")}


class NoRange(ValueError):
    """Nothing says which values are black and white; the text goes on after the image's name."""


def to_bytes(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes 8 bits of any part of an image; of 8 bits already, the part itself.

    Integers keep their upper 8 bits, as those of 16-bit colour do in Pillow; floats are taken
    from [0, 1] to the nearest level.

    Raises:
      NoRange: integers of other than 12 or 16 bits; the result raises it for other floats.
    """
    if image.mode == "F":
        return _from_floats
    if image.mode.partition(";")[0] != "I":
        return lambda part: part
    if image.format not in _SIXTEEN[image.mode[:4]]:
        raise NoRange(
            f"has integer pixels ({image.format}, mode {image.mode}) without a range that says "
            f"what is black and white"
        )
    tags = getattr(image, "tag_v2", {})
    shift = tags.get(_TIFF_BITS, (16,))[0] - 8
    white_is_zero = tags.get(_TIFF_WHITE) == 0

    def from_integers(part: Image.Image) -> Image.Image:
        pixels_HW = (np.asarray(part) >> shift).astype(np.uint8)
        return Image.fromarray(~pixels_HW if white_is_zero else pixels_HW)

    return from_integers


def _from_floats(part: Image.Image) -> Image.Image:
    pixels_HW = np.asarray(part)
    least, most = pixels_HW.min(), pixels_HW.max()
    if not (least >= 0 and most <= 1):  # nor if one is no number
        raise NoRange(f"has floating-point pixels from {least:g} to {most:g}; only [0, 1] is known")
    return Image.fromarray(np.rint(pixels_HW * np.float32(255)).astype(np.uint8))
