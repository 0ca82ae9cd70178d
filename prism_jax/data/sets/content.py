"""What a writer is given: a finished set, in label order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prism_jax.data.label_store import LabelReader
from prism_jax.data.lazy import Images
from prism_jax.types import Mix, SoftLabels, View


class Content(NamedTuple):
    """A set to be given away.

    Attributes:
      images_NHWC: uint8, class-major; of a format that stores them one by one, read when indexed.
      labels_N: int32.
      classes: folder, index and name of every class, in label order.
      ipc: images of each class.
      soft_NK: float32, one mean label (probabilities) per image; None: there are none, or the
        format has no place for them.
      weights_N: float32, how much each image counts; None: they count alike.
      reader: the stored labels of every view; None: there are none.
      drawn: record of ``reader`` -> the view and the mix that it labels.
      provenance: what made it, as JSON values.
      accuracies: top-1 by set (the synthetic one and its controls) and student, from the run's
        summary; empty where it has none.
      spread: what their deviation is over.
      licence: of the set, in a word that Hugging Face knows.
    """

    images_NHWC: Images
    labels_N: np.ndarray
    classes: Sequence[Mapping[str, Any]]
    ipc: int
    soft_NK: np.ndarray | None
    weights_N: np.ndarray | None
    reader: LabelReader | None
    drawn: Callable[[SoftLabels], tuple[View, Mix]]
    provenance: Mapping[str, Any]
    accuracies: Mapping[str, Mapping[str, str]] = {}
    spread: str = ""
    licence: str = "unknown"

    def file_of(self, index: int) -> str:
        """Where the image at a position lies in an ImageFolder."""
        cls, slot = divmod(index, self.ipc)
        return f"{self.classes[cls]['folder']}/{slot:05d}.png"

    @property
    def title(self) -> str:
        """What to call it."""
        of = "" if self.provenance["set"] == "synthetic" else f" ({self.provenance['set']})"
        return f"{self.experiment['name']}{of}"

    @property
    def experiment(self) -> Mapping[str, Any]:
        """The config of the run that made it."""
        return self.provenance["experiment"]
