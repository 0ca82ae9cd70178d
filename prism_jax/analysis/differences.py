"""How certain a comparison's differences are: every set against what it should be measured by.

For every protocol, IPC and student: the accuracy of each set of images, and its difference from a
row that was chosen, from the best method and from the best selection of real images, each with
its interval (``analysis.intervals``). Where every method has labels and training of its own, each
is measured by real images with the same ones: its own controls. Who is best is said by the images
that were held out of training, where there are any, and else by the test images themselves, which
flatters the best; by the seeds that all have. Where all share none, it is said of those that share
some: a seed may be easier than another.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prism_jax.analysis.intervals import Drawn, Interval, Resampling
from prism_jax.analysis.words import OWN, SYNTHETIC, UNKNOWN, percent

TEST, HELD_OUT = "test", "held_out"
REFERENCE, BEST, SELECTED = "reference", "best method", "best selected real"
OWN_RANDOM, OWN_SELECTED = "its random real images", "its best selected real images"


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
      soft: whether the row's students learn from soft labels.
    """

    label: str
    row: str
    name: str
    right: dict[str, dict[tuple[int, int], np.ndarray]]
    soft: bool = True

    def is_one_of(self, names: Sequence[str]) -> bool:
        """Whether it is meant by one of "row", "set" and "row/set"."""
        own = {self.row} if self.name == SYNTHETIC else {self.name, f"{self.row}/{self.name}"}
        return not own.isdisjoint(names)

    def top1(self, part: str, seeds: Collection[tuple[int, int]] | None = None) -> float:
        """Of some seeds, by default all."""
        right = self.right[part]
        return float(np.mean([right[s].mean() for s in (seeds or right)]))


class Column(NamedTuple):
    """One protocol, IPC and student."""

    protocol: str
    ipc: int
    student: str


class Line(NamedTuple):
    """A set's accuracy, its difference from each that it is measured by, and held-out accuracy.

    ``against`` are the labels of those, by why.
    """

    tested: Tested
    accuracy: Interval
    differences: dict[str, Interval | None]
    held_out: float | None
    against: dict[str, str]


class Table(NamedTuple):
    """A column's sets, and what they are measured by: the label of each, by why.

    None: each set has its own. ``apart`` are the labels of those that share no seed with the ones
    among which the best was chosen.
    """

    column: Column
    lines: list[Line]
    against: dict[str, str | None]
    chosen_by: str
    apart: tuple[str, ...] = ()


def tables(columns: Mapping[Column, Sequence[Tested]], choices: Choices) -> Iterator[Table]:
    """The columns in which answers were kept."""
    for column, sets in columns.items():
        known = [s for s in sets if s.right.get(TEST)]
        if not known:
            continue
        part = HELD_OUT if all(s.right.get(HELD_OUT) for s in known) else TEST
        own = column.protocol == OWN
        against = None if own else _against(known, choices, part)
        drawn = Drawn({s.label: s.right[TEST] for s in known}, choices.resampling)
        lines = []
        for s in known:
            by = _own_controls(s, known, choices, part) if against is None else against
            differing = {
                why: None if other == s.label else drawn.difference(s.label, other)
                for why, other in by.items()
            }
            held_out = s.top1(HELD_OUT) if s.right.get(HELD_OUT) else None
            lines.append(Line(s, drawn.accuracy(s.label), differing, held_out, by))
        whys = dict.fromkeys(why for line in lines for why in line.against)
        heads = {why: None if against is None else against[why] for why in whys}
        among = [_candidates(known, choices)]
        if own:
            among = [_own_candidates(s, known, choices) for s in known]
        apart = dict.fromkeys(
            label for of in among for some in of.values() for label in _apart(some, part)
        )
        yield Table(column, lines, heads, part, tuple(apart))


def _candidates(sets: Sequence[Tested], choices: Choices) -> dict[str, list[Tested]]:
    """Among which the best is chosen, by why."""
    methods = [
        s
        for s in sets
        if s.name == SYNTHETIC and not s.is_one_of((*choices.controls, *choices.selected_real))
    ]
    return {BEST: methods, SELECTED: [s for s in sets if s.is_one_of(choices.selected_real)]}


def _against(sets: Sequence[Tested], choices: Choices, part: str) -> dict[str, str]:
    chosen = [s for s in sets if choices.reference and s.is_one_of([choices.reference])]
    candidates = _candidates(sets, choices).items()
    found = {REFERENCE: chosen[:1]} | {why: _best(among, part) for why, among in candidates}
    return {why: some[0].label for why, some in found.items() if some}


def _own_candidates(
    of: Tested, sets: Sequence[Tested], choices: Choices
) -> dict[str, list[Tested]]:
    """Real images with the labels and the training of a method's images."""
    if of.name != SYNTHETIC or of.is_one_of(choices.controls):
        return {}
    controls = [s for s in sets if s.row == of.row and s is not of]
    random = "random_real" if of.soft else "random_real_hard"
    return {
        OWN_RANDOM: [s for s in controls if s.name == random],
        OWN_SELECTED: [s for s in controls if s.is_one_of(choices.selected_real)],
    }


