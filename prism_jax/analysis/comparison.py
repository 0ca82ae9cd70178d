"""The tables and the figure of a comparison: methods by IPC, student and protocol."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from prism_jax.analysis import differences
from prism_jax.analysis.differences import Choices, Column, Tested
from prism_jax.analysis.differences import row as row_of
from prism_jax.analysis.figures import COLOURS, QUIET, styled
from prism_jax.analysis.intervals import Resampling
from prism_jax.analysis.words import (
    SYNTHETIC,
    UNKNOWN,
    number,
    percent,
    row_label,
    seconds,
    size,
)
from prism_jax.config import CONTROLS
from prism_jax.data import answers
from prism_jax.errors import UserError

OWN = "own"


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
      UserError: the records are of another version.
    """
    if found.get("schema") != 1:
        raise UserError(
            f"these records have schema {found.get('schema')!r}, and this version of prism_jax "
            f"reads 1"
        )
    choices = {k: tuple(v) if isinstance(v, list) else v for k, v in found["choices"].items()}
    choices["resampling"] = Resampling(**choices["resampling"])
    return [entry_of(cell) for cell in found["cells"]], Choices(**choices)


def documents(
    entries: Sequence[Entry], choices: Choices, *, cost: str = "seconds", whole: bool = True
) -> dict[str, bytes]:
    """The files of a comparison by their names.

    Args:
      cost: of ``COSTS``, the axis of the figure.
      whole: with the figure and the intervals, which take seconds.
    """
    found = {
        "table.md": markdown(entries).encode(),
        "table.tex": latex(entries).encode(),
        "table.csv": table_csv(entries).encode(),
    }
    if whole:
        certain = list(differences.tables(columns(entries), choices))
        imported = sorted({name for e in entries for name in e.imported})
        if certain:
            said = differences.markdown(certain, choices, imported)
            found["table.md"] += f"\n{said}".encode()
        found["differences.csv"] = differences.table_csv(certain).encode()
        found["accuracy_over_cost.png"] = accuracy_over_cost(entries, cost)
    return found


# --- numbers --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Grid:
    """One protocol's accuracies: by row and by (IPC, student), those of all seeds."""

    protocol: str
    columns: list[tuple[int, str]]
    rows: dict[str, dict[tuple[int, str], list[float]]]


def grids(entries: Sequence[Entry]) -> list[Grid]:
    """Accuracies by protocol; controls are rows, under the method whose labels they have."""
    found = []
    for protocol in dict.fromkeys(e.protocol for e in entries):
        mine = [e for e in entries if e.protocol == protocol]
        rows: dict[str, dict[tuple[int, str], list[float]]] = {}
        columns = []
        for row in dict.fromkeys(e.row for e in mine):
            for entry in (e for e in mine if e.row == row):
                for name, students in entry.sets.items():
                    label = _label(row, name, protocol)
                    for student, result in students.items():
                        column = entry.ipc, student
                        columns.append(column)
                        values = rows.setdefault(label, {}).setdefault(column, [])
                        values += result["top1_per_seed"]
        found.append(Grid(protocol, sorted(set(columns)), rows))
    return found


def columns(entries: Sequence[Entry]) -> dict[Column, list[Tested]]:
    """What students said, by protocol, IPC and student, in the order of the tables."""
    found: dict[Column, dict[str, Tested]] = {}
    for e in entries:
        for name, parts in e.right.items():
            label = _label(e.row, name, e.protocol)
            for part, by_student in parts.items():
                for student, seeds in by_student.items():
                    sets = found.setdefault(Column(e.protocol, e.ipc, student), {})
                    tested = sets.setdefault(label, Tested(label, e.row, name, {}))
                    tested.right.setdefault(part, {}).update(
                        ((e.seed, i), answers.unpack_right(packed))
                        for i, packed in enumerate(seeds)
                        if packed is not None
                    )
    protocols = list(dict.fromkeys(e.protocol for e in entries))
    order = sorted(found, key=lambda column: (protocols.index(column.protocol), *column[1:]))
    return {column: list(found[column].values()) for column in order}


