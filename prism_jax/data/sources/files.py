"""Images in folders, one per class, on disk or inside a tar file."""

from __future__ import annotations

import functools
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from prism_jax.data.datasets import DatasetInfo, imagenet_validation_wnids
from prism_jax.data.sources.base import ImageSource, existing, file_state
from prism_jax.data.sources.decoding import EncodedSource
from prism_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")

_TREE = """
    train/<class>/<image>   one folder per class, the same classes in both
    {test}/<class>/<image>
with images in .jpg, .jpeg, .png or .webp"""

# ImageNet's validation images as published: in one folder, numbered.
_NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
_TINY_TABLE = "val_annotations.txt"


def open_folder(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A tree of images as torchvision's ImageFolder reads it."""
    expected = f"dataset.source=folder needs dataset.path to be a local folder with{_tree(info)}"
    path = existing(path, expected, os.path.isdir)
    roots = [os.path.join(path, name) for name in split_names(info, split)]
    root = next((root for root in roots if os.path.isdir(root)), None)
    if root is None:
        raise UserError(f"{path} has no folder {' or '.join(split_names(info, split))}; {expected}")
    # Labels are positions among the classes of the training split, in both splits.
    train = os.path.join(path, "train")
    classes = _folders(train) if os.path.isdir(train) else None

    def read_path(name: str) -> bytes:
        with open(os.path.join(root, name), "rb") as file:
            return file.read()

    files = _labelled(_walk(root), classes, read_path, root, expected)

    def states() -> list[tuple[str, int, int]]:
        return [file_state(os.path.join(root, path)) for path in files.paths]

    return _source(
        info,
        split,
        size,
        files,
        name=lambda i: f"{root}/{files.paths[i]}",
        read=lambda i: read_path(files.paths[i]),
        sizes=lambda: [size for _, size, _ in states()],
        stamp=lambda: repr(states()),
    )


def open_tar(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The same tree inside an uncompressed tar file, read in place."""
    expected = (
        "dataset.source=tar needs dataset.path to be an uncompressed .tar file, or a name with "
        f"{{split}} in it for one file per split (data_{{split}}.tar), that holds{_tree(info)}"
    )
    names = split_names(info, split)
    if path and "{split}" in path:
        paths = [path.replace("{split}", name) for name in names]
        path = next((p for p in paths if os.path.isfile(p)), path)
    path = existing(path, expected, os.path.isfile)
    state = file_state(path)
    members = _tar_index(*state)
    trees: dict[str, dict[str, str]] = {}
    for member in members:
        if match := re.match(r"(?:.*?/)?(train|val|validation|test)/(.+)", member):
            trees.setdefault(match[1], {})[match[2]] = member
    found = next((name for name in names if name in trees), None)
    if found is None:
        raise UserError(f"{path} has no folder {' or '.join(names)}; {expected}")
    tree = trees[found]
    classes = {name.split("/")[0] for name in trees.get("train", ()) if "/" in name} or None

    def read_path(name: str) -> bytes:
        offset, length = members[tree[name]]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    files = _labelled(tree, classes, read_path, path, expected)
    places = [members[tree[name]] for name in files.paths]

    def read(index: int) -> bytes:
        offset, length = places[index]
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    return _source(
        info,
        split,
        size,
        files,
        name=lambda i: f"{path}/{tree[files.paths[i]]}",
        read=read,
        sizes=lambda: [length for _, length in places],
        stamp=lambda: repr(state),
    )


def split_names(info: DatasetInfo, split: str) -> tuple[str, ...]:
    """The names under which a split is found, best first."""
    return {"train": ("train",), "test": info.test_splits}[split]


def _tree(info: DatasetInfo) -> str:
    return _TREE.format(test=info.test_splits[0]) + (
        f" (instead of {info.test_splits[0]}/ also {'/ or '.join(info.test_splits[1:])}/)"
    )


class _Files(NamedTuple):
    """The images of a split in order: where each is, what identifies it, and its label."""

    paths: list[str]
    names: list[str]
    labels_N: np.ndarray
    classes: list[str]


def _source(
    info: DatasetInfo,
    split: str,
    size: int,
    files: _Files,
    *,
    name: Callable[[int], str],
    read: Callable[[int], bytes],
    sizes: Callable[[], list[int]],
    stamp: Callable[[], str],
) -> EncodedSource:
    def content() -> bytes:
        lines = (f"{name}\0{size}\n" for name, size in zip(files.names, sizes(), strict=True))
        return "".join(lines).encode("utf-8", "surrogateescape")

    return EncodedSource(
        info,
        split,
        size,
        count=len(files.paths),
        labels=lambda: files.labels_N,
        num_classes=len(files.classes),
        class_names=tuple(files.classes),
        read=read,
        name=name,
        content=content,
        stamp=stamp,
    )


def _folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]


def _walk(root: str, folder: str = "") -> list[str]:
    """Files at any depth below a folder, as paths relative to the root; hidden ones left out."""
    found = []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            below = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                found += _walk(root, below) if folder or not entry.name.startswith(".") else []
            else:
                found.append(below)
    return found


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
    paths: Iterable[str],
    train_classes: Iterable[str] | None,
    read: Callable[[str], bytes],
    root: str,
    expected: str,
) -> _Files:
    """The images among the files of a split, in ImageFolder's order, with labels.

    Args:
      paths: relative to the split.
      train_classes: the folders of the training split; None: there is none.
      read: the content of a file of the split.
      root, expected: for messages.
    """
    found = _classified(list(paths), read)
    classes = class_order(set(train_classes or (cls for cls, _ in found)))
    images: dict[str, list[tuple[str, ...]]] = {cls: [] for cls in classes}
    for cls, path in found:
        folder, _, file = path.rpartition("/")
        if file.startswith(".") or not file.lower().endswith(EXTENSIONS):
            continue
        if cls not in images:
            raise UserError(
                f"{root}/{cls} is a class that the training split does not have; {expected}"
            )
        images[cls].append((folder, file))
    if not classes:
        raise UserError(f"{root} has no class folders; {expected}")
    if empty := [cls for cls in classes if not images[cls]]:
        raise UserError(
            f"{root} has no image for {len(empty)} of {len(classes)} classes "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}); {expected}"
        )
    ordered = [(cls, *at) for cls in classes for at in sorted(images[cls])]
    paths = [f"{folder}/{file}" if folder else file for _, folder, file in ordered]
    names = [
        path if path.startswith(f"{cls}/") else f"{cls}/{file}"
        for path, (cls, _, file) in zip(paths, ordered, strict=True)
    ]
    counts = [len(images[cls]) for cls in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return _Files(paths, names, labels, classes)


def _classified(paths: list[str], read: Callable[[str], bytes]) -> list[tuple[str, str]]:
    """The class and path of each file of a split.

    The class is the first folder, but for two published sets whose validation images lie in one
    folder: Tiny ImageNet's has a table, and ImageNet's are numbered.
    """
    if _TINY_TABLE in paths:
        rows = (line.split("\t") for line in read(_TINY_TABLE).decode().splitlines())
        return [(row[1], f"images/{row[0]}") for row in rows if len(row) > 1]
    numbers = {path: int(match[1]) for path in paths if (match := _NUMBERED.fullmatch(path))}
    known = imagenet_validation_wnids()
    if numbers and max(numbers.values()) <= len(known):
        return [(known[number - 1], path) for path, number in numbers.items()]
    return [(path.split("/")[0], path) for path in paths if "/" in path]
