from __future__ import annotations

import numpy as np
import pytest
from helpers.images import encoded, random_pixels
from PIL import Image

from prism_jax.data.sources import decode, decoding, resampling


def shapes(count: int, thin: bool) -> list[tuple[int, int, int]]:
    """Heights and widths, and a size above the smaller of them."""
    draw = np.random.default_rng(int(thin))
    found = []
    for number in range(count):
        short, long = draw.integers(1, 6 if thin else 90), draw.integers(90, 3000 if thin else 120)
        sides = (short, long) if number % 2 else (long, short)
        found.append((*map(int, sides), int(short + draw.integers(1, 60))))
    return found


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_is_pillows_to_the_bit(monkeypatch, channels, thin):
    for number, (height, width, size) in enumerate(shapes(60, thin)):
        pixels = random_pixels(height, width, *([3] if channels == 3 else []), seed=number)
        options = {"channels": channels, "image_size": size, "resize_ratio": 256 / 224}
        with monkeypatch.context() as patch:
            whole = decode(encoded(pixels), "x", **options)
            patch.setattr(decoding, "_LARGE", 0)
            patch.setattr(Image.Image, "resize", None)  # it must not be asked
            part = decode(encoded(pixels), "x", **options)
        np.testing.assert_array_equal(part, whole, err_msg=f"{height} x {width} to {size}")


def test_other_weights_would_be_seen(monkeypatch):
    weights = resampling._weights

    def coarser(*arguments):
        first, fixed = weights(*arguments)
        return first, fixed >> 8 << 8

    image = Image.fromarray(random_pixels(5, 300, 3))
    size, box = (1800, 30), (700, 2, 720, 22)
    whole = np.asarray(image.resize(size, Image.Resampling.BILINEAR).crop(box))
    np.testing.assert_array_equal(resampling.window(image, lambda x: x, size, box), whole)
    monkeypatch.setattr(resampling, "_weights", coarser)
    assert not np.array_equal(resampling.window(image, lambda x: x, size, box), whole)


def test_only_what_is_shown_is_converted():
    seen = []

    def convert(part):
        seen.append(part.size)
        return part.convert("RGB")

    image = Image.fromarray(random_pixels(2, 9000))
    found = resampling.window(image, convert, (900_000, 200), (449_900, 0, 450_100, 200))
    assert found.shape == (200, 200, 3) and seen == [(5, 2)]
