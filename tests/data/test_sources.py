from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from prism_jax.data import sources
from prism_jax.data.datasets import DATASETS
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources import ArraySource, class_order, decode, open_source, read_all
from prism_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*classes of imagenet:UserWarning")


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def open_imagenet(path, source="folder", split="train", size=8):
    return open_source(name="imagenet", source=source, path=path, split=split, image_size=size)


# --- digits ---


def digits(split: str, size: int = 16):
    return open_source(name="digits", source="sklearn", path=None, split=split, image_size=size)


def test_digits_split_is_fixed_stratified_and_disjoint():
    train, test = digits("train", 8), digits("test", 8)
    assert (len(train), len(test)) == (1437, 360)
    counts = np.bincount(train.labels_N), np.bincount(test.labels_N)
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 360 / 1797, atol=0.005)
    from sklearn.datasets import load_digits

    everything = load_digits()
    pixels = np.concatenate([read_all(train)[0], read_all(test)[0]])[..., 0]
    assert sorted(p.tobytes() for p in np.round(everything.images * 255 / 16).astype(np.uint8)) == (
        sorted(p.tobytes() for p in pixels)
    )
    # Pinned: another split of the same sizes is another data set.
    assert hashlib.sha256(test.labels_N.tobytes()).hexdigest()[:16] == "c8a9cf10e14a8679"
    assert test.labels_N.dtype == np.int32


def test_digits_are_resized_bilinearly():
    small, large = digits("test", 8), digits("test", 16)
    wanted = Image.fromarray(small.image(5)[..., 0]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(large.image(5)[..., 0], np.asarray(wanted))
    assert large.image(5).shape == (16, 16, 1) and large.image(5).dtype == np.uint8
    assert read_all(small)[0].max() == 255
    assert small.describe() != large.describe()


# --- arrays, npz, idx ---


def test_array_source_identity_sees_pixels_labels_and_order():
    images, labels = random_pixels(6, 4, 4, 3), np.array([0, 1, 2, 0, 1, 2])
    base = ArraySource(images, labels, num_classes=3).describe()
    json.dumps(base)
    assert base == ArraySource(images.copy(), labels.astype(np.uint8), num_classes=3).describe()
    altered = images.copy()
    altered[5, 3, 3, 2] ^= 1
    others = [
        ArraySource(altered, labels, num_classes=3),
        ArraySource(images, labels[::-1], num_classes=3),
        ArraySource(images[::-1], labels[::-1], num_classes=3),
        ArraySource(images, labels, num_classes=3, image_size=8),
        ArraySource(images, labels, num_classes=3, split="test"),
    ]
    assert all(other.describe() != base for other in others)


@pytest.mark.parametrize(
    "images, labels, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "float32"),
        (np.zeros((2, 4, 4, 2), np.uint8), [0, 1], "1 or 3"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 1], "shape \\(3,\\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.0], "float64"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 3], "in \\[0, 2\\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), [-1, 1], "in \\[0, 2\\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), np.zeros(0, int), "no image"),
    ],
)
def test_array_source_refuses_what_is_no_image_set(images, labels, message):
    with pytest.raises(UserError, match=message):
        ArraySource(images, np.asarray(labels), num_classes=3)


def test_npz(tmp_path):
    path = tmp_path / "set.npz"
    arrays = {
        "train_images": random_pixels(5, 32, 32, 3),
        "train_labels": np.arange(5, dtype=np.uint8),
        "test_images": random_pixels(3, 32, 32, 3, seed=1),
        "test_labels": np.arange(3, dtype=np.uint8),
    }
    np.savez(path, **arrays)
    options = {"name": "cifar10", "source": "npz", "path": path, "image_size": 32}
    for split in ("train", "test"):
        images, labels = read_all(open_source(split=split, **options))
        np.testing.assert_array_equal(images, arrays[f"{split}_images"])
        np.testing.assert_array_equal(labels, arrays[f"{split}_labels"])
    with pytest.raises(UserError, match="3 channels, mnist has 1"):
        open_source(split="test", **options | {"name": "mnist"})
    np.savez(path, **{k: v for k, v in arrays.items() if k != "test_labels"})
    with pytest.raises(UserError, match="test_labels.*is not a file in the archive"):
        open_source(split="test", **options)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(split="train", **options)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx(tmp_path, suffix):
    images, labels = random_pixels(4, 28, 28), np.array([3, 1, 4, 1], np.uint8)
    files = {
        "t10k-images-idx3-ubyte": b"\0\0\x08\x03" + np.array([4, 28, 28], ">u4").tobytes()
        + images.tobytes(),
        "t10k-labels-idx1-ubyte": b"\0\0\x08\x01" + np.array([4], ">u4").tobytes()
        + labels.tobytes(),
    }  # fmt: skip
    for name, data in files.items():
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if suffix else data)

    def read():
        return read_all(
            open_source(name="mnist", source="idx", path=tmp_path, split="test", image_size=28)
        )

    np.testing.assert_array_equal(read()[0][..., 0], images)
    np.testing.assert_array_equal(read()[1], labels)
    path = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    content = path.read_bytes()
    for keep in (0, 3, 8, 100):
        path.write_bytes(content[:keep])
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte.* is damaged"):
            read()
    path.unlink()
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        read()


