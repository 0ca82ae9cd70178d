"""Small images, encoded, and trees of them."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tree(
    root: pathlib.Path, splits=("train", "val"), classes=("n01", "n02"), suffix: str = ".png"
) -> pathlib.Path:
    """Three images of 8 pixels per class and split; the k-th of all has the pixels of seed k."""
    for number, (split, cls, i) in enumerate(
        (s, c, i) for s in splits for c in classes for i in range(3)
    ):
        path = root / split / cls / f"img_{i}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random_pixels(8, 8, 3, seed=number)))
    return root


def write_tar(folder: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname="set")
    return path
