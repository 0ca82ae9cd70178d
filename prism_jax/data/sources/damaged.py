"""Images that cannot be decoded, left out of a set (``dataset.damaged = "skip"``).

The set is looked through once, and what cannot be decoded is no part of it from then on, as if
it had not been stored. So an epoch is a permutation of the readable images, batches are the same
for any number of threads, processes and hosts, no image stands in for another, and no label
changes. The pass over the images is the price; what it finds is kept in the user's cache
directory, for as long as the files keep their sizes and times of change.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL

from prism_jax import progress
from prism_jax.data.image_set import DamagedFile
from prism_jax.data.sources.base import ImageSource, Subset, cached
from prism_jax.data.sources.decoding import EncodedSource
from prism_jax.errors import UserError

# Raised when a change of code changes which images can be read, or which files are images.
_RULES = 2

_AT_ONCE = 256
_NAMED = 100


def without_damaged(source: ImageSource, *, threads: int) -> ImageSource:
    """The readable images of a source; what is left out is named and counted.

    Raises:
      UserError: no image can be read.
    """
    if not isinstance(source, EncodedSource):
        return source  # arrays in memory are decoded already
    key = f"{_RULES} {PIL.__version__} {source.split} {len(source)} {source.stamp()}"
    damaged = cached("damaged", key, lambda: _look_through(source, threads))
    if not len(damaged):
        return source
    if len(damaged) == len(source):
        raise UserError(
            f"none of the {len(source)} images can be read, such as {source.name(0)}; is "
            f"dataset.path right?"
        )
    for index in damaged[:_NAMED]:
        progress.say(f"damaged, left out: {source.name(int(index))}")
    if len(damaged) > _NAMED:
        progress.say(f"... and {len(damaged) - _NAMED} more")
    progress.say(f"{len(damaged)} of {len(source)} images are damaged and left out")
    readable = np.delete(np.arange(len(source)), damaged)
    digest = hashlib.sha256(damaged.astype("<i8").tobytes()).hexdigest()
    left_out = {"count": len(damaged), "digest": digest}
    described = {"count": len(readable), "left_out": left_out}
    found = Subset(source, readable, labels_N=source.all_labels_N, described=described)
    found.left_out = source.left_out + len(damaged)
    return found


def _look_through(source: EncodedSource, threads: int) -> np.ndarray:
    """The positions of the images that cannot be decoded."""

    def is_damaged(index: int) -> bool:
        try:
            source.image(index)
        except DamagedFile:
            return True
        return False

    def part(start: int) -> list[int]:
        return [i for i in range(start, min(start + _AT_ONCE, len(source))) if is_damaged(i)]

    damaged: list[int] = []
    starts = range(0, len(source), _AT_ONCE)
    with (
        ThreadPoolExecutor(threads) as pool,
        progress.task("look for damaged images", len(source), unit="image") as bar,
    ):
        for start, some in zip(starts, pool.map(part, starts), strict=True):
            damaged += some
            bar.advance(min(_AT_ONCE, len(source) - start))
    return np.array(damaged, np.int64)
