"""Where real images come from: arrays, image folders, tar files, TensorFlow Datasets.

Every source gives square uint8 images of one size by position, and says what it is, so that a
fingerprint can tell one set from another.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import math
import os
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from etils import epath
from PIL import Image

from prism_jax.data.datasets import DatasetInfo, dataset_info
from prism_jax.data.image_set import UNREADABLE, DamagedFile
from prism_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

# The names under which the two splits are found, best first: ImageNet's "test" has no labels.
SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}

_FETCH = "It is one of the real images: fetch it again, or delete it."


class ImageSource(Protocol):
    """Labelled images by position.

    Attributes:
      labels_N: int32.
      num_classes: labels are below it.
    """

    labels_N: np.ndarray
    num_classes: int

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 (image_size, image_size, C); callable from several threads."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this is, as JSON values: equal for equal pixels and labels in equal order."""
        ...


def open_source(
    *, name: str, source: str, path: epath.PathLike | None, split: str, image_size: int
) -> ImageSource:
    """Open one split of a data set.

    Args:
      name: a row of ``DATASETS``.
      source: a row of ``SOURCES``.
      path: where the data is; the message of a missing path says what belongs there.
      split: "train" or "test".
      image_size: side of the images in pixels.

    Raises:
      UserError: the data is not there, not readable, or not of this data set.
    """
    info = dataset_info(name)
    if source not in SOURCES:
        raise UserError(f"dataset.source is {source!r}; allowed: {', '.join(SOURCES)}")
    assert split in SPLITS, split
    opened = SOURCES[source](info, None if path is None else str(path), split, image_size)
    if opened.num_classes > info.num_classes:
        raise UserError(
            f"dataset.path={path} holds {opened.num_classes} classes, but {name} has "
            f"{info.num_classes}; correct dataset.path or dataset.name"
        )
    if opened.num_classes < info.num_classes:
        warnings.warn(
            f"{path} holds {opened.num_classes} of the {info.num_classes} classes of {name}; "
            f"labels are positions among these, not those of the full set",
            stacklevel=2,
        )
    return opened


def read_all(source: ImageSource, *, threads: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole source into memory.

    Returns:
      uint8 images_NHWC in the source's order, int32 labels_N.
    """
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(source.image, range(len(source))))), source.labels_N


# --- arrays -----------------------------------------------------------------------------------


class ArraySource:
    """Images in memory.

    Args:
      images_uint8_NHWC: of any size, or (N, H, W) for grey.
      labels_N: integers in [0, num_classes).
      num_classes: of the set.
      image_size: images of another size are resized bilinearly; None keeps theirs.
      name, split: what to call it.

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
    ):
        images, labels = np.asarray(images_uint8_NHWC), np.asarray(labels_N)
        images = images[..., None] if images.ndim == 3 else images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise UserError(
                f"the {split} images of {name} have dtype {images.dtype} and shape "
                f"{images.shape}; they must be uint8 of shape (N, H, W, 1 or 3)"
            )
        if not len(images):
            raise UserError(f"the {split} split of {name} has no image")
        integers = np.issubdtype(labels.dtype, np.integer)
        if not integers or labels.shape != images.shape[:1]:
            raise UserError(
                f"the {split} labels of {name} have dtype {labels.dtype} and shape "
                f"{labels.shape}; they must be integers of shape ({len(images)},)"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise UserError(
                f"the {split} labels of {name} run from {labels.min()} to {labels.max()}; with "
                f"{num_classes} classes they must be in [0, {num_classes - 1}]"
            )
        self._images = images
        self._size = image_size or images.shape[1]
        self._name, self._split = name, split
        self.labels_N = labels.astype(np.int32)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.labels_N)

    def image(self, index: int) -> np.ndarray:
        pixels = self._images[index]
        if pixels.shape[:2] == (self._size, self._size):
            return pixels
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return _square(image, pixels.shape[-1], self._size, resize_ratio=1.0)

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


