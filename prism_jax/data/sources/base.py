"""What every source is, and what all of them need."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from etils import epath

from prism_jax.errors import UserError

THREADS = 32  # that wait for a file system

_READERS = {".tar": "tar", ".npz": "npz"}  # dataset.source of a file


class ImageSource(Protocol):
    """Labelled images by position.

    Attributes:
      labels_N: int32.
      num_classes: labels are below it.
      class_names: what the storage calls the labels (folders, WordNet IDs); None: nothing.
      imagenet_indices: the ImageNet class of each label; None: not known, or no part of it.
      left_out: files that are no part of it: damaged images, and what is no image.
    """

    num_classes: int
    class_names: tuple[str, ...] | None
    imagenet_indices: tuple[int, ...] | None
    left_out: int

    @property
    def labels_N(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 (image_size, image_size, C); callable from several threads."""
        ...

    def original(self, index: int) -> np.ndarray:
        """The same image before it is resized and cropped, uint8 (H, W, C) of any size."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this is, as JSON values: equal for equal pixels and labels in equal order.

        Where the data lies is no part of it.
        """
        ...


class Subset:
    """The images of a source at some positions, in their order; a source of its own.

    Attributes: those of ``ImageSource``, which begin as the source's, and ``at_M``, the positions.
    """

    def __init__(
        self,
        source: ImageSource,
        at_M: np.ndarray,
        *,
        labels_N: np.ndarray | None = None,
        described: Mapping[str, Any] | None = None,
    ):
        """Read nothing yet.

        Args:
          at_M: the positions.
          labels_N: of all images of the source, where it does not give them itself.
          described: what tells this subset from the source and from its other subsets.
        """
        self._source, self.at_M, self._described = source, at_M, dict(described or {})
        self.labels_N = (source.labels_N if labels_N is None else labels_N)[at_M]
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.imagenet_indices, self.left_out = source.imagenet_indices, source.left_out

    def __len__(self) -> int:
        return len(self.at_M)

    def image(self, index: int) -> np.ndarray:
        return self._source.image(int(self.at_M[index]))

    def original(self, index: int) -> np.ndarray:
        return self._source.original(int(self.at_M[index]))

    def describe(self) -> dict[str, Any]:
        return {**self._source.describe(), **self._described}


def existing(path: str | None, expected: str, exists: Callable[[str], bool]) -> str:
    """The path, if there is something of the right kind.

    Raises:
      UserError: there is not; ``expected`` says what belongs there.
    """
    if not path:
        raise UserError(f"dataset.path is not set; {expected}")
    if not exists(path):
        raise UserError(f"{what_is(path)}; {expected}")
    return path


def what_is(path: str) -> str:
    """What to say of a path that is not what it should be."""
    if not os.path.exists(path):
        return f"there is no {path}"
    kind = "folder" if os.path.isdir(path) else "file"
    reader = kind if kind == "folder" else _READERS.get(os.path.splitext(path)[1].lower())
    return f"{path} is a {kind}" + (f" (which dataset.source={reader} reads)" if reader else "")


def file_state(path: epath.PathLike) -> tuple[str, int, int]:
    """A file's name, size and time of change; size -1 where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        if "://" not in os.fspath(path):
            return os.path.abspath(path), -1, 0
        remote = epath.Path(path).stat()
        return os.fspath(path), remote.length, int(remote.mtime)
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def file_states(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """``file_state`` of many files at once: on a disk in a network each asks another machine."""
    parts = [paths[at::THREADS] for at in range(THREADS)]
    states: list[Any] = [None] * len(paths)
    with ThreadPoolExecutor(THREADS) as pool:
        for at, found in enumerate(pool.map(lambda part: [*map(file_state, part)], parts)):
            states[at::THREADS] = found
    return states


def cached(kind: str, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array that takes a pass over the data to make, kept in the user's cache directory.

    Args:
      kind: what it is; a folder of the cache.
      key: names the very files it was made from, with their sizes and times of change.
      make: makes it where the cache has none; a cache that cannot be written is none.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
    path = epath.Path(home) / "prism_jax" / kind / f"{name}.npy"
    try:
        with path.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        pass
    array = make()
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        temporary.replace(path)
    except OSError:
        pass
    return array
