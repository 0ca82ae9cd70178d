"""Folders of images, one per class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from prism_jax.data.sets.base import Found, Stated
from prism_jax.data.sets.card import card
from prism_jax.data.sets.content import Content
from prism_jax.data.sources import EXTENSIONS, ImageSource

SPLITS = ("train", "val", "validation", "test")


def sniff(path: str) -> bool:
    """Whether there are folders with images in them."""
    return os.path.isdir(path) and bool(_tree(path)[1])


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """A folder of class folders, or one around them or around ``train``."""
    del stated, real
    root, folders, files = _tree(path)

    def read(index: int) -> bytes:
        with open(os.path.join(root, names[index]), "rb") as file:
            return file.read()

    names, labels = in_order(folders, files)
    return Found(
        "folder",
        tuple(folders),
        False,
        "class folders",
        labels,
        name=lambda i: os.path.join(root, names[i]),
        read=read,
        stamp=lambda i: f"{names[i]}\0{os.path.getsize(os.path.join(root, names[i]))}\n",
    )


def is_image(name: str) -> bool:
    """Whether a file is one of the set's images, by its name."""
    base = os.path.basename(name)
    return base.lower().endswith(EXTENSIONS) and not base.startswith(".")


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


def below(root: str, files: Iterable[str]) -> list[str]:
    """The files in folders below ``class_root``, as paths from there."""
    inside = [name.removeprefix(root) for name in files if name.startswith(root)]
    return [name for name in inside if "/" in name]


def _tree(path: str) -> tuple[str, list[str], list[str]]:
    """The folder of the class folders, those folders sorted, and their images relative to it."""
    files = []
    for folder, deeper, names in os.walk(path, followlinks=True):
        deeper[:] = sorted(name for name in deeper if not name.startswith("."))
        inside = os.path.relpath(folder, path).replace(os.sep, "/")
        if inside != ".":
            files += [f"{inside}/{name}" for name in names if is_image(name)]
    inner = class_root(files)
    files = below(inner, files)
    root = os.path.join(path, inner) if inner else path
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    return root, folders if files else [], files


def write_images(folder: str, content: Content) -> None:
    """One folder per class, in label order."""
    for i, image in enumerate(content.images_NHWC):
        path = os.path.join(folder, content.file_of(i))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(image))


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
