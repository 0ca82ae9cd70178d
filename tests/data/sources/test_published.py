"""The published files themselves, where a machine has them: PRISM_JAX_SHARED_DATA."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers.published import data_file

from prism_jax.data.sources import open_source, read_all


def opened(name, source, path, split, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_source(name=name, source=source, path=path, split=split, image_size=size)


def test_mnist():
    folder = data_file("mnist")
    train, test = (opened("mnist", "idx", folder, split, 28) for split in ("train", "test"))
    assert (len(train), len(test)) == (60000, 10000)
    pixels = train._images / np.float32(255)
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [0.1307, 0.3081], atol=1e-4)
    assert train.labels_N[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_encoded_cifar_shows_the_images_and_labels_of_the_arrays():
    lossless = data_file("cifar10/cifar10_lossless_subset.npz")
    encoded = opened("cifar10", "npz", data_file("cifar10/cifar10_jpeg_full.npz"), "test", 32)
    some = opened("cifar10", "npz", lossless, "test", 32)
    at = np.load(lossless)["test_official_index"]
    assert len(encoded) == 10000
    np.testing.assert_array_equal(encoded.labels_N[at], some.labels_N)

    def distance(shift: int) -> float:  # root of the mean square, in levels
        pairs = [(encoded.image((at[i] + shift) % 10000), some.image(i)) for i in range(50)]
        return np.sqrt(np.mean([(a.astype(float) - b) ** 2 for a, b in pairs]))

    assert distance(0) < 12 < 40 < distance(1)


@pytest.mark.parametrize("file, counts, size", [
    ("imagenette/imagenette224_sub.tar", (2000, 1000), 224),
    ("imagenette/imagenette128_{split}.tar", (9469, 3925), 128),
])  # fmt: skip
def test_imagenette(file, counts, size):
    path = data_file(file.split("/")[0]) / file.split("/")[1]
    train, test = (opened("imagenette", "tar", path, split, size) for split in ("train", "test"))
    assert (len(train), len(test)) == counts
    assert train.imagenet_indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    images, labels = read_all(opened("imagenette", "tar", path, "test", 32))
    assert images.shape == (counts[1], 32, 32, 3) and len(set(labels)) == 10
