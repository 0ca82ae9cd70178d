"""Distilled sets as people publish them, told by looking at what is there."""

from __future__ import annotations

import os
from types import ModuleType

from prism_jax.data.sets import archive, folder, npz, parquet, table, tensors
from prism_jax.data.sets.base import Found, Stated
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

# Each module has sniff(path) and open_set(path, stated, real).
FORMATS: dict[str, ModuleType] = {
    "npz": npz,
    "parquet": parquet,
    "archive": archive,
    "tensors": tensors,
    "table": table,
    "folder": folder,
}

KINDS = (
    "a folder with one folder of images per class, such a tree in a .tar or .zip file, Hugging "
    "Face's parquet files or images with metadata.csv or metadata.jsonl, DD-Ranking's images.pt "
    "and labels.pt, the .pt files of MTT and DATM, or an .npz file"
)


def existing(path: str) -> str:
    """The path of a set.

    Raises:
      UserError: there is nothing.
    """
    if not os.path.exists(path):
        raise UserError(
            f"there is no folder {path}, nor a file of that name; recover.initialise_from takes "
            f"{KINDS}"
        )
    return path


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """Open a set of whatever format it is.

    Args:
      path: a file or folder.
      stated: what its files do not say.
      real: all real training images, of which a whitening is undone.

    Raises:
      UserError: there is nothing, nothing that is a set, or several sets.
    """
    looks = [name for name, module in FORMATS.items() if module.sniff(existing(path))]
    if "table" in looks and "folder" in looks:
        looks.remove("folder")  # the table is about the images of the folder
    note: tuple[str, ...] = ()
    if "npz" in looks and "folder" in looks:
        # tools.export writes the same images beside their folders, and weights there alone.
        held = npz.arrays_of(path)
        looks.remove("folder" if "weights" in held else "npz")
        if "npz" not in looks and "soft_labels" in held:
            note = (f"the class folders are read; soft labels are in {npz.NAME}: name that file",)
    if len(looks) > 1:
        raise UserError(
            f"{path} can be read in several ways ({', '.join(looks)}); name the very file or the "
            "folder of the one that is meant"
        )
    if not looks:
        raise UserError(f"{path} is no set that can be read; recover.initialise_from takes {KINDS}")
    found = FORMATS[looks[0]].open_set(path, stated, real)
    return found._replace(notes=(*found.notes, *note))
