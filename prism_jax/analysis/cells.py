"""The cells of a comparison, as its tables are made of them, and as they are kept."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prism_jax.analysis.differences import Choices, Column, Tested
from prism_jax.analysis.intervals import Resampling
from prism_jax.analysis.words import OWN, SYNTHETIC, row_label
from prism_jax.data import answers
from prism_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A finished cell: one method, IPC, seed and protocol.

    Attributes:
      summary: of its working directory.
      peak_bytes: of one image batch in recover, as compiled; None: not known, or no iterations.
      right: which answers are right, packed: by set, part, student and seed of students.
      costs: of every set, see ``stages.costs``.
      imported: the teachers that were trained elsewhere.
    """

    row: str
    ipc: int
    seed: int
    protocol: str
    summary: dict[str, Any]
    peak_bytes: int | None
    right: dict[str, dict[str, dict[str, list[str | None]]]] = dataclasses.field(
        default_factory=dict
    )
    costs: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    imported: tuple[str, ...] = ()

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """Students' results by set of images: the synthetic one, then controls."""
        return {SYNTHETIC: self.summary.get("validate", {}), **self.summary.get("controls", {})}


# Of a cell's summary: what the tables say, and what a reader asks next.
RECORDED = (
    "config", "commit", "protocol", "recover", "relabel", "validate", "controls", "analyse",
)  # fmt: skip


def entry_of(record: Mapping[str, Any]) -> Entry:
    """An entry from a cell's record, whatever else that says."""
    known = {f.name: record[f.name] for f in dataclasses.fields(Entry) if f.name in record}
    return Entry(**known | {"imported": tuple(record.get("imported", ()))})


def to_records(entries: Sequence[Entry], choices: Choices) -> dict[str, Any]:
    """All that the tables are made of, as JSON values: a few kB a cell."""
    cells = []
    for e in entries:
        summary = {key: e.summary[key] for key in RECORDED if key in e.summary}
        for part in ("validate", "controls"):
            if part in summary:
                summary[part] = _without(summary[part], "per_class")
        cells.append(dataclasses.asdict(dataclasses.replace(e, summary=summary)))
    return {"schema": 1, "choices": dataclasses.asdict(choices), "cells": cells}


def _without(tree: Any, key: str) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {k: _without(v, key) for k, v in tree.items() if k != key}


def from_records(found: Mapping[str, Any]) -> tuple[list[Entry], Choices]:
    """Entries, and what they are measured by.

    Raises:
      UserError: the records are of another version, or no comparison's.
    """
    if lacking := [key for key in ("schema", "choices", "cells") if key not in found]:
        raise UserError(
            f"these are no records of a comparison, which would say {' and '.join(lacking)}; name "
            f"the records.json that it wrote"
        )
    if found["schema"] != 1:
        raise UserError(
            f"these records have schema {found['schema']!r}, and this version of prism_jax reads 1"
        )
    said = found["choices"]
    choices = Choices(
        Resampling(**said["resampling"]),
        said["reference"],
        tuple(said["selected_real"]),
        tuple(said["controls"]),
    )
    return [entry_of(_as_now(cell)) for cell in found["cells"]], choices


def merged(found: Mapping[str, tuple[list[Entry], Choices]]) -> tuple[list[Entry], Choices]:
    """Several comparisons as one, such as of seeds that machines shared out.

    Args:
      found: the cells of each and what they are measured by, by the name that messages give it.

    Returns:
      The cells in the given order, measured by what any of them names.

    Raises:
      UserError: two have the same cell, or differ in the settings of a row, in the number of test
        images or in what sets are measured by.
    """
    owners: dict[Any, str] = {}
    settings: dict[Any, tuple[str, Any]] = {}

    def agree(what: str, value: Any, name: str) -> None:
        first, other = settings.setdefault(what, (name, value))
        if other != value and first != name:  # in one they may be of several versions
            raise UserError(
                f"{first} and {name} do not belong together: {what} is {other} in one and {value} "
                f"in the other; name comparisons of one config that differ in their seeds or rows"
            )

    for name, (entries, choices) in found.items():
        agree("the reference", choices.reference, name)
        agree("the resampling", dataclasses.asdict(choices.resampling), name)
        for e in entries:
            cell = (e.row, e.ipc, e.seed, e.protocol)
            if cell in owners:
                raise UserError(
                    f"{owners[cell]} and {name} both have {e.row} of {e.ipc} images per class, "
                    f"seed {e.seed}, under {e.protocol}; name one of them"
                )
            owners[cell] = name
            for key in ("config", "protocol"):
                what = f"the {key} of {e.row} at {e.ipc} under {e.protocol}"
                agree(what, e.summary.get(key), name)
            for parts in e.right.values():
                for part, by_student in parts.items():
                    for packed in (one for seeds in by_student.values() for one in seeds if one):
                        images = len(answers.unpack_right(packed))
                        agree(f"the number of images of {part}", images, name)
    whole = [choices for _, choices in found.values()]
    choices = dataclasses.replace(
        whole[0],
        selected_real=tuple(dict.fromkeys(name for c in whole for name in c.selected_real)),
        controls=tuple(dict.fromkeys(row for c in whole for row in c.controls)),
    )
    return [entry for entries, _ in found.values() for entry in entries], choices


def _as_now(cell: Mapping[str, Any]) -> Mapping[str, Any]:
    """A cell's record; squeeze was one number of a set before it was told by networks."""
    costs = {}
    for name, spent in cell.get("costs", {}).items():
        if "networks" not in spent and "squeeze" in spent["seconds"]:
            networks = {"squeeze": spent["seconds"]["squeeze"]}
            spent = {
                **spent,
                "networks": networks,
                "seconds": _without(spent["seconds"], "squeeze"),
            }
        costs[name] = spent
    return {**cell, "costs": costs}


def columns(entries: Sequence[Entry]) -> dict[Column, list[Tested]]:
    """What students said, by protocol, IPC and student, in the order of the tables."""
    found: dict[Column, dict[str, Tested]] = {}
    for e in entries:
        soft = of(e.summary, "protocol", "loss") != "ce"
        for name, parts in e.right.items():
            label = label_of(e.row, name, e.protocol)
            for part, by_student in parts.items():
                for student, seeds in by_student.items():
                    sets = found.setdefault(Column(e.protocol, e.ipc, student), {})
                    tested = sets.setdefault(label, Tested(label, e.row, name, {}, soft))
                    tested.right.setdefault(part, {}).update(
                        ((e.seed, i), answers.unpack_right(packed))
                        for i, packed in enumerate(seeds)
                        if packed is not None
                    )
    protocols = list(dict.fromkeys(e.protocol for e in entries))
    order = sorted(found, key=lambda column: (protocols.index(column.protocol), *column[1:]))
    return {column: list(found[column].values()) for column in order}


def label_of(row: str, name: str, protocol: str) -> str:
    """What the tables call a row's set of images."""
    if name == SYNTHETIC:
        return row_label(row)
    return f"{row}: {row_label(name)}" if protocol == OWN else row_label(name)


def of(tree: Any, *path: str) -> Any:
    """What is at a path of keys; None where there is no such path."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def mean(values: Any) -> float | None:
    """Of the known values; None where there is none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
