"""Folders of images, one per class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from prism_jax.data.sets.base import Found, Stated, called, tables_beside
from prism_jax.data.sets.card import card
from prism_jax.data.sets.content import Content
from prism_jax.data.sets.table import LABELS, TABLES
from prism_jax.data.sources import ImageSource, kinds
from prism_jax.data.sources.files import walk

SPLITS = ("train", "val", "validation", "test")


def sniff(path: str) -> bool:
    """Whether there are folders with images in them."""
    return os.path.isdir(path) and bool(_tree(path)[1])


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """A folder of class folders, or one around them or around ``train``."""
    del stated, real
    others = kinds.Others(list)
    root, folders, files = _tree(path, others)

    def read(index: int) -> bytes:
        with open(os.path.join(root, names[index]), "rb") as file:
            return file.read()

    names, labels = in_order(folders, files)
    classes, numbered = called(tuple(folders), False, tables_beside(root))
    return Found(
        "folder",
        classes,
        numbered,
        "class folders" + _unused_table(path),
        labels,
        name=lambda i: os.path.join(root, names[i]),
        read=read,
        stamp=lambda i: f"{names[i]}\0{os.path.getsize(os.path.join(root, names[i]))}\n",
        left_out=kinds.left_out(path, others),
    )


def images_of(
    files: Sequence[str], opened: Callable[[str], BinaryIO], others: kinds.Others
) -> tuple[str, list[str]]:
    """The folder of the class folders in a tree, as ``class_root`` has it, and their images in it.

    Files around the class folders are the format's own, but for images.

    Args:
      files: all of the tree; those whose names say that they are images tell the class folders.
      opened: opens one of them.
      others: receives what is no image of a class.
    """
    seen = [name for name in files if not kinds.hidden(name)]
    others[kinds.HIDDEN] += [name for name in files if kinds.hidden(name)]
    root = class_root([name for name in seen if kinds.is_named_as_one(name)])
    inside = [name.removeprefix(root) for name in seen if name.startswith(root)]
    classes = {n.split("/")[0] for n in inside if "/" in n and kinds.is_named_as_one(n)}
    of_classes = [name for name in inside if "/" in name and name.split("/")[0] in classes]
    stray = {root + name for name in of_classes}.symmetric_difference(seen)
    others["in no class folder"] += sorted(filter(kinds.is_named_as_one, stray))
    images = kinds.images_of(of_classes, lambda name: opened(root + name), others)
    for empty in [kind for kind, some in others.items() if not some]:
        del others[empty]
    return root, images


def in_order(folders: Sequence[str], files: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Images class by class, in the order of their names, and the positions of their classes."""
    at = {folder: i for i, folder in enumerate(folders)}
    ordered = sorted(files, key=lambda f: (at[f.split("/")[0]], *os.path.split(f)))
    return ordered, np.array([at[f.split("/")[0]] for f in ordered], np.int64)


def class_root(files: Iterable[str]) -> str:
    """The folder of the class folders, "" or one with a slash at its end, among a tree's images.

    One folder around all others is a wrapper, whatever lies beside them in it; of splits, ``train``
    is meant.
    """
    paths, root = [parts for f in files if len(parts := f.split("/")) > 1], ""
    while any(len(parts) > 2 for parts in paths):
        heads = {parts[0] for parts in paths}
        head = "train" if "train" in heads and heads <= set(SPLITS) else min(heads)
        if len(heads) > 1 and head != "train":
            break
        paths = [parts[1:] for parts in paths if parts[0] == head and len(parts) > 2]
        root += f"{head}/"
    return root


def _tree(path: str, others: kinds.Others | None = None) -> tuple[str, list[str], list[str]]:
    """The folder of the class folders, those folders sorted, and their images relative to it."""
    others = kinds.Others(list) if others is None else others
    inner, files = images_of(
        walk(path, others), lambda name: open(os.path.join(path, name), "rb"), others
    )
    root = os.path.join(path, inner) if inner else path
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not kinds.is_hidden(e.name))
    return root, folders if files else [], files


def _unused_table(path: str) -> str:
    """What to say of a table beside the folders that has no labels."""
    for name in TABLES:
        if os.path.isfile(os.path.join(path, name)):
            return f" (its {name} has no column {' or '.join(LABELS)})"
    return ""


def write_images(folder: str, content: Content) -> None:
    """One folder per class, in label order."""
    for i in range(len(content.images_NHWC)):
        path = os.path.join(folder, content.file_of(i))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(content.images_NHWC[i]))


def png(image_HWC: np.ndarray) -> bytes:
    """An image, grey or RGB, as a PNG file."""
    buffer = io.BytesIO()
    grey = image_HWC.shape[-1] == 1
    Image.fromarray(image_HWC[..., 0] if grey else image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


_READING = """    from datasets import load_dataset
    load_dataset("imagefolder", data_dir="DIR", split="train")

or `torchvision.datasets.ImageFolder("DIR/train")`. Sorted as text, the folders are in label order;
`classes.json` has their names."""


def write(folder: str, content: Content) -> None:
    """``train/<class>/<slot>.png`` and a data card; weights, where there are any, in a table."""
    train = os.path.join(folder, "train")
    write_images(train, content)
    if content.weights_N is not None:
        rows = [
            {"file_name": content.file_of(i), "label": int(label), "weight": float(weight)}
            for i, (label, weight) in enumerate(
                zip(content.labels_N, content.weights_N, strict=True)
            )
        ]
        with open(os.path.join(train, "metadata.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(card(content, _READING))
