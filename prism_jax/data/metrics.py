"""Metrics as JSON lines: one line per step, cut back when a run resumes.

On a file system a line is flushed at once. A process may die between any two bytes. A last line
without its newline was never written: it is not read, and the next writer removes it. Each line
ends with the CRC-32 of the rest of it, ``"crc"``, so that other bytes are never read as numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax.data import workdir
from prism_jax.errors import UserError

NOT_FINITE = "not_finite"
CRC = "crc"
SECONDS_BETWEEN_UPLOADS = 30.0

_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"}$')


class MetricsWriter:
    """Appends lines to a metrics file; opens nothing before the first one.

    Args:
      path: the file; its folder is made when needed. In an object store, lines wait up to
        ``SECONDS_BETWEEN_UPLOADS`` unless ``flush`` is called: before every checkpoint.
      tensorboard_dir: also write the numbers as TensorBoard events into this folder, where the
        package tensorboardX is installed; not in an object store.
    """

    def __init__(self, path: epath.PathLike, tensorboard_dir: epath.PathLike | None = None):
        self._path = epath.Path(path)
        self._store = workdir.is_store(path)
        self._tensorboard_dir = None if self._store else tensorboard_dir
        self._uploaded = 0.0
        self._waiting = b""
        self._file: Any = None
        self._events: Any = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def write(self, step: int, **values: Any) -> None:
        """Append one line.

        Args:
          step: where in the work the values belong.
          **values: numbers, strings, None, arrays, and lists and dicts of these. A number that
            is not finite is written as null, and named under "not_finite".
        """
        not_finite: dict[str, str] = {}
        line = {"step": int(step), **_plain(values, "", not_finite)}
        if not_finite:
            line[NOT_FINITE] = not_finite
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        self._append(f'{text[:-1]}, "{CRC}": "{zlib.crc32(text.encode()):08x}"}}\n')
        self._write_events(int(step), workdir.flatten(line))

    def flush(self) -> None:
        """Let other hosts see all lines: upload those that wait, close a file.

        On a disk that hosts share by NFS, others are sure to see what is in a closed file.
        """
        if self._waiting:
            old = self._path.read_bytes() if self._path.exists() else b""
            workdir.write_bytes(self._path, old[: old.rfind(b"\n") + 1] + self._waiting)
            self._waiting, self._uploaded = b"", time.monotonic()
        if self._file:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Close the files that were opened."""
        self.flush()
        if self._events:
            self._events.close()
            self._events = None

    def _append(self, text: str) -> None:
        if self._store:  # which cannot append: the whole is uploaded, so not for every line
            self._waiting += text.encode()
            if time.monotonic() - self._uploaded >= SECONDS_BETWEEN_UPLOADS:
                self.flush()
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            truncate(self._path, lambda line: True)
            self._file = self._path.open("a", encoding="utf-8")
        with workdir.naming(self._path):
            self._file.write(text)
            self._file.flush()

    def _write_events(self, step: int, numbers: dict[str, Any]) -> None:
        if self._tensorboard_dir is None:
            return
        if self._events is None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self._tensorboard_dir = None
                return
            # What an interrupted run wrote from this step on is hidden.
            self._events = SummaryWriter(os.fspath(self._tensorboard_dir), purge_step=step)
        for name, value in numbers.items():
            if isinstance(value, (int, float)) and name != "step":
                self._events.add_scalar(name.replace(".", "/"), value, step)
        self._events.flush()


def read_lines(path: epath.PathLike) -> list[dict[str, Any]]:
    """Read the whole lines of a metrics file; a missing file has none.

    Raises:
      UserError: a line other than a half-written last one is damaged.
    """
    return _parse(epath.Path(path))[0]


def truncate(path: epath.PathLike, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Cut a metrics file back, so that a resumed run repeats no line.

    Keeps the leading lines for which ``keep`` is true, up to the first for which it is not. A
    file that needs no cut is not written.

    Raises:
      UserError: as ``read_lines``.
    """
    path = epath.Path(path)
    lines, content = _parse(path)
    kept = next((i for i, line in enumerate(lines) if not keep(line)), len(lines))
    remaining = b"".join(content.splitlines(keepends=True)[:kept])
    if remaining != content:
        workdir.write_bytes(path, remaining)


def keep(path: epath.PathLike, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Keep the lines for which ``wanted`` is true: for a file in which several units alternate.

    A file in which every line is wanted is not written.

    Raises:
      UserError: as ``read_lines``.
    """
    path = epath.Path(path)
    lines, content = _parse(path)
    whole = content.splitlines(keepends=True)[: len(lines)]
    remaining = b"".join(r for r, line in zip(whole, lines, strict=True) if wanted(line))
    if remaining != content:
        workdir.write_bytes(path, remaining)


def own_file(folder: epath.PathLike) -> epath.Path:
    """The file that this process appends to: metrics.jsonl, or its own beside the main process'."""
    process = jax.process_index()
    return epath.Path(folder) / (f"metrics-{process:05d}.jsonl" if process else "metrics.jsonl")


def gather(folder: epath.PathLike) -> None:
    """Put the other processes' lines behind those of metrics.jsonl; they have ended.

    Of several lines of one step of a unit the last stays, in the place of the first: a checkpoint
    that was damaged has iterations done again whose lines are there.
    """
    folder = epath.Path(folder)
    path, others = folder / "metrics.jsonl", workdir.matching(folder, "metrics-*.jsonl")
    parsed = [_parse(one) for one in (path, *others)]
    found: dict[tuple[str, int], bytes] = {}
    for lines, content in parsed:
        written = content.splitlines(keepends=True)[: len(lines)]
        found |= {(x["unit"], x["step"]): w for x, w in zip(lines, written, strict=True)}
    remaining = b"".join(found.values())
    if remaining != parsed[0][1]:
        workdir.write_bytes(path, remaining)
    for other in others:  # a kill in between repeats none
        other.unlink()


def _parse(path: epath.Path) -> tuple[list[dict[str, Any]], bytes]:
    """The records of a file's whole lines, and all its bytes."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(_record(line))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
            raise UserError(
                f"line {number} of {path} is damaged ({error}); move the file away and run the "
                f"same command again: its lines are redone or left out."
            ) from error
    return records, content


def _record(line: bytes) -> dict[str, Any]:
    """A line's values; ValueError where they are not what was written."""
    found = _CRC.search(line)
    if not found:
        raise ValueError("it has no checksum")
    if int(found[1], 16) != zlib.crc32(line[: found.start()] + b"}"):
        raise ValueError("its checksum is not that of its content")
    record = json.loads(line)
    del record[CRC]
    return record


def _plain(value: Any, name: str, not_finite: dict[str, str]) -> Any:
    """A value as JSON has it; numbers that are not finite are noted and become None."""
    if isinstance(value, dict):
        return {k: _plain(v, f"{name}.{k}".lstrip("."), not_finite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}[{i}]", not_finite) for i, v in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        not_finite[name] = str(value)
        return None
    return _plain(np.asarray(value).tolist(), name, not_finite)