def _own_controls(
    of: Tested, sets: Sequence[Tested], choices: Choices, part: str
) -> dict[str, str]:
    candidates = _own_candidates(of, sets, choices).items()
    found = {why: _best(among, part) for why, among in candidates}
    return {why: some[0].label for why, some in found.items() if some}


def _best(among: Sequence[Tested], part: str) -> list[Tested]:
    """The best of some sets, or none; by the seeds that all of them have."""
    comparable = _comparable(among, part)
    if not comparable:
        return []
    shared = _shared(comparable, part)
    return [max(comparable, key=lambda s: s.top1(part, shared))]


def _shared(sets: Sequence[Tested], part: str) -> set[tuple[int, int]]:
    return set.intersection(*(set(s.right[part]) for s in sets))


def _comparable(among: Sequence[Tested], part: str) -> list[Tested]:
    """The most of some sets that share a seed, and of equally many those that share most."""
    if len(among) < 2 or _shared(among, part):
        return list(among)
    seeds = dict.fromkeys(seed for s in among for seed in s.right[part])
    groups = [[s for s in among if seed in s.right[part]] for seed in seeds]
    largest = max(groups, key=lambda sets: (len(sets), len(_shared(sets, part))))
    return largest if len(largest) > 1 else []


def _apart(among: Sequence[Tested], part: str) -> list[str]:
    """The labels of those that are not compared."""
    compared = {s.label for s in _comparable(among, part)}
    return [s.label for s in among if s.label not in compared]


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
    accuracies = [line.accuracy for table in found for line in table.lines]
    if any(a.students > a.seeds > 1 for a in accuracies):
        lines[-1] += " A seed of images is drawn with all of its students."
    if any(a.students > a.seeds == 1 for a in accuracies):
        lines[-1] += (
            " Where all students are on the images of one seed, they are drawn, and an interval "
            "says nothing of images of another seed."
        )
    if imported and any(table.chosen_by == HELD_OUT for table in found):
        lines[-1] += (
            f" {', '.join(imported)} were not trained here, and may have seen the held-out images."
        )
    if any(table.column.protocol == OWN for table in found):
        lines[-1] += (
            f" Under the protocol `{OWN}` every method has labels and training of its own, so that "
            f"it is measured by real images with the same ones, and not by other methods."
        )
    for table in found:
        seeds, students = (
            sorted({getattr(line.accuracy, of) for line in table.lines})
            for of in ("seeds", "students")
        )
        by = "the held-out images" if table.chosen_by == HELD_OUT else "these test images"
        held = table.chosen_by == HELD_OUT
        heads = ["", "top-1", *(["held out"] if held else [])]
        against = table.against.items()
        heads += [f"- {label} ({why})" if label else f"- {why}" for why, label in against]
        lines += [
            "", f"#### {table.column.protocol}, IPC {table.column.ipc}, {table.column.student}", "",
            f"{' or '.join(map(str, seeds))} seed(s) of images, "
            f"{' or '.join(map(str, students))} student(s), {table.lines[0].accuracy.images:,} "
            f"test images; who is best is chosen by {by}{_but(table.apart)}.", "",
            row(heads), row([":--", *["--:"] * (len(heads) - 1)]),
        ]  # fmt: skip
        for line in table.lines:
            few = ""
            if line.accuracy.seeds < seeds[-1]:
                few = f" ({line.accuracy.seeds} of {seeds[-1]} seeds)"
            elif line.accuracy.students < students[-1]:
                few = f" ({line.accuracy.students} of {students[-1]} students)"
            cells = [
                line.tested.label + few,
                points(line.accuracy, signed=False),
            ]
            if held:
                cells.append(UNKNOWN if line.held_out is None else percent(line.held_out))
            lines.append(row([*cells, *(points(line.differences.get(w)) for w in table.against)]))
    return "\n".join(lines) + "\n"


def _but(apart: Sequence[str]) -> str:
    return f", but not among {', '.join(apart)}, for want of seeds in common" if apart else ""


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


FIELDS = (
    "protocol", "ipc", "student", "method", "set", "against", "why", "chosen_by", "value", "low",
    "high", "holds_zero", "seeds", "students", "images",
)  # fmt: skip


def records(found: Sequence[Table]) -> Iterator[dict[str, Any]]:
    """Every interval, with the fields ``FIELDS``; of an accuracy there is nothing against it."""
    for table in found:
        for line in table.lines:
            accuracy: list[tuple[str | None, Interval | None]] = [(None, line.accuracy)]
            for why, interval in [*accuracy, *line.differences.items()]:
                if interval is None:
                    continue
                numbers = interval._asdict()
                yield {
                    **table.column._asdict(),
                    "method": line.tested.row,
                    "set": line.tested.name,
                    "against": line.against[why] if why else None,
                    "why": why,
                    "chosen_by": table.chosen_by if why in (BEST, SELECTED, OWN_SELECTED) else None,
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
