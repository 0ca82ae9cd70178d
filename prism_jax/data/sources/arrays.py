"""Images in memory: arrays, scikit-learn's digits, .npz archives, MNIST's and CIFAR's files."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.sources.base import ImageSource, existing, file_state
from prism_jax.data.sources.decoding import EncodedSource, square
from prism_jax.errors import UserError


class ArraySource:
    """Images in memory.

    Args:
      images_uint8_NHWC: of any size, or (N, H, W) for grey.
      labels_N: integers in [0, num_classes).
      num_classes: of the set.
      image_size: images of another size are resized bilinearly; None keeps theirs.
      name, split: what to call it.
      class_names: of the labels, where the storage states them.

    Raises:
      UserError: dtype, shape or labels do not fit.
    """

    def __init__(
        self,
        images_uint8_NHWC: np.ndarray,
        labels_N: np.ndarray,
        *,
        num_classes: int,
        image_size: int | None = None,
        name: str = "memory",
        split: str = "train",
        class_names: tuple[str, ...] | None = None,
    ):
        images, labels = np.asarray(images_uint8_NHWC), np.asarray(labels_N)
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise UserError(
                f"the {split} images of {name} have dtype {images.dtype} and shape "
                f"{images.shape}; they must be uint8 of shape (N, H, W, 1 or 3){_made_so(images)}"
            )
        self._images = images
        self._size = image_size or images.shape[1]
        self._name, self._split = name, split
        self.labels_N = check_labels(name, split, labels, len(images), num_classes)
        self.num_classes = num_classes
        self.class_names = class_names
        self.imagenet_indices: tuple[int, ...] | None = None
        self.left_out = 0

    def __len__(self) -> int:
        return len(self.labels_N)

    def image(self, index: int) -> np.ndarray:
        pixels = self._images[index]
        if pixels.shape[:2] == (self._size, self._size):
            return pixels
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return square(image, pixels.shape[-1], self._size, resize_ratio=1.0)

    def original(self, index: int) -> np.ndarray:
        return self._images[index]

    def describe(self) -> dict[str, Any]:
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        content = hashlib.sha256(repr(self._images.shape).encode())
        content.update(np.ascontiguousarray(self._images).data)
        content.update(self.labels_N.astype("<i4").tobytes())
        return {
            "name": self._name,
            "split": self._split,
            "count": len(self),
            "image_size": self._size,
            "digest": content.hexdigest(),
        }


def _made_so(images: np.ndarray) -> str:
    """What makes images of arrays that are none, where that can be seen."""
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[-1] not in (1, 3):
        return ": channels come last, images.transpose(0, 2, 3, 1)"
    if images.ndim == 4 and images.shape[-1] == 4:
        return ": of red, green, blue and opacity leave the last out, images[..., :3]"
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        return ""  # another dtype would not help
    if images.dtype.kind in "iuf" and images.size and 0 <= images.min() <= images.max() <= 255:
        fraction = images.dtype.kind == "f" and images.max() <= 1
        return f": {'(images * 255)' if fraction else 'images'}.round().astype('uint8')"
    return ""


def check_labels(
    name: str, split: str, labels_N: np.ndarray, count: int, num_classes: int
) -> np.ndarray:
    """The labels of a split as int32.

    Raises:
      UserError: there are none, they are not one integer per image, or out of range.
    """
    if not count:
        raise UserError(f"the {split} split of {name} has no image")
    if labels_N.shape == (count, 1):  # as MedMNIST and Keras have them
        labels_N = labels_N[:, 0]
    if not np.issubdtype(labels_N.dtype, np.integer) or labels_N.shape != (count,):
        raise UserError(
            f"the {split} labels of {name} have dtype {labels_N.dtype} and shape "
            f"{labels_N.shape}; they must be integers of shape ({count},)"
        )
    if labels_N.min() < 0 or labels_N.max() >= num_classes:
        raise UserError(
            f"the {split} labels of {name} run from {labels_N.min()} to {labels_N.max()}; with "
            f"{num_classes} classes they must be in [0, {num_classes - 1}]"
        )
    return labels_N.astype(np.int32)


def open_sklearn(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The 1,797 digits that come with scikit-learn: a fixed stratified split, 1,437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if info.name != "digits":
        raise UserError(
            f"dataset.source=sklearn holds the data set digits only, not {info.name}; "
            f"choose another dataset.source"
        )
    digits = load_digits()
    chosen = train_test_split(
        np.arange(len(digits.target)), test_size=360, random_state=0, stratify=digits.target
    )[split == "test"]
    pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(
        pixels,
        digits.target[chosen],
        num_classes=info.num_classes,
        image_size=size,
        name=info.name,
        split=split,
    )


def as_text(names: np.ndarray) -> tuple[str, ...]:
    """Names of classes as an array has them: text, or bytes in UTF-8.

    Raises:
      ValueError: the bytes are none.
    """
    return tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist())


def npz_name(there: Sequence[str], split: str, part: str) -> str:
    """What an .npz file calls the images or labels of a split: our name or Keras'."""
    keras = f"{'x' if part == 'images' else 'y'}_{split}"
    ours = f"{split}_{part}"
    return keras if keras in there and ours not in there else ours


