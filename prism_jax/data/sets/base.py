"""What every format of published sets gives: images, whose numbering of the classes, and extras."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from prism_jax.errors import UserError

# What columns of tables are called that say more than the class.
WEIGHTS, SOFT = ("weight", "weights"), ("soft_label", "soft_labels")
# What ``tools.export`` writes beside folders and tensors: folder, index and name of every class.
CLASS_TABLE = "classes.json"


class Stated(NamedTuple):
    """What a person says of a set because its files do not.

    Attributes:
      mean, std: of float images, one number per channel: pixel / 255 = value * std + mean.
      whitening: "none", or "zca": the images are whitened as MTT's and DATM's.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    whitening: str | None = None


NOTHING_STATED = Stated()


class Found(NamedTuple):
    """A set as its files have it.

    Attributes:
      format: a key of ``FORMATS``.
      classes: names in the set's own order; what it numbers only is called by its numbers.
      numbered: whether the set states that order, by numbers in its files; else it is the order
        of the sorted names.
      unit: what messages call a class.
      labels_N: positions in ``classes``.
      name: what messages call the image at a position.
      read: the image at a position: an encoded file, or pixels uint8 (H, W, C).
      stamp: what identifies the image at a position, in one line.
      soft_NK: float32 logits over ``classes``, one label per image; None: there are none.
      weights_N: float32, how much each image counts; None: they count alike.
      notes: what a person should know of how the files were read.
      left_out: files in it that are no images of a class.
    """

    format: str
    classes: tuple[str, ...]
    numbered: bool
    unit: str
    labels_N: np.ndarray
    name: Callable[[int], str]
    read: Callable[[int], bytes | np.ndarray]
    stamp: Callable[[int], str]
    soft_NK: np.ndarray | None = None
    weights_N: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    left_out: int = 0


def by_position(labels: Sequence[int | str]) -> tuple[tuple[str, ...], bool, np.ndarray]:
    """Classes, whether they are numbered, and positions among them, of labels without a table."""
    if all(isinstance(label, (int, np.integer)) for label in labels):
        numbers = sorted(set(map(int, labels)))
        place = {number: i for i, number in enumerate(numbers)}
        classes = tuple(map(str, numbers))
        return classes, True, np.array([place[int(label)] for label in labels], np.int64)
    names = sorted(set(map(str, labels)))
    at = {name: i for i, name in enumerate(names)}
    return tuple(names), False, np.array([at[str(label)] for label in labels], np.int64)


def called(
    classes: tuple[str, ...], numbered: bool, tables: Iterable[bytes]
) -> tuple[tuple[str, ...], bool]:
    """Classes that are numbers, by the names in the first table that ``tools.export`` wrote.

    Args:
      classes, numbered: see ``Found``.
      tables: contents of files called ``CLASS_TABLE``; others' are passed over, and so are those
        of other classes or of names that several have.

    Returns:
      Names in the order of the numbers, which then are stated; else what was given.
    """
    for table in tables:
        try:
            rows = {int(row["folder"]): (row["index"], row["name"]) for row in json.loads(table)}
            numbers = [int(name) for name in classes]
            names = {number: rows[number][1] for number in numbers}
        except (ValueError, KeyError, TypeError):  # also of folders called by WordNet IDs
            continue
        own = numbers == sorted(numbers) and all(index == at for at, (index, _) in rows.items())
        texts = {name for name in names.values() if isinstance(name, str)}
        whole = numbered or len(rows) == len(classes)
        if own and whole and len(texts) == len(names) == len(classes):
            return tuple(names[number] for number in numbers), True
    return classes, numbered


def tables_beside(folder: str) -> Iterable[bytes]:
    """The tables of classes in a folder and in the one around it."""
    for root in (folder, os.path.dirname(os.path.abspath(folder))):
        try:
            with open(os.path.join(root, CLASS_TABLE), "rb") as file:
                yield file.read()
        except OSError:
            continue


def pixel_stamp(image_HWC: np.ndarray) -> str:
    """A line that identifies an image by its pixels."""
    return f"{image_HWC.shape} {hashlib.sha256(image_HWC.tobytes()).hexdigest()}\n"


def checked_weights(path: str, weights: object, count: int) -> np.ndarray | None:
    """Weights per image as float32, or None where there are none.

    Raises:
      UserError: they are not one number per image, not finite, negative, or all zero.
    """
    if weights is None:
        return None
    try:
        found = np.asarray(weights, np.float32).reshape(-1)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its weights are no numbers ({error})") from error
    sound = found.shape == (count,) and np.isfinite(found).all()
    if not sound or found.min() < 0 or not found.any():
        raise UserError(
            f"{path}: its weights must be one number per image ({count}), finite, not negative and "
            f"not all zero; there are {len(found)}"
        )
    return found


ROUNDED = 0.05  # by how much a row of probabilities may be off, where they are rounded


def checked_soft(path: str, soft: object, count: int, classes: int) -> np.ndarray | None:
    """Labels of one number per class, as logits: probabilities become their logarithms.

    Probabilities may be rounded, or cut to the largest: what their sum lacks is given to all of
    a row in proportion.

    Raises:
      UserError: another shape, numbers that are not finite, or such as are neither of the two.
    """
    if soft is None:
        return None
    try:
        values = np.asarray(soft, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its soft labels are no table of numbers ({error})") from error
    if values.shape != (count, classes) or not np.isfinite(values).all():
        raise UserError(
            f"{path}: its soft labels have shape {values.shape}; they must be finite numbers of "
            f"shape ({count}, {classes}), one row per image and one column per class"
        )
    if values.min() < 0 or values.max() > 1 + ROUNDED:
        return values
    sums = values.sum(1, keepdims=True, dtype=np.float64)
    if np.all((sums >= 0.5) & (sums <= 1 + ROUNDED)):
        exact = np.allclose(sums, 1.0, atol=1e-3)
        probabilities = values if exact else (values / sums).astype(np.float32)
        return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    raise UserError(
        f"{path}: its soft labels are all from 0 to 1, as probabilities are, and a row sums to "
        f"{sums.min():.3g} to {sums.max():.3g}, as probabilities do not (nor do logits look like "
        f"that); give logits, or probabilities of which at least half is kept"
    )


def needed(module: str, purpose: str, *, extra: str = "exchange") -> ModuleType:
    """A library that is no dependency of the package.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"{purpose} needs {package}, which is not installed: pip install {package}, or "
            f"pip install 'prism-jax[{extra}]'"
        ) from error


def inside(root: str, name: str) -> str:
    """A path that a set's own table names, below the folder of the table.

    Raises:
      UserError: it leads out of that folder.
    """
    path = os.path.normpath(os.path.join(root, name))
    if os.path.isabs(name) or not path.startswith(os.path.normpath(root) + os.sep):
        raise UserError(
            f"{root}: its table names {name}, which is not inside the folder; copy the images into "
            f"the folder and name them from there, or store their bytes in the table"
        )
    return path
