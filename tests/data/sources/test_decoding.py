from __future__ import annotations

import io

import numpy as np
import pytest
from helpers.images import encoded, random_pixels
from PIL import Image

from prism_jax.data.sources import decode


def decoded(data: bytes, channels: int = 3, size: int = 8, ratio: float = 1.0) -> np.ndarray:
    return decode(data, "x.png", channels=channels, image_size=size, resize_ratio=ratio)


def test_an_image_of_the_exact_size_is_untouched():
    pixels = random_pixels(8, 8, 3)
    np.testing.assert_array_equal(decoded(encoded(pixels), ratio=256 / 224), pixels)


@pytest.mark.parametrize("height, width", [(300, 451), (451, 300), (257, 257), (40, 61), (700, 29)])
def test_resize_and_centre_crop_follow_torchvision(height, width):
    pixels = random_pixels(height, width, 3)
    found = decoded(encoded(pixels), size=56, ratio=256 / 224)
    # torchvision: Resize(64) gives the longer side int(64 * long / short); CenterCrop(56)
    # starts at int(round((side - 56) / 2)).
    short = min(height, width)
    sides = [64 if s == short else int(64 * s / short) for s in (height, width)]
    resized = Image.fromarray(pixels).resize(sides[::-1], Image.Resampling.BILINEAR)
    top, left = (int(round((s - 56) / 2.0)) for s in sides)
    np.testing.assert_array_equal(found, np.asarray(resized)[top : top + 56, left : left + 56])
    assert found.shape == (56, 56, 3)


def test_other_kinds_of_image_become_rgb_or_grey():
    colour, grey = random_pixels(8, 8, 3), random_pixels(8, 8)
    palette = Image.fromarray(colour).quantize(16)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(decoded(buffer.getvalue()), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decoded(encoded(grey)), np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([colour, random_pixels(8, 8, seed=1)])
    np.testing.assert_array_equal(decoded(encoded(transparent)), colour)
    luma = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    np.testing.assert_array_equal(decoded(encoded(colour), channels=1), luma)
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(8, 8, 4), "CMYK").save(buffer, "JPEG")
    assert decoded(buffer.getvalue()).shape == (8, 8, 3)
    deep = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    wanted = np.asarray(Image.open(io.BytesIO(encoded(deep))).convert("RGB"))
    np.testing.assert_array_equal(decoded(encoded(deep)), wanted)


def test_exif_orientation_is_not_applied():
    pixels, exif = random_pixels(8, 8, 3), Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees"
    plain, turned = encoded(pixels, "JPEG"), encoded(pixels, "JPEG", exif=exif)
    assert plain != turned
    np.testing.assert_array_equal(decoded(turned), decoded(plain))
