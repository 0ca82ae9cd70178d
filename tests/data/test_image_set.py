from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from prism_jax.data.image_set import (
    DamagedFile,
    digest,
    image_path,
    read_image,
    read_images,
    write_images,
)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_is_lossless_and_class_major(tmp_path, channels):
    images = random_images(6, 5, 7, channels)
    # Written slot by slot, read class by class.
    classes, slots = [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]
    write_images(tmp_path, images, classes, slots)
    found, labels = read_images(tmp_path, num_classes=3, ipc=2)
    assert found.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(found, images[[0, 3, 1, 4, 2, 5]])
    np.testing.assert_array_equal(labels, [0, 0, 1, 1, 2, 2])
    with Image.open(image_path(tmp_path, 2, 1)) as png:
        assert png.format == "PNG" and png.mode == {1: "L", 3: "RGB"}[channels]


def test_paths_sort_as_text_in_class_and_slot_order(tmp_path):
    paths = [str(image_path(tmp_path, c, s)) for c in (0, 2, 10, 999) for s in (0, 2, 10)]
    assert paths == sorted(paths)
    assert paths[1].endswith("00000/00002.png")


def test_digest_sees_one_pixel_and_the_shape_but_not_the_encoding(tmp_path):
    images = random_images(2, 4, 4, 1)
    write_images(tmp_path, images, [0, 0], [0, 1])
    before = digest(images)
    for slot in range(2):
        buffer = io.BytesIO()
        Image.fromarray(images[slot, ..., 0]).save(buffer, "PNG", compress_level=0)
        assert buffer.getvalue() != image_path(tmp_path, 0, slot).read_bytes()
        image_path(tmp_path, 0, slot).write_bytes(buffer.getvalue())
    assert digest(read_images(tmp_path, 1, 2)[0]) == before
    changed = images.copy()
    changed[1, 3, 3, 0] ^= 1
    assert digest(changed) != before
    assert digest(images.reshape(2, 2, 8, 1)) != before


def test_missing_and_odd_files_are_named(tmp_path):
    write_images(tmp_path, random_images(4, 4, 4, 3), [0, 0, 1, 1], [0, 1, 0, 1])
    path = image_path(tmp_path, 1, 0)
    content = path.read_bytes()

    def refused(problem: str) -> None:
        with pytest.raises(DamagedFile, match=problem) as error:
            read_images(tmp_path, 2, 2)
        assert error.value.path == path and "00001/00000.png" in str(error.value)

    path.unlink()
    refused("missing")
    path.write_bytes(b"")
    refused("damaged")
    path.write_bytes(content[:-20])
    refused("damaged")
    Image.fromarray(random_images(4, 4)).save(path)
    refused("has shape")
    Image.fromarray(random_images(4, 4, 4)).save(path)
    refused("RGBA")


def test_no_single_bit_of_a_png_changes_pixels_unseen(tmp_path):
    image = random_images(1, 3, 3, 1)
    write_images(tmp_path, image, [0], [0])
    path = image_path(tmp_path, 0, 0)
    content = path.read_bytes()

    def decoded_without_checks(data: bytes):
        try:
            with Image.open(io.BytesIO(data)) as png:
                return np.array(png)
        except Exception:
            return None

    slipped, twin_slipped = 0, 0
    for bit in range(8 * len(content)):
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            slipped += not np.array_equal(read_image(path), image[0])
        except DamagedFile:
            pass
        twin = decoded_without_checks(bytes(data))
        twin_slipped += twin is not None and not np.array_equal(twin, image[0, ..., 0])
    assert slipped == 0
    assert twin_slipped > 0  # decoding without verify() does let altered pixels through


def test_every_truncation_of_a_png_is_seen(tmp_path):
    write_images(tmp_path, random_images(1, 6, 6, 3), [0], [0])
    path = image_path(tmp_path, 0, 0)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFile):
            read_image(path)
