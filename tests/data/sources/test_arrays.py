from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import warnings

import numpy as np
import pytest
from helpers.images import encoded, random_pixels
from PIL import Image

from prism_jax.data.datasets import DATASETS
from prism_jax.data.sources import ArraySource, open_source, own, read_all
from prism_jax.errors import UserError


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


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((2, 8, 8, 4), np.uint8, "leave the last out, images[..., :3]"),
        ((2, 8, 8, 4), np.float32, "leave the last out, images[..., :3]"),
        ((2, 3, 8, 8), np.uint8, "images.transpose(0, 2, 3, 1)"),
        ((2, 8, 8, 3), np.float32, "(images * 255).round().astype('uint8')"),
        ((2, 8, 8, 3), np.int64, "images.round().astype('uint8')"),
        ((2, 8, 8, 5), np.uint8, None),
        ((2, 192), np.int64, None),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_what_makes_them_so(shape, dtype, said):
    """A remedy that does not help is none: other numbers of another shape."""
    with pytest.raises(UserError) as caught:
        ArraySource(np.ones(shape, dtype), np.arange(2), num_classes=2)
    _, _, remedy = str(caught.value).partition("(N, H, W, 1 or 3)")
    assert (said in remedy) if said else remedy == ""


def test_digits_are_resized_bilinearly():
    small, large = digits("test", 8), digits("test", 16)
    wanted = Image.fromarray(small.image(5)[..., 0]).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(large.image(5)[..., 0], np.asarray(wanted))
    assert large.image(5).shape == (16, 16, 1) and large.image(5).dtype == np.uint8
    assert read_all(small)[0].max() == 255
    assert small.describe() != large.describe()


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
    with pytest.raises(UserError, match="test_labels.*is not a file in the archive, only train_im"):
        open_source(split="test", **options)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        open_source(split="train", **options)


def test_npz_as_others_write_it(tmp_path):
    """Keras' names, and labels in a column, as MedMNIST has them, are the same set."""
    images, labels, path = random_pixels(6, 8, 8, 3), np.arange(6) % 3, tmp_path / "set.npz"
    options = {"name": "mine", "source": "npz", "path": str(path), "image_size": 8}
    names = {
        "ours": ("train_images", "train_labels", "test_images", "test_labels"),
        "keras": ("x_train", "y_train", "x_test", "y_test"),
        "both": ("train_images", "train_labels", "test_images", "test_labels", "x_train"),
    }
    for names_of, given in ((n, g) for n in names for g in (labels, labels[:, None])):
        arrays = (images, given, images[::-1], given[::-1], images[:2])
        np.savez(path, **dict(zip(names[names_of], arrays, strict=False)))
        own._found.cache_clear()
        for split, at in (("train", slice(None)), ("test", slice(None, None, -1))):
            read, of = read_all(open_source(split=split, **options))
            np.testing.assert_array_equal(read, images[at])
            np.testing.assert_array_equal(of, labels[at])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda x: x / 255, r"\(images \* 255\).round\(\).astype\('uint8'\)"),
        (lambda x: x.astype(np.int64), r": images.round\(\).astype\('uint8'\)"),
        (lambda x: x.transpose(0, 3, 1, 2), r"images.transpose\(0, 2, 3, 1\)"),
        (lambda x: x / 10 - 9.0, r"\(N, H, W, 1 or 3\)$"),  # in some other space
        (lambda x: x.astype(np.float32) * np.nan, r"\(N, H, W, 1 or 3\)$"),
    ],
)
def test_arrays_that_are_no_images_say_what_makes_them_some(made, said):
    with pytest.raises(UserError, match=said):
        ArraySource(made(random_pixels(4, 8, 8, 3)), np.arange(4), num_classes=4)