def _open_sklearn(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
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


def _open_npz(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A NumPy archive with train_images, train_labels, test_images and test_labels."""
    expected = (
        "dataset.source=npz needs dataset.path to be an .npz file with the arrays train_images "
        "(uint8, N x H x W x C), train_labels (integers), test_images and test_labels"
    )
    path = _existing(path, expected, os.path.isfile)
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]}; {expected}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); {expected}") from error
    return _checked_arrays(info, path, images, labels, split, size)


def _open_idx(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The four files of MNIST as published, compressed or not."""
    prefix = {"train": "train", "test": "t10k"}[split]
    expected = (
        "dataset.source=idx needs dataset.path to be a folder with the four published files "
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, each as it is or with .gz"
    )
    path = _existing(path, expected, os.path.isdir)
    images = _read_idx(os.path.join(path, f"{prefix}-images-idx3-ubyte"), expected)
    labels = _read_idx(os.path.join(path, f"{prefix}-labels-idx1-ubyte"), expected)
    return _checked_arrays(info, path, images, labels, split, size)


def _read_idx(path: str, expected: str) -> np.ndarray:
    """One idx file: two zero bytes, type 8 (uint8), rank, big-endian sizes, then the bytes."""
    path = path if os.path.exists(path) else f"{path}.gz"
    _existing(path, expected, os.path.isfile)
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
    info: DatasetInfo, path: str, images: np.ndarray, labels: np.ndarray, split: str, size: int
) -> ArraySource:
    channels = images.shape[-1] if images.ndim == 4 else 1
    if channels != info.channels:
        raise UserError(
            f"{path}: the {split} images have {channels} channels, {info.name} has {info.channels}"
        )
    return ArraySource(
        images, labels, num_classes=info.num_classes, image_size=size, name=info.name, split=split
    )


# --- encoded images: folders and tar files ----------------------------------------------------


class FileSource:
    """Encoded images, decoded one by one.

    Args:
      info, split, image_size: what is read, and how large it is given out.
      names: the identity of each image: its path below the split.
      sizes: bytes of each.
      labels_N, num_classes: as in ``ImageSource``.
      read: the bytes of the image at a position.
      root: where they are, for messages.
    """

    def __init__(
        self,
        info: DatasetInfo,
        split: str,
        image_size: int,
        *,
        names: Sequence[str],
        sizes: Callable[[], Sequence[int]],
        labels_N: np.ndarray,
        num_classes: int,
        read: Callable[[int], bytes],
        root: str,
    ):
        self._info, self._split, self._size = info, split, image_size
        self._names, self._sizes, self._read, self._root = names, sizes, read, root
        self.labels_N = np.asarray(labels_N, np.int32)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self._names)

    def image(self, index: int) -> np.ndarray:
        path = f"{self._root}/{self._names[index]}"
        try:
            data = self._read(index)
        except OSError as error:
            raise DamagedFile(path, f"cannot be read ({error})", _FETCH) from error
        return decode(
            data,
            path,
            channels=self._info.channels,
            image_size=self._size,
            resize_ratio=self._info.resize_ratio,
        )

    def describe(self) -> dict[str, Any]:
        return self._description

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        listing = hashlib.sha256()
        for name, size in zip(self._names, self._sizes(), strict=True):
            listing.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
        return {
            "name": self._info.name,
            "split": self._split,
            "count": len(self),
            "image_size": self._size,
            "digest": listing.hexdigest(),
        }


def decode(
    data: bytes, path: epath.PathLike, *, channels: int, image_size: int, resize_ratio: float
) -> np.ndarray:
    """Decode an image file to a square.

    Palette, CMYK, grey, transparent and 16-bit images are converted as Pillow converts them;
    the EXIF orientation is not applied (torchvision's ImageFolder does neither more nor less).

    Args:
      data: the encoded file.
      path: its name, for messages.
      channels: 1 (grey) or 3 (RGB).
      image_size, resize_ratio: an image of exactly this size is untouched; else its shorter
        side is resized to ``round(resize_ratio * image_size)`` and the centre cut out.

    Returns:
      uint8 (image_size, image_size, channels).

    Raises:
      DamagedFile: the bytes are not a whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _square(image, channels, image_size, resize_ratio)
    except UNREADABLE as error:
        raise DamagedFile(path, f"is not a readable image ({error})", _FETCH) from error


def _square(image: Image.Image, channels: int, size: int, resize_ratio: float) -> np.ndarray:
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        width, height = image.size
        shorter, target = min(width, height), round(resize_ratio * size)
        # torchvision's Resize truncates the longer side, its CenterCrop rounds the offset.
        width, height = target * width // shorter, target * height // shorter
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    pixels = np.array(image)
    return pixels[..., None] if channels == 1 else pixels


_TREE = """
    train/<class>/<image>   one folder per class, the same classes in both
    val/<class>/<image>     (or validation/, or test/)
