"""One .npz file: ``images`` and ``labels``; what ``tools.export`` writes comes back exactly."""

from __future__ import annotations

import os
import zipfile
import zlib
from typing import Any

import numpy as np

from prism_jax.data import workdir
from prism_jax.data.sets.base import (
    Found,
    Stated,
    by_position,
    checked_soft,
    checked_weights,
    pixel_stamp,
)
from prism_jax.data.sets.content import Content
from prism_jax.data.sets.floats import to_pixels
from prism_jax.data.sources import ImageSource
from prism_jax.data.sources.arrays import as_text
from prism_jax.errors import UserError

NAME = "set.npz"
_NEEDED = (
    "a set in .npz has the arrays images (uint8, N x H x W x C) and labels (N integers); optional "
    "are class_names, soft_labels (N x K) and weights (N)"
)


def sniff(path: str) -> bool:
    """Whether it is an .npz file, or a folder with the one that ``tools.export`` writes."""
    return os.path.isfile(_file(path)) and _file(path).endswith(".npz")


def arrays_of(path: str) -> set[str]:
    """Names of the arrays in the file; none where it cannot be read."""
    try:
        with zipfile.ZipFile(_file(path)) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return set()


def _file(path: str) -> str:
    return os.path.join(path, NAME) if os.path.isdir(path) else path


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """The arrays of the file."""
    path = _file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        names = as_text(arrays["class_names"]) if "class_names" in arrays else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); {_NEEDED}") from error
    if missing := {"images", "labels"} - arrays.keys():
        raise UserError(f"{path} has no {' and no '.join(sorted(missing))}; {_NEEDED}")
    pixels, labels = to_pixels(path, arrays["images"], stated, real), arrays["labels"]
    if labels.shape == (len(pixels), 1):
        labels = labels[:, 0]
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{path}: labels have dtype {labels.dtype} and shape {labels.shape}, for "
            f"{len(pixels)} images; {_NEEDED}"
        )
    classes, numbered, labels_N = by_position(labels.tolist())
    if names is not None:
        classes, labels_N = names, labels.astype(np.int64)
        if labels_N.min() < 0 or labels_N.max() >= len(classes):
            raise UserError(
                f"{path}: labels run from {labels_N.min()} to {labels_N.max()}, and it names "
                f"{len(classes)} classes"
            )
    return Found(
        "npz",
        classes,
        numbered,
        "classes",
        labels_N,
        name=lambda i: f"{path}, image {i}",
        read=lambda i: pixels[i],
        stamp=lambda i: pixel_stamp(pixels[i]),
        soft_NK=checked_soft(path, arrays.get("soft_labels"), len(pixels), len(classes)),
        weights_N=checked_weights(path, arrays.get("weights"), len(pixels)),
    )


def write(folder: str, content: Content) -> None:
    """``set.npz`` alone."""
    os.makedirs(folder, exist_ok=True)
    arrays: dict[str, Any] = {"images": content.images_NHWC[:], "labels": content.labels_N}
    if content.soft_NK is not None:
        arrays["soft_labels"] = content.soft_NK
    if content.weights_N is not None:
        arrays["weights"] = content.weights_N
    arrays["class_names"] = np.array([entry["name"] for entry in content.classes])
    arrays["provenance"] = np.array(workdir.to_json(content.provenance))
    with open(os.path.join(folder, NAME), "wb") as file:
        np.savez(file, **arrays)