def _label(row: str, name: str, protocol: str) -> str:
    if name == SYNTHETIC:
        return row_label(row)
    return f"{row}: {row_label(name)}" if protocol == OWN else row_label(name)


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation in per cent."""
    known = [value for value in values if value is not None]
    if not known:
        return UNKNOWN
    mean = percent(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {percent(statistics.stdev(known))}"


def costs(entries: Sequence[Entry]) -> list[list[str]]:
    """What images and labels of every method take, by IPC: means over seeds."""
    rows = []
    for row, ipc in dict.fromkeys((e.row, e.ipc) for e in entries):
        mine = [e for e in entries if (e.row, e.ipc) == (row, ipc)]
        labels = {e.protocol: _of(e.summary, "relabel", "bytes") for e in mine}
        rows.append(
            [
                row,
                str(ipc),
                seconds(_mean(_of(e.summary, "recover", "seconds_per_image") for e in mine)),
                size(_mean(e.peak_bytes for e in mine)),
                ", ".join(f"{size(count)} ({protocol})" for protocol, count in labels.items()),
                _similarity(mine),
            ]
        )
    return rows


COST_HEADS = ("method", "IPC", "recover per image", "memory", "labels", "intra-class similarity")


COST_NOTE = (
    "Seconds are means over seeds, as measured, with compiling: squeeze of the networks that made "
    "images and labels (unknown where one was imported), recover and relabel of the whole set, "
    "training of one student. Bytes are those of uncompressed pixels and of labels as stored, and "
    "their share is of the real training set's pixels; per MB: points of top-1."
)


class Cost(NamedTuple):
    """A cost that the figure can have as its axis: its words, and of a student on a set."""

    words: str
    of: Callable[[Entry, str, str], float | None]


def _stage_seconds(entry: Entry, name: str, student: str) -> dict[str, float | None]:
    """Seconds of every stage, and of training one student."""
    trained = entry.sets.get(name, {}).get(student, {})
    in_all, seeds = trained.get("seconds"), len(trained.get("top1_per_seed", ()))
    found = {
        stage: _of(entry.costs, name, "seconds", stage)
        for stage in ("squeeze", "recover", "relabel")
    }
    return found | {"validate": None if in_all is None or not seeds else in_all / seeds}


def _all_seconds(entry: Entry, name: str, student: str) -> float | None:
    return _sum(_stage_seconds(entry, name, student).values())


def _all_bytes(entry: Entry, name: str, student: str) -> float | None:
    del student
    return _sum(_of(entry.costs, name, "bytes", part) for part in ("images", "labels"))


def _sum(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else math.fsum(v for v in known if v is not None)


COSTS = {
    "seconds": Cost("seconds of squeeze, recover, relabel and one student", _all_seconds),
    "bytes": Cost("bytes of images and labels", _all_bytes),
    "recover": Cost(
        "seconds per image in recover",
        lambda entry, name, student: _of(entry.summary, "recover", "seconds_per_image"),
    ),
    "memory": Cost("bytes of a batch in recover", lambda entry, name, student: entry.peak_bytes),
}


def accuracies_and_costs(entries: Sequence[Entry]) -> dict[tuple[str, int], list[list[str]]]:
    """A table by protocol and IPC, its head first: what every set takes, and what it gives."""
    tables = {}
    for key in dict.fromkeys((e.protocol, e.ipc) for e in entries):
        mine = [e for e in entries if (e.protocol, e.ipc) == key and e.costs]
        students = list(dict.fromkeys(s for e in mine for found in e.sets.values() for s in found))
        rows = []
        for row, name in dict.fromkeys((e.row, name) for e in mine for name in e.sets):
            here = [e for e in mine if e.row == row and name in e.sets]
            stages = [_stage_seconds(e, name, "") for e in here]
            held, real = (
                _mean(of(e) for e in here)
                for of in (
                    lambda e, name=name: _all_bytes(e, name, ""),
                    lambda e, name=name: _of(e.costs, name, "bytes", "real"),
                )
            )
            cells = [seconds(_mean(s[stage] for s in stages)) for stage in STAGES]
            cells += [size(held), f"{held / real:.2%}" if held and real else UNKNOWN]
            for student in students:
                top1 = _mean(_of(e.sets[name], student, "top1") for e in here)
                took = _mean(_stage_seconds(e, name, student)["validate"] for e in here)
                rate = UNKNOWN if top1 is None or not held else number(1e8 * top1 / held)
                cells += [UNKNOWN if top1 is None else percent(top1), seconds(took), rate]
            rows.append([_label(row, name, key[0]), *cells])
        if rows:
            heads = ["", *STAGES, "images + labels", "of the real"]
            heads += [h for s in students for h in (s, f"{s}: training", f"{s}: per MB")]
            tables[key] = [heads, *rows]
    return tables


STAGES = ("squeeze", "recover", "relabel")


def _similarity(entries: Sequence[Entry]) -> str:
    values = [_of(e.summary, "analyse", "intra_class_cosine", "synthetic") for e in entries]
    return number(_mean(values))


def _of(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# --- documents ------------------------------------------------------------------------------


def markdown(entries: Sequence[Entry]) -> str:
    """All tables as Markdown."""
    lines = [f"Top-1 in per cent, {_seeds(entries)}; the last epoch's, not the best one's.", ""]
    for grid in grids(entries):
        lines += [f"### Protocol: {grid.protocol}", "", *_markdown_grid(grid), ""]
    lines += ["### Costs", "", row_of(COST_HEADS)]
    lines += [row_of([":--", *["--:"] * (len(COST_HEADS) - 1)])]
    lines += [row_of(row) for row in costs(entries)]
    for (protocol, ipc), table in accuracies_and_costs(entries).items():
        lines += ["", f"#### Accuracy and its costs: {protocol}, IPC {ipc}", ""]
        lines += [row_of(table[0]), row_of([":--", *["--:"] * (len(table[0]) - 1)])]
        lines += [row_of(row) for row in table[1:]]
    lines += ["", *textwrap.wrap(COST_NOTE, 100, break_on_hyphens=False), ""]
    return "\n".join(lines)


def _markdown_grid(grid: Grid) -> Iterator[str]:
    yield row_of(["", *(f"IPC {ipc}, {student}" for ipc, student in grid.columns)])
    yield row_of([":--", *["--:"] * len(grid.columns)])
    for label, results in grid.rows.items():
        yield row_of([label, *(spread(results.get(column, ())) for column in grid.columns)])


def _seeds(entries: Sequence[Entry]) -> str:
    counts = collections.Counter((e.row, e.ipc, e.protocol) for e in entries).values()
    images = max(counts) if len(set(counts)) == 1 else f"up to {max(counts)}"
    students = max(len(r["top1_per_seed"]) for e in entries for r in e.sets[SYNTHETIC].values())
    if (images, students) == (1, 1):
        return "one seed"
    return (
        f"mean ± standard deviation over {images} seed(s) of images and labels, with {students} of "
        f"students on each; a number without a deviation is of one"
    )


def latex(entries: Sequence[Entry]) -> str:
    """The accuracies as LaTeX tables (booktabs), one per protocol."""
    tables = []
    for grid in grids(entries):
        ipcs = list(dict.fromkeys(ipc for ipc, _ in grid.columns))
        heads = [
            rf"\multicolumn{{{sum(i == ipc for i, _ in grid.columns)}}}{{c}}{{IPC {ipc}}}"
            for ipc in ipcs
        ]
        lines = [
            f"% protocol: {grid.protocol}",
            rf"\begin{{tabular}}{{l{'r' * len(grid.columns)}}}",
            r"\toprule",
            " & ".join(["", *heads]) + r" \\",
            " & ".join(["", *(_tex(student) for _, student in grid.columns)]) + r" \\",
            r"\midrule",
        ]
        for label, results in grid.rows.items():
            cells = [spread(results.get(c, ())).replace(" ± ", r" $\pm$ ") for c in grid.columns]
            lines.append(" & ".join([_tex(label), *cells]) + r" \\")
        tables.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(tables) + "\n"


def _tex(text: str) -> str:
    return text.replace("_", r"\_").replace("&", r"\&").replace("%", r"\%")


FIELDS = (
    "method", "ipc", "protocol", "seed", "set", "student", "top1", "top5", "best_top1",
    "top1_per_seed", "held_out", "recover_seconds_per_image", "recover_peak_bytes", "label_bytes",
    "intra_class_cosine", "squeeze_seconds", "recover_seconds", "relabel_seconds",
    "validate_seconds", "bytes", "real_bytes",
)  # fmt: skip


def table_csv(entries: Sequence[Entry]) -> str:
    """Every single result, one line each; unknown is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(FIELDS)
    for e in entries:
        recovered = (_of(e.summary, "recover", "seconds_per_image"), e.peak_bytes)
        similar = _of(e.summary, "analyse", "intra_class_cosine", "synthetic")
        for name, students in e.sets.items():
            for student, result in students.items():
                numbers = [result[key] for key in ("top1", "top5", "best_top1")]
                numbers += [" ".join(map(str, result["top1_per_seed"])), result.get("held_out")]
                labels = _of(e.costs, name, "bytes", "labels")
                if not e.costs and name == SYNTHETIC:
                    labels = _of(e.summary, "relabel", "bytes")
                cost = (
                    *recovered, labels, similar, *_stage_seconds(e, name, student).values(),
                    _all_bytes(e, name, student), _of(e.costs, name, "bytes", "real"),
                )  # fmt: skip
                writer.writerow([e.row, e.ipc, e.protocol, e.seed, name, student, *numbers, *cost])
    return file.getvalue()


