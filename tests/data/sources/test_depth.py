"""Images of more than 8 bits."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from helpers.images import encoded
from PIL import Image

from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import decode

DEEP = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
UPPER = (DEEP >> 8).astype(np.uint8)  # the upper 8 of 16 bits


def decoded(data: bytes, channels: int = 1, size: int = 8) -> np.ndarray:
    return decode(data, "x.tif", channels=channels, image_size=size, resize_ratio=1.0)


def rows_png(rows: list[bytes], width: int, colour_type: int) -> bytes:
    """A 16-bit PNG by hand; colour types 0: grey, 2: RGB, 4: grey and alpha."""
    header = struct.pack(">IIBBBBB", width, len(rows), 16, colour_type, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row for row in rows))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + crc
    return data


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_keeps_its_upper_bits(kind, channels):
    data = encoded(DEEP, kind)
    found = decoded(data, channels)
    np.testing.assert_array_equal(found, np.repeat(UPPER[..., None], channels, axis=2))
    # What Pillow makes of it is white.
    clipped = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
    assert clipped.mean() > 250 > 200 > found.mean()


def test_big_endian_tiff_is_read_alike():
    np.testing.assert_array_equal(decoded(encoded(DEEP.astype(">u2"), "TIFF"))[..., 0], UPPER)


def test_grey_and_colour_of_16_bits_agree():
    grey = [row.astype(">u2").tobytes() for row in DEEP]
    colour = [np.repeat(row[:, None], 3, axis=1).astype(">u2").tobytes() for row in DEEP]
    opaque = [np.stack([row, row | 0xFFFF], axis=1).astype(">u2").tobytes() for row in DEEP]
    assert Image.open(io.BytesIO(rows_png(colour, 8, 2))).mode == "RGB"
    for rows, kind in ((grey, 0), (colour, 2), (opaque, 4)):
        found = decoded(rows_png(rows, 8, kind), channels=3)
        np.testing.assert_array_equal(found, np.repeat(UPPER[..., None], 3, axis=2))


def retagged(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another short under a tag."""
    at = data.index(struct.pack("<HHI", tag, 3, 1)) + 8
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


def test_tiff_whose_zero_is_white_is_turned_over():
    data = retagged(encoded(DEEP, "TIFF"), 262, 0)
    np.testing.assert_array_equal(decoded(data)[..., 0], 255 - UPPER)
    # As Pillow does with 8 bits.
    plain = retagged(encoded(UPPER, "TIFF"), 262, 0)
    np.testing.assert_array_equal(decoded(plain)[..., 0], 255 - UPPER)


def test_12_bit_tiff_spans_12_bits():
    values = np.array([[0, 0xFFF, 0x800, 0x123]], np.uint16)
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x01, 0x23])
    # The 16-bit file of the same sides, its strip replaced by one of 12 bits.
    data = encoded(np.full_like(values, 0x5A5A), "TIFF")
    data = data.replace(b"\x5a" * 8, packed + b"\0\0")
    found = decode(retagged(data, 258, 12), "x", channels=1, image_size=None, resize_ratio=1.0)
    np.testing.assert_array_equal(found[..., 0], values >> 4)


def test_the_mean_of_a_resized_deep_image_is_kept():
    pixels = decode(encoded(DEEP), "x", channels=3, image_size=4, resize_ratio=1.0)
    assert abs(pixels.mean() - UPPER.mean()) < 8


def test_floats_in_the_unit_interval_are_scaled():
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    floats = levels.astype(np.float32) / 255
    np.testing.assert_array_equal(decoded(encoded(floats, "TIFF"))[..., 0], levels)
    ends = np.array([[0.0, 1.0]], np.float32)
    found = decode(encoded(ends, "TIFF"), "x", channels=1, image_size=None, resize_ratio=1.0)
    assert found[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize("off", [1.001, -0.001, 255.0, np.nan, np.inf])
def test_other_floats_are_refused_by_name(off):
    floats = np.full((8, 8), 0.5, np.float32)
    floats[3, 4] = off
    with pytest.raises(DamagedFile, match=r"x.tif has floating-point pixels from .*damaged=skip"):
        decoded(encoded(floats, "TIFF"))


def test_integers_without_a_range_are_refused_by_name():
    with pytest.raises(DamagedFile, match=r"x.tif has integer pixels \(TIFF, mode I\)"):
        decoded(encoded(DEEP.astype(np.int32), "TIFF"))
