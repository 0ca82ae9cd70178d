"""How a training batch divides: forward passes, parts, BatchNorm groups, devices.

    batch        = one optimiser step
    part         = batch / accumulate images: what one device holds at a time; one loss each
    group        = the images that a BatchNorm normalises together; a part holds whole groups

One device runs part after part. Several devices run parts, or the groups of a part, beside one
another. Groups, losses and the order in which running statistics take them up stay the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEAST = 2  # images of a BatchNorm group


class Pass(NamedTuple):
    """One forward pass: the rows ``start`` to ``stop`` of the batch.

    Attributes:
      parts: images of each part in it, in order.
      groups: images of each BatchNorm group in it, in order.
    """

    start: int
    stop: int
    parts: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


def passes(
    size: int, *, accumulate: int = 1, bn_group: int | None = None, devices: int = 1
) -> tuple[Pass, ...]:
    """Divide a batch.

    Args:
      size: images in it. Where the numbers do not divide (the ragged last batch of an epoch, a
        set smaller than a batch), parts and groups are as equal as can be, and no group is larger
        than ``bn_group``, but to spare an image a group of its own: its variance is zero.
      accumulate: parts.
      bn_group: images per group; None means a part.
      devices: that share each pass; a number for which ``fits`` holds.
    """
    together = 1 if devices == 1 else _parts_together(accumulate, devices)
    found, start = [], 0
    parts = _equal(size, min(accumulate, max(size // LEAST, 1)))
    for first in range(0, len(parts), together):
        mine = parts[first : first + together]
        groups = [g for p in mine for g in _groups(p, bn_group or p)]
        found.append(Pass(start, start + sum(mine), tuple(mine), tuple(groups)))
        start += sum(mine)
    return tuple(found)


def _groups(part: int, most: int) -> list[int]:
    if most < LEAST:  # groups of one image were asked for
        return _equal(part, part)
    return _equal(part, min(-(-part // most), max(part // LEAST, 1)))


def spares(size: int, *, accumulate: int = 1, bn_group: int | None = None) -> bool:
    """Whether a batch divides otherwise than equally, lest an image be a group of its own."""
    asked = [
        g for p in _equal(size, min(accumulate, size)) for g in _equal(p, -(-p // (bn_group or p)))
    ]
    found = passes(size, accumulate=accumulate, bn_group=bn_group)
    return asked != [g for one in found for g in one.groups]


def sizes(count: int, batch: int) -> tuple[int, ...]:
    """Images in the batches of an epoch, for every size that there is, the largest first.

    Args:
      count: images of the set.
      batch: of a full batch; a smaller set is one.
    """
    size = min(batch, count)
    rest = count % size
    return (size, rest) if rest else (size,)


def fits(size: int, devices: int, *, accumulate: int = 1, bn_group: int | None = None) -> bool:
    """Whether every device can have as many whole groups as every other, in every pass.

    A batch that is one group goes by images: its statistics span the devices.
    """
    if devices == 1:
        return True
    part, rest = divmod(size, accumulate)
    group = bn_group or part
    if rest or part < LEAST or part % group:
        return False
    if group == size:
        return size % devices == 0
    return _parts_together(accumulate, devices) * (part // group) % devices == 0


def most_devices(size: int, limit: int, *, accumulate: int = 1, bn_group: int | None = None) -> int:
    """The largest number of devices up to ``limit`` that ``fits``."""
    numbers = range(limit, 0, -1)
    return next(d for d in numbers if fits(size, d, accumulate=accumulate, bn_group=bn_group))


def _parts_together(accumulate: int, devices: int) -> int:
    """Parts per pass: as many as leave no device with more than one part's images."""
    return max(n for n in range(1, accumulate + 1) if accumulate % n == 0 and n <= devices)


def _equal(size: int, count: int) -> list[int]:
    return [len(rows) for rows in np.array_split(np.arange(size), count)]
