"""How certain a comparison's differences are: every set against what it should be measured by.

For every protocol, IPC and student: the accuracy of each set of images, and its difference from a
row that was chosen, from the best method and from the best selection of real images, each with
its interval (``analysis.intervals``). Who is best is said by the images that were held out of
training, where there are any, and else by the test images themselves, which flatters the best.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prism_jax.analysis.intervals import Drawn, Interval, Resampling
from prism_jax.analysis.words import SYNTHETIC, UNKNOWN, percent

TEST, HELD_OUT = "test", "held_out"
REFERENCE, BEST, SELECTED = "reference", "best method", "best selected real"


@dataclasses.dataclass(frozen=True)
class Choices:
    """What sets are measured by.

    Attributes:
      resampling: how intervals are drawn.
      reference: a row, or a row's set as "d4m/medoids"; None: none.
      selected_real: rows and sets that are selected real images.
      controls: rows that are no methods.
    """

    resampling: Resampling = Resampling()
    reference: str | None = None
    selected_real: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Tested:
    """A set of images under one protocol, and what one student's seeds said.

    Attributes:
      label: as the tables have it.
      row, name: whose set it is.
      right: bool (N,) by part of the real images and by seed.
    """

    label: str
    row: str
    name: str
    right: dict[str, dict[tuple[int, int], np.ndarray]]

    def is_one_of(self, names: Sequence[str]) -> bool:
        """Whether it is meant by one of "row", "set" and "row/set"."""
        own = {self.row} if self.name == SYNTHETIC else {self.name, f"{self.row}/{self.name}"}
        return not own.isdisjoint(names)

    def top1(self, part: str) -> float:
        return float(np.mean([right.mean() for right in self.right[part].values()]))


class Column(NamedTuple):
    """One protocol, IPC and student."""

    protocol: str
    ipc: int
    student: str


class Line(NamedTuple):
    """A set's accuracy, its difference from each that it is measured by, and held-out accuracy."""

    tested: Tested
    accuracy: Interval
    differences: dict[str, Interval | None]
    held_out: float | None


class Table(NamedTuple):
    """A column's sets, and what they are measured by: the label of each, by why."""

    column: Column
    lines: list[Line]
    against: dict[str, str]
    chosen_by: str


def tables(columns: Mapping[Column, Sequence[Tested]], choices: Choices) -> Iterator[Table]:
    """The columns in which answers were kept."""
    for column, sets in columns.items():
        known = [s for s in sets if s.right.get(TEST)]
        if not known:
            continue
        part = HELD_OUT if all(s.right.get(HELD_OUT) for s in known) else TEST
        against = _against(known, choices, part)
        drawn = Drawn({s.label: s.right[TEST] for s in known}, choices.resampling)
        lines = [
            Line(
                s,
                drawn.accuracy(s.label),
                {
                    why: None if other == s.label else drawn.difference(s.label, other)
                    for why, other in against.items()
                },
                s.top1(HELD_OUT) if s.right.get(HELD_OUT) else None,
            )
            for s in known
        ]
        yield Table(column, lines, against, part)


def _against(sets: Sequence[Tested], choices: Choices, part: str) -> dict[str, str]:
    def best(among: Sequence[Tested]) -> list[Tested]:
        return [max(among, key=lambda s: s.top1(part))] if among else []

    selected = [s for s in sets if s.is_one_of(choices.selected_real)]
    methods = [
        s
        for s in sets
        if s.name == SYNTHETIC and not s.is_one_of((*choices.controls, *choices.selected_real))
    ]
    chosen = [s for s in sets if choices.reference and s.is_one_of([choices.reference])]
    found = {REFERENCE: chosen[:1], BEST: best(methods), SELECTED: best(selected)}
    return {why: some[0].label for why, some in found.items() if some}


def points(interval: Interval | None, *, signed: bool = True) -> str:
    """An interval in points of a per cent; one of a difference that holds zero begins with ~."""
    if interval is None:
        return UNKNOWN
    value, low, high = (100 * x for x in interval[:3])
    if not signed:
        return f"{value:.1f} [{low:.1f}, {high:.1f}]"
    return f"{'~ ' if interval.holds_zero else ''}{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def markdown(found: Sequence[Table], choices: Choices, imported: Sequence[str] = ()) -> str:
    """Every column as a table, and what the intervals are.

    Args:
      imported: teachers that were trained elsewhere.
    """
    how = choices.resampling
    lines = [
        "### How certain the differences are", "",
        f"Intervals of {100 * how.level:g} %, paired by seed and by test image: both are drawn "
        f"with replacement, {how.resamples:,} times. ~ marks a difference whose interval holds "
        f"zero. With few seeds an interval knows little of how much they differ, with one nothing.",
    ]  # fmt: skip
    if imported and any(table.chosen_by == HELD_OUT for table in found):
        lines[-1] += (
            f" {', '.join(imported)} were not trained here, and may have seen the held-out images."
        )
    for table in found:
        seeds = sorted({line.accuracy.seeds for line in table.lines})
        by = "the held-out images" if table.chosen_by == HELD_OUT else "these test images"
        held = table.chosen_by == HELD_OUT
        heads = ["", "top-1", *(["held out"] if held else [])]
        heads += [f"- {label} ({why})" for why, label in table.against.items()]
        lines += [
            "", f"#### {table.column.protocol}, IPC {table.column.ipc}, {table.column.student}", "",
            f"{' or '.join(map(str, seeds))} seed(s), {table.lines[0].accuracy.images:,} test "
            f"images; who is best is chosen by {by}.", "",
            row(heads), row([":--", *["--:"] * (len(heads) - 1)]),
        ]  # fmt: skip
        for line in table.lines:
            cells = [line.tested.label, points(line.accuracy, signed=False)]
            if held:
                cells.append(UNKNOWN if line.held_out is None else percent(line.held_out))
            lines.append(row([*cells, *(points(d) for d in line.differences.values())]))
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


FIELDS = (
    "protocol", "ipc", "student", "method", "set", "against", "why", "chosen_by", "value", "low",
    "high", "holds_zero", "seeds", "images",
)  # fmt: skip


def records(found: Sequence[Table]) -> Iterator[dict[str, Any]]:
    """Every interval, with the fields ``FIELDS``; of an accuracy there is nothing against it."""
    for table in found:
        for line in table.lines:
            for why, interval in [(None, line.accuracy), *line.differences.items()]:
                if interval is None:
                    continue
                numbers = interval._asdict()
                yield {
                    **table.column._asdict(),
                    "method": line.tested.row,
                    "set": line.tested.name,
                    "against": table.against[why] if why else None,
                    "why": why,
                    "chosen_by": table.chosen_by if why in (BEST, SELECTED) else None,
                    **numbers,
                    "holds_zero": interval.holds_zero if why else None,
                }


def table_csv(found: Sequence[Table]) -> str:
    """Every interval, one line each; unknown is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(found))
    return file.getvalue()
