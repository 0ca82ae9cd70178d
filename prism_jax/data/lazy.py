"""Sets of images that look like arrays: in memory where they fit, else decoded when indexed."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from prism_jax import environment, parallel, progress

T = TypeVar("T")

LARGE_BYTES = 1e9  # what takes a while to read


class LazyImages:
    """A set of uint8 images that is indexed as its array would be, and read when it is.

    ``images[3]``, ``images[2:5]`` and ``images[index_B]`` are arrays; nothing is kept.

    Args:
      read: the images at some positions: int64 (B,) -> uint8 (B, H, W, C); called from several
        threads at once.
      shape: (N, H, W, C).
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, read: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int, int, int]):
        self._read = read
        self.shape = tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        positions = np.arange(len(self))[index]
        if not positions.size:
            return np.zeros((0, *self.shape[1:]), np.uint8)
        images = self._read(np.atleast_1d(positions))
        return images if positions.ndim else images[0]


Images = np.ndarray | LazyImages


class OneByOne:
    """Reads images by position in threads of its own."""

    def __init__(self, image: Callable[[int], np.ndarray], *, threads: int):
        self._image, self._threads = image, ThreadPoolExecutor(max(1, threads))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return np.stack(list(self._threads.map(self._image, positions.tolist())))


def hold(images: LazyImages, *, limit_bytes: float) -> Images:
    """The images in memory, or as they are where they would take too much of it.

    That is more than the limit, or more than half of what is free, which is said; processes on one
    machine hold a copy each.
    """
    size, free = math.prod(images.shape), environment.free_memory() / parallel.processes_here()
    if size > limit_bytes:
        return images
    if size > free / 2:
        progress.say(
            f"{len(images)} images take {size / 1e9:.3g} GB, and of memory {free / 1e9:.3g} GB are "
            f"free for them: they are read whenever they are needed"
        )
        return images
    held = np.empty(images.shape, np.uint8)  # read in parts, since a part is there twice
    shown = progress.task("reading images", len(images), unit="image")
    with shown if size > LARGE_BYTES else contextlib.nullcontext() as bar:
        for part in chunks(len(images)):
            held[part] = images[part]
            if bar:
                bar.advance(len(held[part]))
    return held


def read_ahead(
    images: Images, items: Iterable[T], index: Callable[[T], Any], *, ahead: int = 2
) -> Iterator[tuple]:
    """Every item with ``images[index(item)]``, so many read while the ones before are worked on.

    An array needs no reading and is indexed when it is asked for.
    """
    if isinstance(images, np.ndarray):
        for item in items:
            yield item, images[index(item)]
        return
    reader, waiting = ThreadPoolExecutor(1), deque[tuple[T, Future]]()
    try:
        for item in items:
            waiting.append((item, reader.submit(images.__getitem__, index(item))))
            if len(waiting) > ahead:
                item, found = waiting.popleft()
                yield item, found.result()
        for item, found in waiting:
            yield item, found.result()
    finally:
        reader.shutdown(cancel_futures=True)


def chunks(count: int, size: int = 256) -> Iterator[slice]:
    """Slices that cover a set in order, for what needs only a part of it at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