def open_npz(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A NumPy archive with train_images, train_labels, test_images and test_labels, or as Keras
    calls them, x_train, y_train, x_test and y_test.

    In place of images it may hold their JPEG or PNG files one after another, as bytes with
    offsets; optionally class_names.
    """
    expected = (
        "dataset.source=npz needs dataset.path to be an .npz file with the arrays train_images "
        "(uint8, N x H x W x C), train_labels (integers), test_images and test_labels; instead of "
        "train_images it may have train_jpeg (uint8, encoded files one after another) and "
        "train_offsets (N + 1 integers), likewise test_jpeg and test_offsets"
    )
    path = existing(path, expected, os.path.isfile)
    try:
        with np.load(path, allow_pickle=False) as archive:
            there = ", ".join(archive.files)
            names = archive["class_names"] if "class_names" in archive else None
            class_names = None if names is None else as_text(names)
            labels = archive[npz_name(archive.files, split, "labels")]
            if f"{split}_jpeg" in archive:
                encoded, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
            else:
                encoded, images = None, archive[npz_name(archive.files, split, "images")]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}, only {there}; {expected}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from error
    used = int(labels.max()) + 1 if labels.size and labels.dtype.kind in "iu" else 0
    if class_names is not None and not used <= len(class_names) <= max(used, info.num_classes):
        raise UserError(
            f"{path}: class_names has {len(class_names)} names, and {info.name} has "
            f"{used if len(class_names) < used else info.num_classes} classes; store one name for "
            f"each, in the order of the labels, or none"
        )
    if encoded is None:
        return _checked_arrays(info, path, images, labels, split, size, class_names)
    integers = np.issubdtype(offsets.dtype, np.integer) and offsets.ndim == 1
    if (
        encoded.dtype != np.uint8
        or encoded.ndim != 1
        or not integers
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(encoded)
        or (np.diff(offsets) < 0).any()
    ):
        raise UserError(
            f"{path}: {split}_offsets must be integers that rise from 0 to the {encoded.size} "
            f"bytes of {split}_jpeg; {expected}"
        )
    labels = check_labels(info.name, split, labels, len(offsets) - 1, info.num_classes)
    return EncodedSource(
        info,
        split,
        size,
        count=len(labels),
        labels=lambda: labels,
        num_classes=info.num_classes,
        class_names=class_names,
        read=lambda i: encoded[offsets[i] : offsets[i + 1]].tobytes(),
        name=lambda i: f"{path}, {split} image {i}",
        content=lambda: b"".join(a.tobytes() for a in (encoded, offsets.astype("<i8"), labels)),
        stamp=lambda: repr(file_state(path)),
    )


def open_idx(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The four files of MNIST as published, compressed or not."""
    prefix = {"train": "train", "test": "t10k"}[split]
    expected = (
        "dataset.source=idx needs dataset.path to be a folder with the four published files "
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, each as it is or with .gz"
    )
    path = existing(path, expected, os.path.isdir)
    images = _read_idx(os.path.join(path, f"{prefix}-images-idx3-ubyte"), expected)
    labels = _read_idx(os.path.join(path, f"{prefix}-labels-idx1-ubyte"), expected)
    return _checked_arrays(info, path, images, labels, split, size)


def _read_idx(path: str, expected: str) -> np.ndarray:
    """One idx file: two zero bytes, type 8 (uint8), rank, big-endian sizes, then the bytes."""
    path = path if os.path.exists(path) else f"{path}.gz"
    existing(path, expected, os.path.isfile)
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    rank = data[3] if data[:3] == b"\x00\x00\x08" and len(data) > 3 else 0
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4)) if len(data) >= 4 + 4 * rank else ()
    if not rank or len(data) != 4 + 4 * rank + math.prod(map(int, shape)):
        raise UserError(f"{path} is damaged or no idx file of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _checked_arrays(
    info: DatasetInfo,
    path: str,
    images: np.ndarray,
    labels: np.ndarray,
    split: str,
    size: int,
    class_names: tuple[str, ...] | None = None,
) -> ArraySource:
    channels = images.shape[-1] if images.ndim == 4 else 1
    if channels != info.channels:
        raise UserError(
            f"{path}: the {split} images have {channels} channels, {info.name} has {info.channels}"
        )
    return ArraySource(
        images,
        labels,
        num_classes=info.num_classes,
        image_size=size,
        name=info.name,
        split=split,
        class_names=class_names,
    )