def test_npz_of_encoded_files(tmp_path):
    path, pixels = tmp_path / "set.npz", random_pixels(4, 8, 8, 3)
    files = [
        encoded(p, kind) for p, kind in zip(pixels, ["PNG", "JPEG", "PNG", "PNG"], strict=True)
    ]
    arrays = {
        "train_jpeg": np.frombuffer(b"".join(files), np.uint8),
        "train_offsets": np.cumsum([0, *map(len, files)]),
        "train_labels": np.array([3, 1, 4, 1], np.uint8),
        "class_names": np.array(DATASETS["cifar10"].class_names),
    }
    options = {"name": "cifar10", "source": "npz", "path": path, "image_size": 8, "split": "train"}
    np.savez(path, **arrays)
    source = open_source(**options)
    images, labels = read_all(source)
    np.testing.assert_array_equal(images[[0, 2, 3]], pixels[[0, 2, 3]])
    np.testing.assert_array_equal(images[1], np.asarray(Image.open(io.BytesIO(files[1]))))
    np.testing.assert_array_equal(labels, [3, 1, 4, 1])
    before = source.describe()
    np.savez(path, **arrays | {"train_labels": np.array([3, 1, 4, 2])})
    assert open_source(**options).describe() != before
    for offsets in ([0, 1, 2, 3, 4], [0, 9, 5, 9, sum(map(len, files))], [0], np.arange(5.0)):
        np.savez(path, **arrays | {"train_offsets": np.array(offsets)})
        with pytest.raises(UserError, match="train_offsets must be integers that rise from 0"):
            open_source(**options)
    np.savez(path, **arrays | {"train_offsets": arrays["train_offsets"][[0, 1, 4]]})
    with pytest.raises(UserError, match="labels of cifar10 have .* shape \\(4,\\)"):
        open_source(**options)


def test_class_names_in_bytes_are_text(tmp_path):
    path, names = tmp_path / "set.npz", ("Haus", "Bär", "猫")
    arrays = {"train_images": random_pixels(3, 8, 8), "train_labels": np.arange(3)}
    options = {"name": "own", "source": "npz", "path": path, "image_size": 8, "split": "train"}
    for stored in (np.array(names), np.char.encode(names, "utf-8")):
        np.savez(path, class_names=stored, **arrays)
        assert open_source(**options).class_names == names
    np.savez(path, class_names=np.char.encode(names[:2], "latin-1"), **arrays)
    with pytest.raises(UserError, match="set.npz cannot be read .*utf-8"):
        open_source(**options)


@pytest.mark.parametrize("count", [2, 11])
@pytest.mark.parametrize("part", ["images", "jpeg"])
def test_as_many_names_as_classes(tmp_path, count, part):
    path, pixels = tmp_path / "set.npz", random_pixels(3, 8, 8, 3)
    files = [encoded(p) for p in pixels]
    arrays = {
        "images": {"train_images": pixels},
        "jpeg": {"train_jpeg": np.frombuffer(b"".join(files), np.uint8),
                 "train_offsets": np.cumsum([0, *map(len, files)])},
    }[part] | {"train_labels": np.arange(3)}  # fmt: skip
    options = {"name": "cifar10", "source": "npz", "path": path, "image_size": 8, "split": "train"}
    np.savez(path, class_names=[str(i) for i in range(count)], **arrays)
    said = f"class_names has {count} names, and cifar10 has {3 if count < 3 else 10} classes"
    with pytest.raises(UserError, match=said):
        open_source(**options)
    np.savez(path, class_names=["a", "b", "c"], **arrays)  # a part of the set
    assert open_source(**options).class_names == ("a", "b", "c")