# --- the figure -----------------------------------------------------------------------------


MARKERS = "osD^v"  # one for every time that the colours come again


@styled
def accuracy_over_cost(entries: Sequence[Entry], cost: str = "seconds") -> Figure:
    """Accuracy over a cost of ``COSTS``: a panel per protocol and IPC.

    The first student's, with the standard deviation over seeds; a method whose cost is not known
    stands at the left edge, controls are lines.
    """
    panels = list(dict.fromkeys((e.protocol, e.ipc) for e in entries))
    figure = Figure(figsize=(5.2 * min(len(panels), 3), 4.2 * -(-len(panels) // 3)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(len(panels), 3), squeeze=False).ravel()
    rows, handles = list(dict.fromkeys(e.row for e in entries)), {}
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (protocol, ipc) in zip(axes, panels, strict=False):
        mine = [e for e in entries if (e.protocol, e.ipc) == (protocol, ipc)]
        student = next(iter(mine[0].sets[SYNTHETIC]))
        axis.set_title(f"{protocol}, IPC {ipc}, {student}")
        axis.set_xlabel(COSTS[cost].words)
        axis.set_ylabel("top-1, %")
        axis.set_xscale("log")
        taken = {id(e): COSTS[cost].of(e, SYNTHETIC, student) for e in mine}
        least = min((t for t in taken.values() if t), default=1.0)
        for row in dict.fromkeys(e.row for e in mine):
            here = [e for e in mine if e.row == row]
            top1 = _mean(e.sets[SYNTHETIC].get(student, {}).get("top1") for e in here)
            at = _mean(taken[id(e)] for e in here) or least
            if top1 is None:
                continue
            number = rows.index(row)
            values = [100 * v for e in here for v in _top1_per_seed(e, student)]
            (points, *_) = axis.errorbar(
                at, 100 * top1, statistics.stdev(values) if len(values) > 1 else None,
                fmt=MARKERS[number // len(COLOURS) % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)], elinewidth=1, label=row,
            )  # fmt: skip
            handles[row] = points
        for name in CONTROLS:
            values = [e.sets.get(name, {}).get(student, {}).get("top1") for e in mine]
            if protocol != OWN and (level := _mean(values)) is not None:
                axis.axhline(100 * level, color=QUIET, linewidth=1, linestyle=(0, (4, 3)))
                axis.annotate(
                    row_label(name), (1, 100 * level), xycoords=("axes fraction", "data"),
                    ha="right", va="bottom", fontsize=8, color=QUIET,
                )  # fmt: skip
    figure.legend(
        [handles[row] for row in rows if row in handles],
        [row_label(row) for row in rows if row in handles],
        loc="outside right upper", fontsize=9, frameon=False,
    )  # fmt: skip
    return figure


def _top1_per_seed(entry: Entry, student: str) -> list[float]:
    return entry.sets[SYNTHETIC].get(student, {}).get("top1_per_seed", [])
