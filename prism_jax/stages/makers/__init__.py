"""Makers: who makes the images of recover's units.

A maker prepares what a run that was stopped has left, on the main process alone, and then yields
units as they are finished. It writes no image: units, folders, the manifest, resuming and damage
are recover's, whoever makes the images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from etils import epath

from prism_jax.config import Experiment
from prism_jax.stages.context import Context
from prism_jax.stages.makers import copy, generate, optimise
from prism_jax.stages.makers.made import Made
from prism_jax.types import Unit


class Maker(NamedTuple):
    """One way to make images; ``root`` is recover's folder.

    Attributes:
      make: yields units as they are finished.
      prepare: looks after what a run that was stopped has left, on the main process.
      before: work that comes before units are dealt, of every process.
      check: refuses, before any work, what no data and no weights are needed to know.
      weights: what each image counts, class-major; None: alike.
    """

    make: Callable[[Context, epath.Path, list[Unit]], Iterator[Made]]
    prepare: Callable[[Context, epath.Path], None] = lambda context, root: None
    before: Callable[[Context], None] = lambda context: None
    check: Callable[[Context], None] = lambda context: None
    weights: Callable[[Context], list[float] | None] = lambda context: None


MAKERS = {
    "optimise": Maker(optimise.make, optimise.prepare, check=optimise.check),
    "copy": Maker(copy.make, weights=copy.weights),
    "generate": Maker(generate.make, before=generate.before, weights=generate.weights),
}


def maker_of(config: Experiment) -> Maker:
    """Who makes the images of an experiment."""
    if config.recover.maker == "generate":
        return MAKERS["generate"]
    return MAKERS["optimise" if config.recover.iterations else "copy"]