_CIFAR = {
    "cifar10": (
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        b"labels",
    ),
    "cifar100": (
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {"train": ["train"], "test": ["test"]},
        b"fine_labels",
    ),
}


def open_cifar(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """CIFAR-10 and CIFAR-100 as published for Python: pickled batches, unpacked or not."""
    if info.name not in _CIFAR:
        raise UserError(
            f"dataset.source=cifar holds the data sets {' and '.join(_CIFAR)}, not {info.name}; "
            f"choose another dataset.source"
        )
    folder, archive, batches, label_key = _CIFAR[info.name]
    expected = (
        f"dataset.source=cifar needs dataset.path to be the published {archive}, or the folder "
        f"{folder} that it unpacks to, with {', '.join(batches['train'] + batches['test'])}"
    )
    path = existing(path, expected, os.path.exists)
    if os.path.isdir(path):
        for inner in (folder, archive):
            if os.path.exists(os.path.join(path, inner)):
                path = os.path.join(path, inner)
                break
    read = _read_member if os.path.isfile(path) else _read_file
    images, labels = [], []
    for name in batches[split]:
        where = os.path.join(path, name)
        try:
            batch = _ArrayUnpickler(io.BytesIO(read(path, name)), encoding="bytes").load()
            pixels, batch_labels = batch[b"data"], batch[label_key]
            images.append(pixels.pixels().reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels.append(np.asarray(batch_labels, np.int64))
        except FileNotFoundError as error:
            raise UserError(f"there is no {where}; {expected}") from error
        except UserError as error:
            raise UserError(f"{where} is no batch of {info.name}: {error}") from error
        except _UNPICKLABLE as error:
            raise UserError(
                f"{where} is damaged or no batch of {info.name} ({error}); fetch it again"
            ) from error
    return _checked_arrays(info, path, np.concatenate(images), np.concatenate(labels), split, size)


# What damaged or foreign bytes make of a pickle, a gzip or a tar file.
_UNPICKLABLE = (
    *(OSError, EOFError, pickle.UnpicklingError, ValueError, KeyError, IndexError, TypeError),
    *(AttributeError, MemoryError, OverflowError, tarfile.TarError, zlib.error),
)


def _read_file(path: str, name: str) -> bytes:
    with open(os.path.join(path, name), "rb") as file:
        return file.read()


def _read_member(path: str, name: str) -> bytes:
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isfile() and os.path.basename(member.name) == name:
                data = tar.extractfile(member)
                assert data is not None  # it is a file
                return data.read()
    raise FileNotFoundError(name)


class _PickledArray:
    """What stands in a pickle for a NumPy array of bytes; nothing of NumPy is called."""

    def __init__(self, *_: Any):
        self._state: Any = None

    def __setstate__(self, state: Any) -> None:
        self._state = state

    def pixels(self) -> np.ndarray:
        _, shape, dtype, fortran, data = self._state
        if not isinstance(dtype, _PickledType) or dtype.name != b"u1" or fortran:
            raise UserError("its pixels are not bytes")
        return np.frombuffer(data, np.uint8).reshape(shape)


class _PickledType:
    """What stands in a pickle for a dtype."""

    def __init__(self, name: bytes | str, *_: Any):
        self.name = name if isinstance(name, bytes) else name.encode()

    def __setstate__(self, state: Any) -> None:
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """How pickles of Python 3 spell bytes in the old protocols."""
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy", "dtype"): _PickledType,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows arrays of bytes, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise UserError(f"it asks to load {module}.{name}; nothing of it was run")