def test_classes_in_another_order_are_warned_of(tmp_path):
    path, names = tmp_path / "set.npz", DATASETS["cifar10"].class_names
    arrays = {"train_images": random_pixels(2, 8, 8, 3), "train_labels": np.arange(2)}
    options = {"name": "cifar10", "source": "npz", "path": path, "image_size": 8, "split": "train"}
    np.savez(path, class_names=np.array(names[::-1]), **arrays)
    with pytest.warns(UserWarning, match="in the order truck, ship, horse, ..."):
        open_source(**options)
    np.savez(path, class_names=np.array(names), **arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_source(**options).class_names == names


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


# --- CIFAR's pickled batches ---


def write_cifar(folder, name="cifar10", **dump) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Batches of four images as the published ones are pickled; pixels and labels by file."""
    folder.mkdir()
    files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    label_key = b"labels"
    if name == "cifar100":
        files, label_key = ["train", "test"], b"fine_labels"
    written = {}
    for seed, file in enumerate(files):
        pixels, labels = random_pixels(4, 3, 32, 32, seed=seed), [seed, 1, 2, 9]
        batch = {b"batch_label": b"some", label_key: labels, b"data": pixels.reshape(4, 3072)}
        batch |= {b"filenames": [b"a.png"] * 4, b"coarse_labels": [0] * 4}
        (folder / file).write_bytes(pickle.dumps(batch, **dump))
        written[file] = pixels.transpose(0, 2, 3, 1), np.array(labels)
    return written


def open_cifar(path, split="train", name="cifar10"):
    return open_source(name=name, source="cifar", path=path, split=split, image_size=32)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name, folder", [("cifar10", "cifar-10-batches-py"),
                                          ("cifar100", "cifar-100-python")])  # fmt: skip
def test_cifar_batches_unpacked_or_not(tmp_path, protocol, name, folder):
    written = write_cifar(tmp_path / folder, name, protocol=protocol)
    archive = (
        tmp_path / f"{folder.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz"
    )
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / folder, arcname=folder)
    digests = set()
    for path in (tmp_path, tmp_path / folder, archive):
        train, test = (open_cifar(path, split, name) for split in ("train", "test"))
        parts = [written[file] for file in sorted(written) if not file.startswith("test")]
        images, labels = read_all(train)
        np.testing.assert_array_equal(images, np.concatenate([p for p, _ in parts]))
        np.testing.assert_array_equal(labels, np.concatenate([y for _, y in parts]))
        images, labels = read_all(test)
        np.testing.assert_array_equal(
            images, written["test_batch" if "10-" in folder else "test"][0]
        )
        digests.add(train.describe()["digest"])
    assert len(digests) == 1
    shutil.rmtree(tmp_path / folder)
    assert len(open_cifar(tmp_path, "test", name)) == 4  # from the archive beside it


def test_batches_written_by_python_2_are_read(tmp_path):
    write_cifar(tmp_path / "set")
    # What Python 2 wrote for {"data": numpy.array(12 bytes), "labels": [7]}: str is bytes there.
    pixels = bytes(range(256)) * 12
    text = (
        b"(dp1\nS'data'\np2\ncnumpy.core.multiarray\n_reconstruct\np3\n(cnumpy\nndarray\np4\n(I0\n"
        b"tS'b'\ntRp5\n(I1\n(I1\nI3072\ntcnumpy\ndtype\np6\n(S'u1'\nI0\nI1\ntRp7\n(I3\nS'|'\nNNNI-1\n"
        b"I-1\nI0\ntbI00\nS" + repr(pixels)[1:].encode() + b"\ntbsS'labels'\np8\n(lp9\nI7\nas."
    )
    (tmp_path / "set" / "test_batch").write_bytes(text)
    images, labels = read_all(open_cifar(tmp_path / "set", "test"))
    wanted = np.frombuffer(pixels, np.uint8).reshape(1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images, wanted)
    assert labels.tolist() == [7]


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_batch_that_runs_code_runs_none(tmp_path):
    write_cifar(tmp_path / "set")
    data = pickle.dumps({b"data": Attack(str(tmp_path / "was here")), b"labels": [1]})
    (tmp_path / "set" / "test_batch").write_bytes(data)
    with pytest.raises(UserError, match="test_batch is no batch of cifar10: .*mkdir; nothing"):
        open_cifar(tmp_path / "set", "test")
    assert not (tmp_path / "was here").exists()
    pickle.loads(data)  # the twin: Python's own unpickler runs it
    assert (tmp_path / "was here").exists()


def test_damaged_batches_are_named(tmp_path):
    write_cifar(tmp_path / "set")
    path = tmp_path / "set" / "data_batch_3"
    content = path.read_bytes()
    floats = pickle.dumps({b"data": np.zeros((4, 3072)), b"labels": [0] * 4})
    cases = [content[:-20], b"", content[: len(content) // 2], b"junk", pickle.dumps({b"a": 1})]
    for data in [*cases, pickle.dumps([1]), floats]:
        path.write_bytes(data)
        with pytest.raises(UserError, match="data_batch_3 is "):
            open_cifar(tmp_path / "set")
    path.unlink()
    with pytest.raises(UserError, match="there is no .*data_batch_3"):
        open_cifar(tmp_path / "set")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="data_batch_1 is damaged"):
        open_cifar(tmp_path / "cifar-10-python.tar.gz")
    with pytest.raises(UserError, match="holds the data sets cifar10 and cifar100, not mnist"):
        open_cifar(tmp_path, name="mnist")
