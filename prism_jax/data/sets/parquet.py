"""Hugging Face's parquet files, or the Arrow files of ``save_to_disk``: a column of images (bytes,
or a path), one of labels.

The names of the classes are in the schema's metadata, as ``datasets`` writes them.
"""

from __future__ import annotations

import hashlib
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
    checked_soft,
    checked_weights,
    inside,
    needed,
)
from prism_jax.data.sets.card import card
from prism_jax.data.sets.content import Content
from prism_jax.data.sets.folder import png
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

IMAGES, LABELS = ("image", "img", "images"), ("label", "labels", "fine_label", "class", "cls")
_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})(?:-[0-9a-f]+)?\.parquet")
_FIELDS = """configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*"""
_READING = """    from datasets import load_dataset
    load_dataset("DIR", split="train")

`image`, `label` with the names of the classes, and `soft_label`, one mean label per image, where
there is one."""
# Images in a row group, as `datasets` advises: one of more than 2 GiB cannot be read back, and a
# reader of some rows reads the whole groups that they are in.
_GROUP = 100
_OTHER_SPLITS = ("val", "validation", "valid", "dev", "test")


def sniff(path: str) -> bool:
    """Whether it is a parquet file, a folder with some, or what ``save_to_disk`` wrote."""
    if os.path.isfile(path):
        return path.lower().endswith(".parquet")
    return bool(_files(path) or _saved(path))


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """All shards of the training split, in their order."""
    del stated, real
    if os.path.isfile(path):
        files = [path]
    else:
        files = _saved(path) or _whole(path, _files(path))
    pq = needed("pyarrow.parquet", "reading parquet files")
    pa = needed("pyarrow", "reading parquet files")
    try:
        tables = [
            pa.ipc.open_stream(pa.OSFile(file)).read_all()
            if file.endswith(".arrow")
            else pq.read_table(file)
            for file in files
        ]
        table = pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if files[0].endswith(".arrow") else "parquet"
        raise UserError(f"{path} cannot be read as {kind} ({error}); fetch it again") from error
    if not table.num_rows:
        raise UserError(f"{path} has no rows, which are its images; fetch it again")
    features = _features(table.schema)
    image = _column(path, table, IMAGES, "images")
    label = _column(path, table, LABELS, "labels")
    values = table[label].combine_chunks()
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    labels = values.to_pylist()
    if None in labels:
        raise UserError(f"{path}: row {labels.index(None)} has no {label}")
    if not all(isinstance(x, (int, str)) for x in labels):
        raise UserError(f"{path}: {label} is of type {values.type}; it must be integers or text")
    classes, numbered, labels_N = by_position(labels)
    names = (features.get(label) or {}).get("names")
    if names and numbered:
        if max(labels) >= len(names) or min(labels) < 0:
            raise UserError(
                f"{path}: {label} runs from {min(labels)} to {max(labels)}, and its schema names "
                f"{len(names)} classes"
            )
        classes, labels_N = tuple(map(str, names)), np.array(labels, np.int64)
    rows = _rows(table, image, [t.num_rows for t in tables], files)
    known = table.column_names

    def each(names: Sequence[str]) -> list[Any] | None:
        found = next((name for name in names if name in known), None)
        return None if found is None else table[found].to_pylist()

    return Found(
        "parquet",
        classes,
        numbered,
        "classes",
        labels_N,
        name=lambda i: f"{path}, row {i}",
        read=rows,
        stamp=lambda i: _stamp(rows(i)),
        soft_NK=checked_soft(path, each(SOFT), len(labels), len(classes)),
        weights_N=checked_weights(path, each(WEIGHTS), len(labels)),
    )


