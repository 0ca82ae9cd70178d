"""What a maker hands to recover, and where recover records it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from etils import epath

from prism_jax.types import Unit


class Made(NamedTuple):
    """The images of a finished unit.

    Attributes:
      unit: which images they are.
      images_BHWC: float32 in the normalised space, in the order of ``config.members``.
      rounding: how they become pixels; see ``core.pixels.to_uint8``.
      seconds: that they took.
      facts: for the unit's record, beside what every record has.
    """

    unit: Unit
    images_BHWC: np.ndarray
    rounding: str
    seconds: float
    facts: dict[str, Any]


def record_path(root: epath.Path, unit: Unit) -> epath.Path:
    """The record that says that a unit is done."""
    return root / "units" / f"{unit.name}.json"