with images in .jpg, .jpeg, .png or .webp"""


def _open_folder(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A tree of images as torchvision's ImageFolder reads it."""
    expected = f"dataset.source=folder needs dataset.path to be a local folder with{_TREE}"
    path = _existing(path, expected, os.path.isdir)
    folders = [os.path.join(path, name) for name in SPLITS[split]]
    root = next((folder for folder in folders if os.path.isdir(folder)), None)
    if root is None:
        raise UserError(f"{path} has no folder {' or '.join(SPLITS[split])}; {expected}")
    # Labels are positions among the classes of the training split, in both splits.
    train = os.path.join(path, "train")
    classes = class_order(_folders(train if os.path.isdir(train) else root))
    names = [name for cls in _folders(root) for name in _walk(root, cls)]
    names, labels = _labelled(names, classes, root, expected)

    def read(index: int) -> bytes:
        with open(os.path.join(root, names[index]), "rb") as file:
            return file.read()

    return FileSource(
        info,
        split,
        size,
        names=names,
        sizes=lambda: [os.path.getsize(os.path.join(root, name)) for name in names],
        labels_N=labels,
        num_classes=len(classes),
        read=read,
        root=root,
    )


def _folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _walk(root: str, folder: str) -> list[str]:
    """Files at any depth below a folder, as paths relative to the root."""
    found = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            below = f"{folder}/{entry.name}"
            found += _walk(root, below) if entry.is_dir() else [below]
    return found


def _open_tar(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The same tree inside an uncompressed tar file, read in place."""
    expected = (
        "dataset.source=tar needs dataset.path to be an uncompressed .tar file, or a name with "
        f"{{split}} in it for one file per split (data_{{split}}.tar), that holds{_TREE}"
    )
    if path and "{split}" in path:
        paths = [path.replace("{split}", name) for name in SPLITS[split]]
        path = next((p for p in paths if os.path.isfile(p)), path)
    path = _existing(path, expected, os.path.isfile)
    stat = os.stat(path)
    members = _tar_index(path, stat.st_size, stat.st_mtime_ns)
    trees: dict[str, list[str]] = {}
    for name in members:
        if match := re.match(r"(?:.*/)?(train|val|validation|test)/[^/]+/.+", name):
            trees.setdefault(match[1], []).append(name)
    found = next((name for name in SPLITS[split] if name in trees), None)
    if found is None:
        raise UserError(f"{path} has no folder {' or '.join(SPLITS[split])}; {expected}")

    def below(tree: str) -> dict[str, str]:
        return {re.sub(rf"^(?:.*/)?{tree}/", "", name): name for name in trees[tree]}

    full = below(found)
    ordered = below("train" if "train" in trees else found)
    classes = class_order({name.split("/")[0] for name in ordered})
    names, labels = _labelled(list(full), classes, path, expected)
    places = [members[full[name]] for name in names]

    def read(index: int) -> bytes:
        offset, length = places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return FileSource(
        info,
        split,
        size,
        names=names,
        sizes=lambda: [length for _, length in places],
        labels_N=labels,
        num_classes=len(classes),
        read=read,
        root=path,
    )


@functools.lru_cache(maxsize=4)
def _tar_index(path: str, size: int, modified_ns: int) -> dict[str, tuple[int, int]]:
    """Offset and length of each file in a tar; size and time of change are part of the key."""
    del size, modified_ns
    try:
        with tarfile.open(path, "r:") as tar:
            members = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is not a whole, uncompressed tar file ({error}); fetch or unpack it again"
        ) from error
    # tarfile takes an unreadable header for the end, and all files behind it for absent.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut short or damaged at byte {end}: there is neither a file nor the "
                f"end mark of a tar file; fetch it again"
            )
    return members


def class_order(names: Sequence[str] | set[str]) -> list[str]:
    """The classes in label order: sorted as text, as torchvision does.

    Numbers without leading zeros are sorted as numbers (2 before 10) with a warning, because
    ImageFolder would give them other labels.
    """
    as_text = sorted(names)
    if all(name.isascii() and name.isdigit() for name in as_text):
        as_numbers = sorted(as_text, key=lambda name: (int(name), name))
        if as_numbers != as_text:
            warnings.warn(
                f"the class folders are numbers without leading zeros; they are taken in "
                f"numeric order ({', '.join(as_numbers[:3])}, ...), where torchvision's "
                f"ImageFolder sorts them as text ({', '.join(as_text[:3])}, ...)",
                stacklevel=2,
            )
        return as_numbers
    return as_text


def _labelled(
    names: Sequence[str], classes: Sequence[str], root: str, expected: str
) -> tuple[list[str], np.ndarray]:
    """The images among relative paths ``class/.../file`` in ImageFolder's order, with labels."""
    label = {cls: i for i, cls in enumerate(classes)}
    images: dict[str, list[tuple[str, ...]]] = {cls: [] for cls in classes}
    for name in names:
        folder, file = name.rsplit("/", 1)
        cls = folder.split("/")[0]
        if file.startswith(".") or not file.lower().endswith(EXTENSIONS):
            continue
        if cls not in label:
            raise UserError(
                f"{root}/{cls} is a class that the training split does not have; {expected}"
            )
        images[cls].append((folder, file))
    if empty := [cls for cls in classes if not images[cls]]:
        raise UserError(
            f"{root} has no image for {len(empty)} of {len(classes)} classes "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}); {expected}"
        )
    if not classes:
        raise UserError(f"{root} has no class folders; {expected}")
    ordered = [f"{folder}/{file}" for cls in classes for folder, file in sorted(images[cls])]
    counts = [len(images[cls]) for cls in classes]
    return ordered, np.repeat(np.arange(len(classes), dtype=np.int32), counts)


