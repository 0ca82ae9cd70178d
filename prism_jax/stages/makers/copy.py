"""Without iterations the initial images are the set; no teacher is needed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from etils import epath

from prism_jax.config import members
from prism_jax.data.exchange import ImageSet
from prism_jax.stages.context import Context
from prism_jax.stages.makers.made import Made
from prism_jax.stages.makers.start import initial_images
from prism_jax.types import Unit


def weights(context: Context) -> list[float] | None:
    """Those that came with a set; optimised further, images would be others than theirs."""
    source = context.inputs.start
    if isinstance(source, ImageSet) and source.weights_N is not None:
        return source.weights_N.tolist()
    return None


def make(context: Context, root: epath.Path, waiting: list[Unit]) -> Iterator[Made]:
    """Read the initial images of units."""
    for unit in waiting:
        started = time.monotonic()
        images_BHWC = initial_images(context, *members(context.config, unit), keep=root)
        # Not recover.rounding: nearest gives back the very pixels that were read.
        yield Made(unit, images_BHWC, "nearest", time.monotonic() - started, {})
        context.stop.check()
