"""Folders of images that somebody else made."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from PIL import Image

from prism_jax.data.datasets import DATASETS
from prism_jax.data.exchange import ImageSet
from prism_jax.data.sources import ArraySource, read_all
from prism_jax.errors import UserError


def write_set(root, classes, per_class, *, size=8, name="{c}_{i}.png", seed=0):
    """Random images, their pixels by (class folder, place)."""
    random = np.random.default_rng(seed)
    pixels = {}
    for c, folder in enumerate(classes):
        (root / folder).mkdir(parents=True)
        for i in range(per_class):
            pixels[folder, i] = random.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels[folder, i]).save(root / folder / name.format(c=c, i=i))
    return pixels


def open_set(root, *, num_classes=3, ipc=2, image_size=8, name="imagenet", **known):
    labels = np.arange(num_classes)
    shape = num_classes, 8, 8, DATASETS[name].channels
    real = ArraySource(np.zeros(shape, np.uint8), labels, num_classes=num_classes)
    for attribute, value in known.items():
        setattr(real, attribute, value)
    return ImageSet(root, DATASETS[name], real, ipc=ipc, image_size=image_size)


@pytest.mark.parametrize(
    ("classes", "name"),
    [
        (("new000", "new001", "new002"), "class{c:03d}_id{i:03d}.png"),
        (("n01440764", "n01443537", "n01484850"), "{i}.png"),
        (("00000", "00001", "00002"), "{i:05d}.png"),
    ],
)
def test_published_names_are_read_in_their_order(tmp_path, classes, name):
    pixels = write_set(tmp_path, classes, 2, name=name)
    (tmp_path / "classes.json").write_text("{}")  # beside the folders: ignored
    (tmp_path / classes[0] / ".hidden.png").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_set(tmp_path)
        images, labels = read_all(found)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and labels.dtype == np.int32
    assert found.num_classes == 3 and len(found) == 6
    for at, image in enumerate(images):
        np.testing.assert_array_equal(image, pixels[classes[at // 2], at % 2])


def test_numbers_without_zeros_are_taken_as_numbers_with_a_warning(tmp_path):
    pixels = write_set(tmp_path, [str(c) for c in range(11)], 1)
    with pytest.warns(UserWarning, match=r"numeric order \(0, 1, 2, ...\).*text \(0, 1, 10, ...\)"):
        found = open_set(tmp_path, num_classes=11, ipc=1)
    np.testing.assert_array_equal(found.image(2), pixels["2", 0])
    assert not np.array_equal(found.image(2), pixels["10", 0])  # ImageFolder's class 2


@pytest.mark.parametrize(
    ("folders", "known"),
    [
        (("n01440764", "n01443537", "n01484850"), {"imagenet_indices": (2, 0, 1)}),
        (("cat", "dog", "bird"), {"class_names": ("bird", "cat", "dog")}),
        (("10", "2", "0"), {"class_names": ("0", "10", "2")}),
    ],
)
def test_named_folders_get_the_labels_of_the_real_images(tmp_path, folders, known):
    pixels = write_set(tmp_path, folders, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_set(tmp_path, **known)
    for label in range(3):  # the last folder is the first class
        np.testing.assert_array_equal(found.image(2 * label), pixels[folders[label - 1], 0])


def test_a_set_of_other_classes_of_imagenet_is_refused(tmp_path):
    write_set(tmp_path, ("n01440764", "n01443537", "n01484850"), 2)
    with pytest.raises(UserError, match=r"has 1 class folders of other classes .*\(n01484850\)"):
        open_set(tmp_path, imagenet_indices=(0, 1, 217))


def test_the_first_ipc_images_are_taken_and_the_rest_is_said(tmp_path):
    pixels = write_set(tmp_path, ("a", "b", "c"), 3)
    with pytest.warns(UserWarning, match="up to 3 images of a class; the first 2"):
        found = open_set(tmp_path)
    np.testing.assert_array_equal(found.image(3), pixels["b", 1])
    assert len(found) == 6


def test_another_number_is_refused_with_both_numbers(tmp_path):
    write_set(tmp_path, ("a", "b", "c"), 2)
    with pytest.raises(UserError, match=r"has 3 class folders, but dataset.num_classes is 4"):
        open_set(tmp_path, num_classes=4)
    (tmp_path / "b" / "1_1.png").unlink()
    with pytest.raises(UserError, match=r"recover.ipc=2 needs 2 .* 1 of the 3 .*\(b has 1\).* 1$"):
        open_set(tmp_path)
    with pytest.raises(UserError, match="there is no folder .*nowhere"):
        open_set(tmp_path / "nowhere")


def test_other_sizes_are_resized_as_a_whole_and_that_is_said_once(tmp_path):
    """The whole image, where a real one would lose its border (Resize 256 / CenterCrop 224)."""
    write_set(tmp_path, ("a", "b", "c"), 2, size=14)
    found = open_set(tmp_path, image_size=7)
    with pytest.warns(UserWarning, match=r"14 x 14 pixels.* dataset.image_size=7, is resized") as w:
        images, _ = read_all(found, threads=1)
    assert len(w) == 1 and images.shape == (6, 7, 7, 3)
    stored = Image.open(tmp_path / "a" / "0_0.png")
    np.testing.assert_array_equal(
        images[0], np.array(stored.resize((7, 7), Image.Resampling.BILINEAR))
    )


def test_a_damaged_image_is_named(tmp_path):
    write_set(tmp_path, ("a", "b", "c"), 2)
    path = tmp_path / "b" / "1_1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=rf"{path} is not a readable image .*whole copy of the set"):
        open_set(tmp_path).image(3)


def test_what_it_is_follows_names_sizes_and_count(tmp_path):
    write_set(tmp_path / "one", ("a", "b", "c"), 2)
    write_set(tmp_path / "moved", ("a", "b", "c"), 2)
    assert open_set(tmp_path / "one").describe() == open_set(tmp_path / "moved").describe()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "moved" / "c" / "2_1.png")
    assert open_set(tmp_path / "one").describe() != open_set(tmp_path / "moved").describe()


def test_grey_sets_are_read_grey(tmp_path):
    (tmp_path / "0").mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "0" / "0.png")
    found = open_set(tmp_path, num_classes=1, ipc=1, name="digits")
    np.testing.assert_array_equal(found.image(0), grey[..., None])
