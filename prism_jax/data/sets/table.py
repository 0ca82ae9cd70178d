"""A folder of images with a table beside them: Hugging Face's ``metadata.csv`` or ``.jsonl``."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from prism_jax.data.sets.base import (
    SOFT,
    WEIGHTS,
    Found,
    Stated,
    by_position,
    called,
    checked_soft,
    checked_weights,
    inside,
    tables_beside,
)
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

TABLES = ("metadata.csv", "metadata.jsonl")
_WHOLE = re.compile(r"^(0|[1-9][0-9]*)\.0*$")  # 10.0, as pandas writes 10 where some are not there
FILE, LABELS = "file_name", ("label", "labels", "class", "class_name")


def sniff(path: str) -> bool:
    """Whether there is a table that says the labels; one of captions alone says none.

    A damaged one counts where it speaks of files: it is refused when it is opened.
    """
    return any(map(_has_labels, _files(path)))


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """The images that the tables name, in their order."""
    del stated, real
    files, rows = [], []
    for file in _files(path):
        for row in _read(file):
            files.append(inside(os.path.dirname(file), str(row[FILE])))
            rows.append(row)
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise UserError(
            f"{path}: its tables ({', '.join(TABLES)}) name {twice} more than once; leave one "
            f"table, with a row for each image"
        )
    label = column(rows, LABELS)
    assert label is not None  # sniff has seen it
    for file, row in zip(files, rows, strict=True):
        if row.get(label) in (None, ""):
            raise UserError(f"{path}: its table gives {file} no {label}")
    classes, numbered, labels = by_position(_numbers([row[label] for row in rows]))

    if numbered:
        classes, _ = called(classes, numbered, tables_beside(os.path.dirname(_files(path)[0])))

    def read(index: int) -> bytes:
        with open(files[index], "rb") as file:
            return file.read()

    def each(names: tuple[str, ...]) -> list[Any] | None:
        found = column(rows, names)
        return None if found is None else [_value(row.get(found)) for row in rows]

    return Found(
        "table",
        classes,
        numbered,
        "classes",
        labels,
        name=lambda i: files[i],
        read=read,
        stamp=lambda i: f"{os.path.relpath(files[i], path)}\0{os.path.getsize(files[i])}\n",
        soft_NK=checked_soft(path, each(SOFT), len(files), len(classes)),
        weights_N=checked_weights(path, each(WEIGHTS), len(files)),
    )


def column(rows: Any, names: tuple[str, ...]) -> str | None:
    """The first of these columns that the rows have."""
    have = set().union(*(row.keys() for row in rows))
    return next((name for name in names if name in have), None)


def _files(path: str) -> list[str]:
    """The tables of a folder itself, or of ``train`` in it."""
    for root in (path, os.path.join(path, "train")):
        found = [os.path.join(root, name) for name in TABLES]
        if there := [file for file in found if os.path.isfile(file)]:
            return there
    return []


def _has_labels(file: str) -> bool:
    try:
        return column(_read(file), LABELS) is not None
    except UserError:
        return True


def _read(file: str) -> list[dict[str, Any]]:
    """The rows of a table of images; none of a table of something else.

    Raises:
      UserError: it is damaged, or names files in some rows alone.
    """
    with open(file, "rb") as opened:
        data = opened.read()
    if FILE.encode() not in data:
        return []
    try:
        text = data.decode("utf-8-sig")
        if file.endswith(".csv"):
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:  # text in JSON may hold what else ends a line in Unicode
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        named = [isinstance(row, dict) and bool(row.get(FILE)) for row in rows]
        if any(named) and not all(named):
            raise ValueError(f"a row without {FILE}")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{file} is no table of images ({error}); repair or fetch it") from error
    return rows if any(named) else []


def _numbers(labels: Sequence[Any]) -> list[int | str]:
    """Labels as numbers where they are: a table of text has no other way to say it."""
    found = [_number(label) for label in labels]
    wholes = [_number(_WHOLE.sub(r"\1", str(label))) for label in labels]
    return wholes if all(isinstance(label, int) for label in wholes) else found


def _number(label: Any) -> int | str:
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return int(label)
    text = str(label)
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else text


def _value(cell: Any) -> Any:
    """A number or a list of numbers; a CSV file writes it as text."""
    if isinstance(cell, str):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell
