"""What every kind of weight file is read as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Contents(NamedTuple):
    """A file's tensors, of which only those that are asked for are made arrays.

    Attributes:
      kind: what the file is, in words.
      tensors: by the keys that lead to them, of the dicts around them and at last their name;
        in PyTorch's layout. Each has a ``shape`` and a ``dtype``.
      array: makes one of them an array.
      flax: whether it was a Flax tree.
      skipped: the classes and functions that it names beside its tensors; none of them was run.
    """

    kind: str
    tensors: dict[tuple[str, ...], Any]
    array: Callable[[Any], np.ndarray] = np.asarray
    skipped: tuple[str, ...] = ()
    flax: bool = False
