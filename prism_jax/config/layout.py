"""How a set divides into image batches, and what each of them receives: no data is needed.

A *unit* is one image batch: a group of slots of a block of classes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from prism_jax.config.sections import Experiment, Validate
from prism_jax.errors import UserError
from prism_jax.types import Unit


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the set divides into image batches: (slot groups) x (blocks of classes)."""

    slots: int
    classes: int
    groups: int
    blocks: int

    @property
    def size(self) -> int:
        """Images in a batch."""
        return self.slots * self.classes


def batch_layout(e: Experiment) -> Layout:
    """Slots and classes per batch, and how many groups and blocks that makes.

    ``batch_size = slots x classes``. Unset, it means all classes, at most 100.

    Raises:
      UserError: a stated size that does not divide.
    """
    ipc, classes_total = e.recover.ipc, e.dataset.num_classes
    slots = e.recover.slots_per_batch or (ipc if e.recover.batch_order == "class_major" else 1)
    if ipc % slots:
        raise UserError(
            f"recover.slots_per_batch is {slots}, which does not divide recover.ipc={ipc}"
        )
    wanted = e.recover.batch_size
    if wanted is None:
        classes = max(c for c in range(1, 101) if classes_total % c == 0 and c <= classes_total)
    else:
        classes, rest = divmod(wanted, slots)
        if rest or not classes or classes_total % classes:
            allowed = [slots * c for c in range(1, classes_total + 1) if classes_total % c == 0]
            near = sorted(sorted(allowed, key=lambda a: abs(a - wanted))[:5])
            raise UserError(
                f"recover.batch_size is {wanted}, which does not divide into "
                f"{slots} slot(s) x an equal share of {classes_total} classes; near it these do: "
                f"{', '.join(map(str, near))}"
            )
    budgets = {budget_of(e, slot) for slot in range(slots)} if slots > 1 else set()
    if len(budgets) > 1:
        raise UserError(
            f"recover.budget {e.recover.budget!r} gives the slots of one batch different "
            f"iterations {sorted(budgets)}; use recover.slots_per_batch=1 or budget='constant'"
        )
    return Layout(slots, classes, ipc // slots, classes_total // classes)


def budget_of(e: Experiment, slot: int) -> int:
    """Iterations that the images of a slot receive."""
    from prism_jax.core.schedules import BUDGETS

    return BUDGETS[e.recover.budget](e.recover.iterations, slot)


def bn_group_of(validate: Validate) -> int:
    """Images that a BatchNorm of a student sees at a time."""
    if validate.bn_group == "all":
        return validate.batch_size
    return validate.bn_group or validate.batch_size // validate.accumulate


# --- units ----------------------------------------------------------------------------------


def units(e: Experiment) -> list[Unit]:
    """All units, in the set's order; they are worked on longest first."""
    layout = batch_layout(e)
    groups, blocks = range(layout.groups), range(layout.blocks)
    if e.recover.batch_order == "ipc_major":
        return [Unit(g, b) for g in groups for b in blocks]
    return [Unit(g, b) for b in blocks for g in groups]


def members(e: Experiment, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Classes and slots (int32, B) of a unit's images, in batch order."""
    layout, recover = batch_layout(e), e.recover
    slots = np.arange(unit.group * layout.slots, (unit.group + 1) * layout.slots, dtype=np.int32)
    classes = np.arange(
        unit.block * layout.classes, (unit.block + 1) * layout.classes, dtype=np.int32
    )
    if recover.batch_order == "ipc_major" or recover.budget == "early_late":
        return np.tile(classes, len(slots)), np.repeat(slots, len(classes))
    return np.repeat(classes, len(slots)), np.tile(slots, len(classes))


def unit_budget(e: Experiment, unit: Unit) -> int:
    """Iterations that a unit's images receive."""
    return budget_of(e, unit.group * batch_layout(e).slots)
