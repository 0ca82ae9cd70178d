"""Images from a denoiser: each from its anchor, keyed by class and slot alone."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.config import batch_layout, members
from prism_jax.core import pixels
from prism_jax.stages import anchoring, generator
from prism_jax.stages.context import Context
from prism_jax.stages.generator import Opened, Painter, Wish
from prism_jax.stages.makers.made import Made
from prism_jax.types import Unit

Members = tuple[np.ndarray, np.ndarray]  # of a unit: classes and slots
Found = tuple[np.ndarray, dict[str, Any]]  # its images, and facts for its record


def before(context: Context) -> None:
    """Latents, anchors and candidates, by every process."""
    anchoring.run(context)


def weights(context: Context) -> list[float] | None:
    """What each image counts."""
    return anchoring.image_weights(context)


def make(context: Context, root: epath.Path, waiting: list[Unit]) -> Iterator[Made]:
    """Generate units, a batch on every device; or take them from among the candidates."""
    config = context.config
    at = [members(config, unit) for unit in waiting]
    if config.generate.candidates == 1:
        found = _painted(context, at)
    elif config.generate.refine.steps:
        found = _refined(context, at)
    else:
        found = ((_chosen(context, "images", *where), {}) for where in at)
    with progress.task("recover", len(waiting), unit="unit") as bar:
        started = time.monotonic()
        for unit, (images, facts) in zip(waiting, found, strict=True):
            now, spent = time.monotonic(), 0.0
            if config.generate.candidates > 1:
                spent = anchoring.sampled_seconds(context, members(config, unit)[0])
            normalised = np.asarray(pixels.normalise(images, context.inputs.normalisation))
            # Not recover.rounding: nearest gives back the very pixels.
            yield Made(unit, normalised, "nearest", spent + now - started, facts)
            started = now
            bar.advance(1)
            context.stop.check()


def _painted(context: Context, at: list[Members]) -> Iterator[Found]:
    """Images of units, and the real ones nearest to where they start."""
    anchored = "anchors" in anchoring.needed(context)
    facts: deque[dict[str, list[int]]] = deque()  # of units that were begun

    def wishes() -> Iterator[Wish]:
        for where in at:
            starts = anchoring.starts_of(context, *where) if anchored else None
            facts.append({"nearest": starts.medoids_N} if starts else {})
            yield Wish(*where, starts.anchors_NHWC if starts else None)

    for painted in anchoring.painter(context, generator.open_(context)).paint(wishes()):
        yield painted.images, facts.popleft()


def _refined(context: Context, at: list[Members]) -> Iterator[Found]:
    """The candidates that were chosen, refined; nothing is sampled again."""
    wishes = (Wish(*where, _chosen(context, "latents", *where)) for where in at)
    for painted in refiner(context, generator.open_(context)).paint(wishes):
        yield painted.images, {}


def refiner(context: Context, opened: Opened) -> Painter:
    """What refines a unit's latents, and samples nothing."""
    still = dataclasses.replace(opened.sampling, strength=0.0, terms=())
    return Painter(context, opened._replace(sampling=still), batch_layout(context.config).size)


def _chosen(context: Context, name: str, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Images or latents of each class's chosen candidates, the surest first."""
    found = {
        cls: anchoring.read(context, "candidates", cls)[name]
        for cls in sorted({*classes_B.tolist()})
    }
    return np.stack(
        [found[c][s] for c, s in zip(classes_B.tolist(), slots_B.tolist(), strict=True)]
    )
