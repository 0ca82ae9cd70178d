"""One run: what every stage is handed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from etils import epath

from prism_jax import parallel, progress
from prism_jax.config import Experiment
from prism_jax.core import batching
from prism_jax.data import workdir
from prism_jax.data.lazy import Images
from prism_jax.data.weights import RECORD
from prism_jax.stages.coordination import StopSignal, Work
from prism_jax.stages.inputs import Inputs
from prism_jax.stages.networks import Networks

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class LabelledSet:
    """A set of images that students train on: the synthetic one, or a control.

    Attributes:
      name: "synthetic", or the control's.
      root: where its labels and students are.
      read: opens the images; most questions about a set do not need them.
      labels_N: int32 classes.
      fields: what made the images; they enter the fingerprints of labels and students.
      soft: whether it is given soft labels.
      weights_N: how much each image counts, 1 on average; None: alike.
    """

    name: str
    root: epath.Path
    read: Callable[[], Images]
    labels_N: np.ndarray
    fields: dict[str, Any]
    soft: bool
    weights_N: np.ndarray | None = None

    @functools.cached_property
    def images_uint8_NHWC(self) -> Images:
        return self.read()


class Context:
    """One run: its experiment and directory, and what it works with.

    Attributes:
      config: the experiment.
      root: its working directory.
      source: another one, of which everything finished that fits is taken over.
      stop: the request to stop.
      provenance: what makes the results: command, commit, versions, machine.
      inputs: the real images.
      networks: teachers and students.
      work: the lock, and the other processes.
    """

    def __init__(
        self,
        config: Experiment,
        root: epath.PathLike,
        *,
        source: epath.PathLike | None = None,
        stop: StopSignal | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        """Write nothing yet."""
        self.config = config
        self.root = epath.Path(root)
        self.source = epath.Path(source) if source else None
        self.stop = stop or StopSignal()
        self.provenance = dict(provenance or {})
        self.inputs = Inputs(config)
        self.networks = Networks(config, self.root, self.inputs)
        self.work = Work(self.root, config, self.stop, self.provenance)
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What ``make`` makes, made once in a run."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def offers(self, relative: str, fields: dict[str, Any], done: str = RECORD) -> bool:
        """Whether the source has a folder, finished, that fits; what is here is kept."""
        return self.source is not None and workdir.offers(
            self.source / relative, self.root / relative, fields, done
        )

    def train_devices(self, size: int, **division: Any) -> int:
        """How many devices share the batches of ``size`` images of one training.

        Args:
          **division: see ``core.batching.fits``.
        """
        limit = self.config.parallel.train_devices or parallel.sharing_devices()
        return batching.most_devices(size, limit, **division)

    def say(self, text: str) -> None:
        progress.say(text)
