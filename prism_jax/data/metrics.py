"""Metrics as JSON lines: one line per step, flushed at once, cut back when a run resumes.

A process may die between any two bytes. A last line without its newline was never written: it
is not read, and the next writer removes it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax.data import workdir
from prism_jax.errors import UserError

NOT_FINITE = "not_finite"


class MetricsWriter:
    """Appends lines to a metrics file; opens nothing before the first one.

    Args:
      path: the file; its folder is made when needed.
      tensorboard_dir: also write the numbers as TensorBoard events into this folder, where the
        package tensorboardX is installed.
    """

    def __init__(self, path: epath.PathLike, tensorboard_dir: epath.PathLike | None = None):
        self._path = epath.Path(path)
        self._tensorboard_dir = tensorboard_dir
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
        self._append(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n")
        self._write_events(int(step), workdir.flatten(line))

    def close(self) -> None:
        """Close the files that were opened."""
        if self._file:
            self._file.close()
        if self._events:
            self._events.close()
        self._file = self._events = None

    def _append(self, text: str) -> None:
        if "://" in os.fspath(self._path):  # an object store cannot append
            old = self._path.read_bytes() if self._path.exists() else b""
            workdir.write_bytes(self._path, old + text.encode())
            return
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            truncate(self._path, lambda line: True)
            self._file = self._path.open("a", encoding="utf-8")
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
    """Put the other processes' lines behind those of metrics.jsonl; they have ended."""
    folder = epath.Path(folder)
    others = sorted(folder.glob("metrics-*.jsonl"))
    if not others:
        return
    path = folder / "metrics.jsonl"
    lines = [line for p in (path, *others) for line in _whole_lines(p)]
    workdir.write_bytes(path, b"".join(dict.fromkeys(lines)))  # a kill in between repeats none
    for other in others:
        other.unlink()


def _whole_lines(path: epath.Path) -> list[bytes]:
    _, content = _parse(path)
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _parse(path: epath.Path) -> tuple[list[dict[str, Any]], bytes]:
    """The records of a file's whole lines, and all its bytes."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            records.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"line {number} of {path} is damaged ({error}); move the file away and run the "
                f"same command again: its lines are redone or left out."
            ) from error
    return records, content


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
