"""A set that no table lists: its classes, channels and normalisation are those of its storage."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers.images import encoded

from configs import own_folder
from prism_jax.config import resolve
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import info_of, open_source, own
from prism_jax.errors import UserError

SIZE = 8


def write(root, classes, *, grey=False, count=3):
    """A folder of PNG files, every class of one brightness."""
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.full((SIZE, SIZE, 3), 100 + 10 * label % 100, np.uint8)
                pixels[..., 0] += 0 if grey else 5
                path.write_bytes(encoded(pixels))
    return root


def config(root, **dataset):
    c = own_folder.get_config()
    c.dataset.path = str(root)
    c.recover.ipc = 2
    with c.unlocked(), c.dataset.ignore_type():
        c.dataset.update(dataset)
    return c


@pytest.mark.parametrize("count", [2, 7, 1001])
def test_any_number_of_classes_is_found(tmp_path, count):
    root = write(tmp_path / "set", [f"bird{i:04d}" for i in range(count)], count=1)
    e = resolve(config(root, name="my_birds"))
    assert (e.dataset.num_classes, e.dataset.name) == (count, "my_birds")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is all of its classes, in their order
        source = open_source(
            name="my_birds", source="folder", path=str(root), split="test", image_size=SIZE
        )
    assert source.num_classes == count and source.class_names[-1] == f"bird{count - 1:04d}"


def test_grey_images_are_grey_whatever_they_are_stored_as(tmp_path):
    grey = write(tmp_path / "grey", ["a", "b"], grey=True)
    assert info_of("photos", str(grey)).channels == 1
    assert info_of("photos", str(write(tmp_path / "colour", ["a", "b"]))).channels == 3


def test_a_few_coloured_images_among_grey_ones_are_found(tmp_path, capsys):
    root = write(tmp_path / "scans", ["a", "b"], grey=True, count=60)
    assert info_of("scans", str(root)).channels == 1
    assert "are taken as grey: all 120 looked at are" in capsys.readouterr().out
    looked_at = {divmod(i, 60) for i in own.spread(120, own.LOOKED_AT)}
    label, i = next(x for x in np.ndindex(2, 60) if x not in looked_at)
    write(tmp_path / "one", ["a", "b"], count=i + 1)
    coloured = tmp_path / "one" / "train" / "ab"[label] / f"{i}.png"
    files = sorted((root / "train" / "ab"[label]).iterdir())  # in the order of their names
    files[i].write_bytes(coloured.read_bytes())
    own._found.cache_clear()
    assert info_of("scans", str(root)).channels == 3


def test_the_normalisation_is_that_of_the_training_pixels(tmp_path):
    root = write(tmp_path / "set", ["a", "b"])
    e = resolve(config(root))
    red, other = np.array([105, 115]) / 255, np.array([100, 110]) / 255
    mean = (red.mean(), other.mean(), other.mean())
    assert e.dataset.mean == pytest.approx(mean, abs=5e-5)
    assert e.dataset.std == pytest.approx((5 / 255,) * 3, abs=5e-5)
    stated = resolve(config(root, mean=(0.5,) * 3, std=(0.5,) * 3))
    assert stated.dataset.mean == (0.5,) * 3
    c = config(root)
    c.networks.resnet18.checkpoint = "weights.pth"  # trained with ImageNet's constants
    assert resolve(c).dataset.mean is None
    assert info_of("own", str(root)).normalisation.mean == (0.485, 0.456, 0.406)


def test_damaged_images_do_not_hide_the_others(tmp_path):
    """The set is as without them; where nothing can be read, that is said."""
    root = write(tmp_path / "set", ["a", "b", "c"])
    whole = own.measure_normalisation("photos", str(write(tmp_path / "same", ["a", "b", "c"])))
    for name in ("a", "b", "c"):  # one of the three equal images of each class
        (root / "train" / name / "1.png").write_bytes(b"\x89PNG cut short")
    assert (info_of("photos", str(root)).num_classes, info_of("photos", str(root)).channels) == (
        3,
        3,
    )
    assert own.measure_normalisation("photos", str(root)) == whole
    read = open_source(
        name="photos", source="folder", path=str(root), split="train", image_size=SIZE,
        damaged="skip",
    )  # fmt: skip
    assert len(read) == 6
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"\x89PNG cut short")
    with pytest.raises(DamagedFile, match="2.png"):
        info_of("other_photos", str(root))


def test_an_archive_of_arrays_says_its_classes(tmp_path):
    path = tmp_path / "set.npz"
    images, labels = np.zeros((6, SIZE, SIZE), np.uint8), np.arange(6) % 3
    arrays = {"images": images, "labels": labels}
    np.savez(path, **{f"{s}_{k}": v for s in ("train", "test") for k, v in arrays.items()})
    info = info_of("shapes", str(path))
    assert (info.num_classes, info.channels, info.class_names) == (3, 1, None)


def test_what_is_no_set_is_called_what_it_is(tmp_path):
    root = write(tmp_path / "set", ["a", "b"])
    (tmp_path / "set.zip").write_bytes(b"PK\3\4")
    for path, said in (
        (tmp_path / "nowhere", "there is no .*nowhere; a set of your own is a folder with"),
        (root / "train" / "a" / "0.png", "0.png is a file; a set of your own is a folder with"),
        (tmp_path / "set.zip", "set.zip is a file; a set of your own is"),
    ):
        with pytest.raises(UserError, match=said):
            resolve(config(path))
    with pytest.raises(UserError, match="^dataset.path: ~nobody-at-all/x begins with"):
        resolve(config("~nobody-at-all/x"))


def test_one_class_is_none_to_tell_apart(tmp_path):
    root = write(tmp_path / "set", ["only"])
    with pytest.raises(UserError, match="num_classes is 1, .*a folder too many is around them"):
        resolve(config(root))


def test_pictures_that_use_little_of_their_range_are_warned_of(tmp_path):
    """12 bits in files of 16: 16 grey levels would be left, without a word."""
    bright = np.full((SIZE, SIZE), 4095, np.uint16)
    for scale, factor in (("dark", 1), ("whole", 16)):
        root = write(tmp_path / scale, ["a", "b"])
        for path in root.rglob("*.png"):
            path.write_bytes(encoded(bright * factor))
    with pytest.warns(UserWarning, match="brightest pixel of 6 images at .* is 15 of 255"):
        info_of("scans", str(tmp_path / "dark"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert info_of("scans", str(tmp_path / "whole")).channels == 1


@pytest.mark.parametrize("dataset, said", [
    ({"name": "imagenet1k"}, "did you mean imagenet"),
    ({"name": "cifar-10"}, "did you mean cifar10"),
    ({"name": "my birds"}, "letters, digits"),
    ({"source": "sklearn"}, "is read from folder, tar, npz"),
    ({"path": None}, "say where its images are with --config.dataset.path=DIR"),
])  # fmt: skip
def test_a_slip_is_no_set_of_ones_own(tmp_path, dataset, said):
    root = write(tmp_path / "set", ["a", "b"])
    with pytest.raises(UserError, match=said):
        resolve(config(root, **dataset))


def test_evenly_spread_positions():
    assert own.spread(5, 10) == [0, 1, 2, 3, 4]
    assert own.spread(101, 3) == [0, 50, 100]