# --- decoding ---


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


# --- folders and tar files ---


def write_tree(root, splits=("train", "val"), classes=("n01", "n02"), suffix=".png"):
    for number, (split, cls, i) in enumerate(
        (s, c, i) for s in splits for c in classes for i in range(3)
    ):
        path = root / split / cls / f"img_{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random_pixels(8, 8, 3, seed=number)))
    return root


def write_tar(folder, path):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname="set")
    return path


def test_folder_and_tar_hold_the_same_images_in_image_folder_order(tmp_path):
    root = write_tree(tmp_path / "tree")
    # What ImageFolder walks into, and what it leaves alone.
    (root / "train" / "n01" / "deep").mkdir()
    (root / "train" / "n01" / "deep" / "a.PNG").write_bytes(
        encoded(random_pixels(8, 8, 3, seed=99))
    )
    (root / "train" / "n01" / "notes.txt").write_text("no image")
    (root / "train" / "n01" / "._img_0.png").write_text("no image either")
    (root / "train" / "README.md").write_text("no class")
    tar = write_tar(root, tmp_path / "tree.tar")
    wanted = [random_pixels(8, 8, 3, seed=s) for s in (0, 1, 2, 99, 3, 4, 5)]
    folder, packed = open_imagenet(root), open_imagenet(tar, "tar")
    for source in (folder, packed):
        images, labels = read_all(source)
        np.testing.assert_array_equal(images, wanted)
        np.testing.assert_array_equal(labels, [0, 0, 0, 0, 1, 1, 1])
        assert labels.dtype == np.int32 and source.num_classes == 2
    assert folder.describe() == packed.describe()
    json.dumps(folder.describe())
    assert len(open_imagenet(root, split="test")) == len(open_imagenet(tar, "tar", "test")) == 6
    assert open_imagenet(root, split="test").describe() != folder.describe()