# --- TensorFlow Datasets ----------------------------------------------------------------------


def _open_tfds(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A data set prepared by TensorFlow Datasets as array_record; TensorFlow is not needed."""
    if info.tfds_name is None:
        raise UserError(f"{info.name} is not in TensorFlow Datasets; choose another dataset.source")
    expected = (
        f"dataset.source=tfds needs dataset.path to be the data_dir in which {info.tfds_name} was "
        f'prepared once by\n    python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{info.tfds_name}', data_dir='{path or '<dataset.path>'}', "
        f"file_format='array_record').download_and_prepare()\"\n"
        f"(preparing takes TensorFlow for some sets, reading does not), or the folder with its "
        f"dataset_info.json"
    )
    path = _existing(path, expected, lambda p: epath.Path(p).is_dir())
    import tensorflow_datasets as tfds

    if (epath.Path(path) / "dataset_info.json").exists():
        builder = tfds.builder_from_directory(path)
    else:
        builder = tfds.builder(info.tfds_name, data_dir=path, file_format="array_record")
    found = next((name for name in SPLITS[split] if name in builder.info.splits), None)
    if not builder.is_prepared() or found is None:
        raise UserError(f"{path} has no prepared {split} split of {info.tfds_name}; {expected}")
    if builder.info.file_format.value != "array_record":
        raise UserError(f"{path} is stored as {builder.info.file_format.value}; {expected}")
    records = builder.as_data_source(found, decoders={"image": tfds.decode.SkipDecoding()})
    return TfdsSource(info, split, size, builder=builder, found=found, records=records)


class TfdsSource:
    """A split of a prepared TensorFlow data set; its images are decoded with Pillow."""

    def __init__(
        self, info: DatasetInfo, split: str, image_size: int, *, builder, found: str, records
    ):
        self._info, self._split, self._size = info, split, image_size
        self._records = records
        self._statistics = builder.info.splits[found]
        self._full_name = builder.info.full_name
        self.num_classes = builder.info.features["label"].num_classes

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def labels_N(self) -> np.ndarray:
        # The labels lie beside the images: the first use reads the split once.
        with ThreadPoolExecutor(8) as pool:
            labels = pool.map(lambda i: self._records[i]["label"], range(len(self)))
            return np.fromiter(labels, np.int32, len(self))

    def image(self, index: int) -> np.ndarray:
        return decode(
            self._records[index]["image"],
            f"{self._full_name}, {self._split} image {index}",
            channels=self._info.channels,
            image_size=self._size,
            resize_ratio=self._info.resize_ratio,
        )

    def describe(self) -> dict[str, Any]:
        shards = repr((self._statistics.num_bytes, list(self._statistics.shard_lengths)))
        return {
            "name": self._full_name,
            "split": self._split,
            "count": len(self),
            "image_size": self._size,
            "digest": hashlib.sha256(shards.encode()).hexdigest(),
        }


def _existing(path: str | None, expected: str, exists: Callable[[str], bool]) -> str:
    if not path:
        raise UserError(f"dataset.path is not set; {expected}")
    if not exists(path):
        raise UserError(f"there is no {path}; {expected}")
    return path


SOURCES: dict[str, Callable[[DatasetInfo, str | None, str, int], ImageSource]] = {
    "sklearn": _open_sklearn,
    "npz": _open_npz,
    "idx": _open_idx,
    "folder": _open_folder,
    "tar": _open_tar,
    "tfds": _open_tfds,
}