def write(folder: str, content: Content) -> None:
    """One file, ``data/train-00000-of-00001.parquet``, as ``Dataset.to_parquet`` lays it out."""
    pa = needed("pyarrow", "writing parquet files")
    pq = needed("pyarrow.parquet", "writing parquet files")
    names = [entry["name"] for entry in content.classes]
    encoded = [png(content.images_NHWC[i]) for i in range(len(content.images_NHWC))]
    paths = [content.file_of(i).replace("/", "_") for i in range(len(encoded))]
    rows = [{"bytes": b, "path": p} for b, p in zip(encoded, paths, strict=True)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.chunked_array(
            [pa.array(rows[at : at + _GROUP], kind) for at in range(0, len(rows), _GROUP)], kind
        ),
        "label": pa.array(content.labels_N.astype(np.int64)),
    }
    features: dict[str, Any] = {
        "image": {"_type": "Image"},
        "label": {"names": names, "_type": "ClassLabel"},
    }
    if content.soft_NK is not None:
        columns["soft_label"] = pa.array(list(content.soft_NK), pa.list_(pa.float32()))
        number = {"dtype": "float32", "_type": "Value"}
        features["soft_label"] = {"feature": number, "_type": "Sequence"}
    if content.weights_N is not None:
        columns["weight"] = pa.array(content.weights_N.astype(np.float32))
        features["weight"] = {"dtype": "float32", "_type": "Value"}
    table = pa.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    os.makedirs(os.path.join(folder, "data"))
    file = os.path.join(folder, "data", "train-00000-of-00001.parquet")
    pq.write_table(table, file, row_group_size=_GROUP)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as readme:
        readme.write(card(content, _READING, fields=_FIELDS))


def _files(path: str) -> list[str]:
    """The parquet files of the training split below a folder, sorted."""
    for root in (path, os.path.join(path, "data")):
        if os.path.isdir(root):
            names = sorted(n for n in os.listdir(root) if n.lower().endswith(".parquet"))
            names = [n for n in names if n != "metadata.parquet"]
            words = {n: set(re.split(r"[-_.]", n.lower())[:-1]) for n in names}
            train = [n for n in names if "train" in words[n]]
            rest = [n for n in names if words[n].isdisjoint(_OTHER_SPLITS)]
            if names:
                return [os.path.join(root, name) for name in train or rest]
    return []


def _saved(path: str) -> list[str]:
    """The Arrow files that ``datasets``' ``save_to_disk`` wrote, of a set or of its ``train``."""
    for root in (path, os.path.join(path, "train")):
        try:
            with open(os.path.join(root, "state.json"), encoding="utf-8") as file:
                parts = json.load(file)["_data_files"]
            return [os.path.join(root, part["filename"]) for part in parts]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return []


def _whole(path: str, files: list[str]) -> list[str]:
    """The files, if no shard of them is missing.

    Raises:
      UserError: one is, or there are several sets of shards.
    """
    shards = [_SHARD.fullmatch(os.path.basename(file)) for file in files]
    groups = {(match[1], match[3]) for match in shards if match}
    if len(groups) > 1 or (groups and None in shards):
        raise UserError(
            f"{path} holds several sets ({', '.join(sorted(g[0] for g in groups))}); move the "
            "files of one of them to a folder of their own"
        )
    plain = {re.split("[-_.0-9]", os.path.basename(file))[0] for file in files}
    if len(plain) > 1 and not groups:
        raise UserError(
            f"{path} holds several sets ({', '.join(sorted(plain))}); name the file of one of them"
        )
    for stem, of in groups:
        there = {int(match[2]) for match in shards if match}
        if missing := sorted(set(range(int(of))) - there):
            raise UserError(f"{path}: {stem}-{missing[0]:05d}-of-{of}.parquet is missing; fetch it")
    return files


def _features(schema: Any) -> dict[str, Any]:
    """What ``datasets`` says of each column; nothing where it did not write the file."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _column(path: str, table: Any, names: Sequence[str], what: str) -> str:
    found = [name for name in names if name in table.column_names]
    if not found:
        raise UserError(
            f"{path} has the columns {', '.join(table.column_names)}, and none that is called "
            f"{' or '.join(names)} for its {what}; rename it"
        )
    return found[0]


def _rows(table: Any, image: str, counts: list[int], files: list[str]):
    """Reads the image of a row: its bytes, or the file that its path names."""
    column = table[image]
    ends = np.cumsum(counts)

    def read(index: int) -> bytes:
        cell = column[index].as_py()
        if not isinstance(cell, dict):
            cell = {"path" if isinstance(cell, str) else "bytes": cell}
        data, name = cell.get("bytes"), cell.get("path")
        if isinstance(data, bytes):
            return data
        if data is not None:
            raise OSError(
                f"its {image} is a {type(data).__name__}, not the bytes of an encoded image; cast "
                "the column to datasets.Image()"
            )
        root = os.path.dirname(os.path.abspath(files[int(np.searchsorted(ends, index, "right"))]))
        if not name:
            raise OSError(f"its {image} is neither bytes nor a path")
        with open(inside(root, name), "rb") as file:
            return file.read()

    return read


def _stamp(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()}\n"
