"""Images from a denoiser: each from its anchor, keyed by class and slot alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.config import members
from prism_jax.core import pixels
from prism_jax.stages import anchoring, generator
from prism_jax.stages.context import Context
from prism_jax.stages.generator import Painter, Wish
from prism_jax.stages.makers.made import Made
from prism_jax.types import Unit


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
    anchored = "anchors" in anchoring.needed(context)
    facts: list[dict[str, list[int]]] = []  # of units that were begun

    def wishes() -> Iterator[Wish]:
        for where in at:
            starts = anchoring.starts_of(context, *where) if anchored else None
            facts.append({"nearest": starts.medoids_N} if starts else {})
            yield Wish(*where, starts.anchors_NHWC if starts else None)

    with progress.task("recover", len(waiting), unit="unit") as bar:
        started = time.monotonic()
        found: Iterator[np.ndarray]
        if config.generate.candidates > 1:
            facts = [{} for _ in at]
            found = (_chosen(context, *where) for where in at)
        else:
            painter = Painter(context, generator.open_(context), anchoring.painted(context))
            found = painter.paint(wishes())
        for number, (unit, images) in enumerate(zip(waiting, found, strict=True)):
            now = time.monotonic()
            normalised = np.asarray(pixels.normalise(images, context.inputs.normalisation))
            # Not recover.rounding: nearest gives back the very pixels.
            yield Made(unit, normalised, "nearest", now - started, facts[number])
            started = now
            bar.advance(1)
            context.stop.check()


def _chosen(context: Context, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Of each class the judge's choice, the surest first."""
    found = {
        cls: anchoring.read(context, "candidates", cls)["images"]
        for cls in sorted({*classes_B.tolist()})
    }
    return np.stack(
        [found[c][s] for c, s in zip(classes_B.tolist(), slots_B.tolist(), strict=True)]
    )
