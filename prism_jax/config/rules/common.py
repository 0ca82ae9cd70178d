"""The kinds of rules that many fields share; each yields one line per field that breaks it."""

from __future__ import annotations

import dataclasses
import difflib
import typing
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from prism_jax.config.sections import Experiment
from prism_jax.core import schedules


def positive(e: Experiment, section: str, *names: str) -> Iterator[str]:
    """Fields that are above zero, or unset."""
    for name in names:
        value = getattr(getattr(e, section), name)
        if value is not None and not value > 0:
            yield f"{section}.{name} is {value}; it must be positive"


def not_negative(e: Experiment, section: str, *names: str) -> Iterator[str]:
    """Fields that are zero or more, or unset."""
    for name in names:
        value = getattr(getattr(e, section), name)
        if value is not None and value < 0:
            yield f"{section}.{name} is {value}; it must be zero or positive"


SEEDS = 2**32  # a seed is 32 bits of a key


def seed(name: str, *values: int) -> Iterator[str]:
    """Seeds that a key of random bits can have."""
    for value in values:
        if not 0 <= value < SEEDS:
            yield f"{name} is {value}; it must be zero or positive, and below {SEEDS}"


def share(e: Experiment, section: str, *names: str, low: str = "[", high: str = "]"):
    """Fields between 0 and 1; the brackets say whether an end belongs to them."""
    for name in names:
        value = getattr(getattr(e, section), name)
        above = value >= 0 if low == "[" else value > 0
        if not (above and (value <= 1 if high == "]" else value < 1)):
            yield f"{section}.{name} is {value}; it must be in {low}0, 1{high}"


def normalisation(of: str, mean: tuple | None, std: tuple | None) -> Iterator[str]:
    """A mean and a standard deviation per channel, both or none; ``of`` is what they are called."""
    if (mean is None) != (std is None) or (mean and std and len(mean) != len(std)):
        yield (
            f"{of}mean is {mean} and {of}std is {std}; they belong together, with one number per "
            f"channel each"
        )
    if std and min(std) <= 0:
        yield f"{of}std is {std}; its numbers must be positive"


def one_of(name: str, value: str, table: Iterable[str]) -> Iterator[str]:
    """A name of a row of a table."""
    if value not in (allowed := list(table)):
        near = difflib.get_close_matches(value, allowed, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        yield f"{name} is {value!r}{meant}; allowed: {', '.join(sorted(allowed))}"


def literals(e: Experiment) -> Iterator[str]:
    """Every field whose type lists its words."""
    groups: dict[str, Any] = {f.name: getattr(e, f.name) for f in dataclasses.fields(e)}
    groups |= {f"networks.{name}": network for name, network in e.networks.items()}
    for name, group in groups.items():
        if dataclasses.is_dataclass(group):
            yield from literals_of(name, group)


def literals_of(name: str, group: Any) -> Iterator[str]:
    """The same of one section."""
    for field, hint in typing.get_type_hints(type(group)).items():
        if get_origin(hint) is Literal:
            yield from one_of(f"{name}.{field}", getattr(group, field), get_args(hint))


# Smallest crops beside a shift, which reads none: 1, and 0.08, with which recipes that shift began
# (it is in the fingerprints of their work).
UNREAD_CROPS = (1.0, 0.08)


def without_milestones() -> tuple[str, ...]:
    """Schedules for a section that states no milestones, without which "multistep" is constant."""
    return tuple(s for s in schedules.SCHEDULES if "milestones" not in schedules.values_of(s))


def shifted(e: Experiment, section: str) -> Iterator[str]:
    """No smallest crop where images are shifted."""
    group = getattr(e, section)
    if group.crop_pad is not None and group.crop_min not in UNREAD_CROPS:
        yield (
            f"{section}.crop_min is {group.crop_min}, but {section}.crop_pad={group.crop_pad} "
            f"shifts images and crops none; set {section}.crop_min=1.0, or unset {section}.crop_pad"
        )


def passed_over(name: str, value: Any, usual: Any, why: str) -> None:
    """Warn of a value that nothing reads and that finished work may have in its fingerprints.

    Args:
      name: of the field, with its section.
      usual: what stands there where nobody states it.
    """
    if value != usual:
        warnings.warn(f"{name} is {value!r}, which counts for nothing: {why}", stacklevel=2)


def repeated(values: Sequence[Any]) -> list[Any]:
    """Values that are there more than once."""
    return sorted({value for value in values if values.count(value) > 1})