def test_order_is_that_of_an_independent_walk(tmp_path):
    import os

    root = write_tree(tmp_path, classes=("b", "B", "a10", "a9", "ä"), suffix="_10.png")
    for name in ("train/b/img_9.png", "train/b/sub/img_1.png", "train/b/sub.x/img_1.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(random_pixels(8, 8, 3)))
    walked = [
        os.path.relpath(os.path.join(at, file), root / "train").replace(os.sep, "/")
        for cls in sorted(os.listdir(root / "train"))
        for at, _, files in sorted(os.walk(root / "train" / cls))
        for file in sorted(files)
    ]
    assert open_imagenet(root)._names == walked


def test_identity_sees_names_and_sizes(tmp_path):
    root = write_tree(tmp_path)
    before = open_imagenet(root).describe()
    assert open_imagenet(root).describe() == before
    path = root / "train" / "n01" / "img_0.png"
    path.write_bytes(path.read_bytes() + b"\0")
    larger = open_imagenet(root).describe()
    path.rename(path.with_name("img_00.png"))
    renamed = open_imagenet(root).describe()
    assert len({d["digest"] for d in (before, larger, renamed)}) == 3
    assert open_imagenet(root, size=4).describe() != renamed


def test_numeric_class_folders_sort_as_numbers_with_a_warning(tmp_path):
    root = write_tree(tmp_path, classes=[str(i) for i in range(11)])
    with pytest.warns(UserWarning, match="numeric order"):
        source = open_imagenet(root)
    # Image 3 * c is the first of folder str(c), whose pixels write_tree made with that seed.
    np.testing.assert_array_equal(source.image(6), random_pixels(8, 8, 3, seed=6))
    assert source.labels_N[6] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_order({"00", "02", "10"}) == ["00", "02", "10"]
        assert class_order({"n2", "n10"}) == ["n10", "n2"]


def test_one_tar_file_per_split(tmp_path):
    for split in ("train", "val"):
        write_tar(write_tree(tmp_path / split, splits=[split]), tmp_path / f"data_{split}.tar")
    path = tmp_path / "data_{split}.tar"
    assert len(open_imagenet(path, "tar")) == len(open_imagenet(path, "tar", "test")) == 6
    with pytest.raises(UserError, match="no folder val"):
        open_imagenet(tmp_path / "data_train.tar", "tar", "test")


def test_damaged_images_are_named(tmp_path):
    root = write_tree(tmp_path / "tree")
    path = root / "train" / "n02" / "img_1.png"
    content = path.read_bytes()
    jpeg = encoded(random_pixels(64, 64, 3), "JPEG")
    for data in (b"", content[:10], content[: len(content) // 2], jpeg[: len(jpeg) // 2], b"text"):
        path.write_bytes(data)
        tar = write_tar(root, tmp_path / "tree.tar")
        for source, where in ((open_imagenet(root), path), (open_imagenet(tar, "tar"), tar)):
            assert source.image(3).shape == (8, 8, 3)
            with pytest.raises(DamagedFile, match="n02/img_1.png is not a readable image") as error:
                source.image(4)
            assert str(where) in str(error.value)
    source = open_imagenet(root)
    path.unlink()
    with pytest.raises(DamagedFile, match="n02/img_1.png cannot be read"):
        source.image(4)


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "header", "empty", "gzip"])
def test_a_damaged_tar_never_passes_for_a_smaller_one(tmp_path, damage):
    tar = write_tar(write_tree(tmp_path / "tree"), tmp_path / "tree.tar")
    with tarfile.open(tar) as opened:
        member = opened.getmembers()[-3]
    data = bytearray(tar.read_bytes())
    if damage == "cut":
        data = data[: member.offset_data + 10]
    elif damage == "cut at a member":
        data = data[: member.offset]
    elif damage == "header":
        data[member.offset + 3] ^= 1
    elif damage == "empty":
        data = b""
    else:
        data = gzip.compress(data)
    tar.write_bytes(data)
    if damage == "header":  # tarfile itself takes the damaged header for the end
        with tarfile.open(tar) as opened:
            assert member.name not in opened.getnames()
    with pytest.raises(UserError, match="tree.tar is"):
        open_imagenet(tar, "tar")


def test_trees_that_cannot_be_right_are_refused(tmp_path):
    root = write_tree(tmp_path / "a")
    (root / "train" / "n03").mkdir()
    with pytest.raises(UserError, match="no image for 1 of 3 classes \\(n03\\)"):
        open_imagenet(root)
    root = write_tree(tmp_path / "b", splits=["train"])
    write_tree(root, splits=["val"], classes=["n01", "n02", "n07"])
    with pytest.raises(UserError, match="n07 is a class that the training split does not have"):
        open_imagenet(root, split="test")
    root = write_tree(tmp_path / "c", splits=["val"])
    with pytest.raises(UserError, match="has no folder train"):
        open_imagenet(root)
    (tmp_path / "d" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="no class folders"):
        open_imagenet(tmp_path / "d")
    root = write_tree(tmp_path / "e", classes=[f"c{i:02d}" for i in range(11)])
    with pytest.raises(UserError, match="holds 11 classes, but imagenette has 10"):
        open_source(name="imagenette", source="folder", path=root, split="train", image_size=8)


def test_a_part_of_the_classes_warns_that_labels_are_positions(tmp_path):
    with pytest.warns(UserWarning, match="2 of the 1000 classes of imagenet"):
        open_imagenet(write_tree(tmp_path))


@pytest.mark.parametrize("source", [name for name in sources.SOURCES if name != "sklearn"])
@pytest.mark.parametrize("path", [None, "nowhere/at/all"])
def test_a_missing_path_says_what_belongs_there(source, path):
    with pytest.raises(UserError, match="needs dataset.path to be") as error:
        open_source(name="mnist", source=source, path=path, split="train", image_size=28)
    assert str(path) in str(error.value) or "not set" in str(error.value)


def test_unknown_source_lists_the_known(tmp_path):
    with pytest.raises(UserError, match="sklearn, npz, idx, folder, tar, tfds"):
        open_source(name="mnist", source="zip", path=tmp_path, split="train", image_size=28)
    with pytest.raises(UserError, match="holds the data set digits only"):
        open_source(name="mnist", source="sklearn", path=None, split="train", image_size=28)


# --- TensorFlow Datasets ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate(12), "test": self._generate(4)}

        def _generate(self, count):
            for i in range(count):
                # As a file: encoding an array would take TensorFlow.
                image = io.BytesIO(encoded(random_pixels(32, 32, 3, seed=i)))
                yield i, {"image": image, "label": i % 10}

        def _generate_examples(self):
            raise NotImplementedError

    root = tmp_path_factory.mktemp("tfds")
    builder = Tiny(data_dir=root, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_path


def test_tfds(prepared):
    source = open_source(name="cifar10", source="tfds", path=prepared, split="train", image_size=32)
    images, labels = read_all(source)
    assert len(source) == 12 and labels.dtype == np.int32 and source.num_classes == 10
    # Preparing shuffles the records: match images and labels by content.
    by_content = {random_pixels(32, 32, 3, seed=i).tobytes(): i % 10 for i in range(12)}
    assert [by_content[image.tobytes()] for image in images] == labels.tolist()
    test = open_source(name="cifar10", source="tfds", path=prepared, split="test", image_size=32)
    assert len(test) == 4
    assert test.describe() != source.describe()
    json.dumps(source.describe())


def test_tfds_says_how_to_prepare(tmp_path):
    with pytest.raises(UserError, match=r"tfds.builder\('cifar10'.*download_and_prepare"):
        open_source(name="cifar10", source="tfds", path=tmp_path, split="train", image_size=32)
    with pytest.raises(UserError, match="not in TensorFlow Datasets"):
        open_source(name="digits", source="tfds", path=tmp_path, split="train", image_size=16)


def test_every_data_set_has_a_source():
    for info in DATASETS.values():
        assert info.tfds_name or info.name in ("digits", "tiny_imagenet")
