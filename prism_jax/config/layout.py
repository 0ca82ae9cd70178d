"""How a set divides into image batches, and what each of them receives: no data is needed.

A *unit* is one image batch: a group of slots of a block of classes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from prism_jax.config.sections import Experiment, Validate
from prism_jax.errors import UserError

if TYPE_CHECKING:
    from prism_jax.types import Unit

MOST_CLASSES = 100  # of a batch, where nobody states its size
PAINTED = 100  # images of whole classes that a generator finishes together, in the same case
LEAST_CLASSES = 32  # fewer say little of a statistic: then blocks may be of two sizes
LEAST_IMAGES = 10  # of a batch, below which the plan says that statistics mean little


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the set divides into image batches: (slot groups) x (blocks of classes).

    ``classes`` are those of the largest block. Where ``total`` classes do not divide, the last
    blocks have one class less.
    """

    slots: int
    classes: int
    groups: int
    blocks: int
    total: int

    @property
    def uneven(self) -> bool:
        """Whether blocks have two sizes."""
        return self.classes * self.blocks != self.total

    def block(self, number: int) -> range:
        """The classes of a block."""
        least, more = divmod(self.total, self.blocks)
        start = number * least + min(number, more)
        return range(start, start + least + (number < more))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images in a batch, for every size that there is, the largest first."""
        return (self.size, self.size - self.slots) if self.uneven else (self.size,)

    @property
    def size(self) -> int:
        """Images in a batch."""
        return self.slots * self.classes


def batch_layout(e: Experiment) -> Layout:
    """Slots and classes per batch, and how many groups and blocks that makes.

    ``batch_size = slots x classes``. Unset, it means all classes, at most ``MOST_CLASSES``, in
    equal blocks; where those would have fewer than ``LEAST_CLASSES``, in blocks that differ by one
    class. A stated size that does not divide is the most that a batch holds.

    Raises:
      UserError: a stated size that holds no whole number of slots.
    """
    ipc, classes_total = e.recover.ipc, e.dataset.num_classes
    slots = e.recover.slots_per_batch or (ipc if e.recover.batch_order == "class_major" else 1)
    if ipc % slots:
        raise UserError(
            f"recover.slots_per_batch is {slots}, which does not divide recover.ipc={ipc}"
        )
    wanted = e.recover.batch_size
    if wanted is None:
        most = min(MOST_CLASSES, classes_total)
        if paints_classes(e):
            most = min(most, -(-PAINTED // slots))
        classes = max(c for c in range(1, most + 1) if classes_total % c == 0)
        if classes < min(LEAST_CLASSES, classes_total):
            classes = most
    else:
        classes, rest = divmod(wanted, slots)
        if rest or not classes or classes > classes_total:
            below = max(1, min(classes, classes_total))
            near = sorted({slots * below, slots * min(below + 1, classes_total)})
            raise UserError(
                f"recover.batch_size is {wanted}, which does not divide into "
                f"{slots} slot(s) x some of {classes_total} classes; near it these do: "
                f"{', '.join(map(str, near))}"
            )
    blocks = -(-classes_total // classes)
    classes = -(-classes_total // blocks)
    budgets = {budget_of(e, slot) for slot in range(slots)} if slots > 1 else set()
    if len(budgets) > 1:
        raise UserError(
            f"recover.budget {e.recover.budget!r} gives the slots of one batch different "
            f"iterations {sorted(budgets)}; use recover.slots_per_batch=1 or budget='constant'"
        )
    return Layout(slots, classes, ipc // slots, blocks, classes_total)


def paints_classes(e: Experiment) -> bool:
    """Whether a generator finishes ``PAINTED`` images of whole classes together."""
    order, size = e.recover.batch_order, e.recover.batch_size
    return e.recover.maker == "generate" and order == "class_major" and size is None


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
    from prism_jax.types import Unit  # brings JAX, for which a run prepares first

    layout = batch_layout(e)
    groups, blocks = range(layout.groups), range(layout.blocks)
    if e.recover.batch_order == "ipc_major":
        return [Unit(g, b) for g in groups for b in blocks]
    return [Unit(g, b) for b in blocks for g in groups]


def members(e: Experiment, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """Classes and slots (int32, B) of a unit's images, in batch order."""
    layout, recover = batch_layout(e), e.recover
    slots = np.arange(unit.group * layout.slots, (unit.group + 1) * layout.slots, dtype=np.int32)
    classes = np.array(layout.block(unit.block), np.int32)
    if recover.batch_order == "ipc_major" or recover.budget == "early_late":
        return np.tile(classes, len(slots)), np.repeat(slots, len(classes))
    return np.repeat(classes, len(slots)), np.tile(slots, len(classes))


def unit_budget(e: Experiment, unit: Unit) -> int:
    """Iterations that a unit's images receive."""
    return budget_of(e, unit.group * batch_layout(e).slots)
