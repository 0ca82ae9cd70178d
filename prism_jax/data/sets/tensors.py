"""Tensors of PyTorch: DD-Ranking's three files, and what MTT, DATM, DC, DSA and DM save.

images.pt, labels.pt, lr.pt              DD-Ranking
images_best.pt, labels_best.pt           MTT, DATM; also images_<iteration>.pt
res_*.pt                                 DC, DSA, DM: {"data": [[images, labels], ...]}
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from prism_jax.data.sets import torch_file
from prism_jax.data.sets.base import (
    Found,
    Stated,
    by_position,
    called,
    checked_soft,
    checked_weights,
    pixel_stamp,
    tables_beside,
)
from prism_jax.data.sets.columns import least_agreement
from prism_jax.data.sets.floats import MEAN, STD, WHITENING, to_pixels
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

IMAGES = ("images.pt", "images_best.pt")
_RATES = ("lr.pt", "syn_lr.pt", "lr_best.pt", "syn_lr_best.pt")


def sniff(path: str) -> bool:
    """Whether it is a file of tensors, or a folder with the images of a method."""
    if os.path.isfile(path):
        return path.endswith((".pt", ".pth"))
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, n)) for n in IMAGES)


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """Images, labels (hard, or one soft label per image) and the learning rate beside them."""
    file = path if os.path.isfile(path) else _one_of(path)
    value, labels = torch_file.load(file), None
    images = _pair(value)
    if isinstance(images, tuple):
        images, labels = images
    folder, name = os.path.split(file)
    beside = os.path.join(folder, re.sub("^images(_zca)?", "labels", name))
    if labels is None and beside != file and os.path.isfile(beside):
        labels = torch_file.load(beside)
    if not isinstance(images, np.ndarray):
        raise UserError(f"{file} holds no tensor of images")
    found, notes = _described(folder)
    stated = Stated(stated.mean or found.mean, stated.std or found.std, stated.whitening)
    whitening = stated.whitening or found.whitening
    if images.dtype != np.uint8 and whitening is None and _may_be_whitened(file):
        raise UserError(
            f"{file} is named as MTT and DATM name their images, which are whitened where they "
            f"were made with --zca, and the file does not say. State\n"
            f"  --config.{WHITENING}=zca    they are: pixels are found from the real images\n"
            f"  --config.{WHITENING}=none   they are not; with --config.{MEAN}=... and {STD}"
        )
    pixels = to_pixels(file, images, stated._replace(whitening=whitening), real)
    classes, numbered, labels_N, soft, more = _labels(file, labels, len(pixels), real.num_classes)
    classes, numbered = called(classes, numbered, tables_beside(folder))
    weights = os.path.join(folder, "weights.pt")
    return Found(
        "tensors",
        classes,
        numbered,
        "classes",
        labels_N,
        name=lambda i: f"{file}, image {i}",
        read=lambda i: pixels[i],
        stamp=lambda i: pixel_stamp(pixels[i]),
        soft_NK=soft,
        weights_N=checked_weights(
            weights, torch_file.load(weights) if os.path.isfile(weights) else None, len(pixels)
        ),
        notes=(*notes, *more, *_rate(folder)),
    )


def _one_of(path: str) -> str:
    there = [name for name in IMAGES if os.path.isfile(os.path.join(path, name))]
    if len(there) > 1:
        raise UserError(
            f"{path} holds {' and '.join(there)}; name the one that is meant: "
            f"recover.initialise_from={os.path.join(path, there[0])}"
        )
    return os.path.join(path, there[0])


def _pair(value: Any) -> Any:
    """(images, labels), or images alone, of what methods save in one file."""
    match value:
        case {"data": [*_, [images, labels]]}:  # DC, DSA and DM: of the last experiment
            return images, labels
        case {"images": images, "labels": labels} | {"image": images, "label": labels}:
            return images, labels
        case [np.ndarray() as images, np.ndarray() as labels]:
            return images, labels
    return value


def _may_be_whitened(file: str) -> bool:
    name = os.path.basename(file)
    return re.fullmatch(r"images_(best|[0-9]+)\.pt", name) is not None


def _labels(
    file: str, labels: Any, count: int, num_classes: int
) -> tuple[tuple[str, ...], bool, np.ndarray, np.ndarray | None, list[str]]:
    """Classes, that they are numbered, hard labels, soft labels, and what to say of them."""
    numbers = tuple(map(str, range(num_classes)))
    in_turn = np.repeat(np.arange(num_classes), count // num_classes)
    if labels is None:
        if count % num_classes:
            raise UserError(
                f"{file} has {count} images and no labels beside it, and {num_classes} classes "
                "cannot have equally many of them; add labels.pt"
            )
        note = f"{file} has no labels beside it: class after class, as DD-Ranking takes them"
        return numbers, True, in_turn, None, [note]
    if not isinstance(labels, np.ndarray) or labels.shape[:1] != (count,):
        raise UserError(
            f"the labels of {file} have shape {getattr(labels, 'shape', None)}, and it has {count} "
            "images"
        )
    if labels.ndim == 1 and (np.issubdtype(labels.dtype, np.integer) or (labels % 1 == 0).all()):
        return *by_position(labels.astype(np.int64).tolist()), None, []
    soft = checked_soft(file, labels, count, num_classes)
    assert soft is not None  # there are labels
    largest = soft.argmax(1)
    if count % num_classes:
        note = "its hard labels are the largest of the soft ones"
        return numbers, True, largest, soft, [note]
    share = float((largest == in_turn).mean())
    said = f"which the soft labels say of {share:.0%} of them ({1 / num_classes:.1%} is chance)"
    if share >= least_agreement(num_classes, count):
        return numbers, True, in_turn, soft, [f"its images stand class after class, {said}"]
    if (np.bincount(largest) == count // num_classes).all():
        note = (
            f"its images do not stand class after class, {said}; its hard labels are the largest "
            "of the soft ones, as many of each class"
        )
        return numbers, True, largest, soft, [note]
    raise UserError(
        f"{file}: which image is of which class is not known. They do not stand class after class, "
        f"{said}, and the largest soft labels are not as many of each class. Sort images and "
        "labels by class, or save the classes as labels, integers in place of soft ones"
    )


def _described(folder: str) -> tuple[Stated, list[str]]:
    """The space of the images as a DD-Ranking config beside them says it."""
    files = [n for n in os.listdir(folder or ".") if n.endswith((".yaml", ".yml"))]
    if len(files) != 1:
        return Stated(), []
    path = os.path.join(folder, files[0])
    try:
        import yaml
    except ImportError:
        return Stated(), [f"{path} is not read: pip install pyyaml"]
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
        steps = [*(config.get("custom_val_trans") or ()), *(config.get("custom_train_trans") or ())]
        given = next((s["args"] for s in steps if s.get("name") == "Normalize"), None)
        whitening = {True: "zca", False: "none"}.get(config.get("use_zca"))
        mean, std = (tuple(map(float, given[n])) if given else None for n in ("mean", "std"))
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError):
        return Stated(), []
    if mean is None and whitening is None:
        return Stated(), []
    return Stated(mean, std, whitening), [
        f"{path} says mean {mean}, deviation {std}, whitening {whitening or 'not stated'}"
    ]


def _rate(folder: str) -> list[str]:
    for name in _RATES:
        file = os.path.join(folder, name)
        if os.path.isfile(file):
            rate = np.asarray(torch_file.load(file)).reshape(-1)
            if rate.size == 1:
                return [
                    f"{file} says that students learn at a rate of {float(rate[0]):.4g}; "
                    "validate.learning_rate is what is used"
                ]
    return []
