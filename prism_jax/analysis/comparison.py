"""The tables and the figure of a comparison: methods by IPC, student and protocol."""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from prism_jax.analysis import differences, expenses
from prism_jax.analysis.cells import Entry, columns, label_of, mean, of
from prism_jax.analysis.differences import Choices
from prism_jax.analysis.differences import row as row_of
from prism_jax.analysis.figures import COLOURS, LONGEST_SET, QUIET, short, styled
from prism_jax.analysis.words import (
    OWN,
    SYNTHETIC,
    UNKNOWN,
    number,
    of_fewer,
    percent,
    row_label,
    seconds,
    size,
)
from prism_jax.config import CONTROLS, GENERATED_CONTROLS, HARD_CONTROL, SELECTED_CONTROLS


def documents(
    entries: Sequence[Entry], choices: Choices, *, cost: str = "seconds", whole: bool = True
) -> dict[str, bytes]:
    """The files of a comparison by their names.

    Args:
      cost: of ``expenses.COSTS``, the axis of the figure.
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
                    label = label_of(row, name, protocol)
                    for student, result in students.items():
                        column = entry.ipc, student
                        columns.append(column)
                        values = rows.setdefault(label, {}).setdefault(column, [])
                        values += result["top1_per_seed"]
        found.append(Grid(protocol, sorted(set(columns)), rows))
    return found


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
        labels = {e.protocol: expenses.label_bytes(e, SYNTHETIC) for e in mine}
        rows.append(
            [
                row,
                str(ipc),
                seconds(mean(of(e.summary, "recover", "seconds_per_image") for e in mine)),
                size(mean(e.peak_bytes for e in mine)),
                ", ".join(f"{size(count)} ({protocol})" for protocol, count in labels.items()),
                _similarity(mine),
            ]
        )
    return rows


COST_HEADS = ("method", "IPC", "recover per image", "memory", "labels", "intra-class similarity")


def _similarity(entries: Sequence[Entry]) -> str:
    values = [of(e.summary, "analyse", "intra_class_cosine", "synthetic") for e in entries]
    return number(mean(values))


# --- documents ------------------------------------------------------------------------------


def markdown(entries: Sequence[Entry]) -> str:
    """All tables as Markdown."""
    lines = [f"Top-1 in per cent, {_seeds(entries)}; the last epoch's, not the best one's.", ""]
    for grid in grids(entries):
        lines += [f"### Protocol: {grid.protocol}", "", *_markdown_grid(grid), ""]
    lines += ["### Costs", "", row_of(COST_HEADS)]
    lines += [row_of([":--", *["--:"] * (len(COST_HEADS) - 1)])]
    lines += [row_of(row) for row in costs(entries)]
    for (protocol, ipc), table in expenses.accuracies_and_costs(entries).items():
        lines += ["", f"#### Accuracy and its costs: {protocol}, IPC {ipc}", ""]
        lines += [row_of(table[0]), row_of([":--", *["--:"] * (len(table[0]) - 1)])]
        lines += [row_of(row) for row in table[1:]]
    lines += ["", *textwrap.wrap(expenses.NOTE, 100, break_on_hyphens=False), ""]
    return "\n".join(lines)


def _markdown_grid(grid: Grid) -> Iterator[str]:
    yield row_of(["", *(f"IPC {ipc}, {student}" for ipc, student in grid.columns)])
    yield row_of([":--", *["--:"] * len(grid.columns)])
    for label, results in grid.rows.items():
        yield row_of([label, *(_of_seeds(results.get(c, ()), grid, c) for c in grid.columns)])


def _of_seeds(values: Sequence[float], grid: Grid, column: tuple[int, str]) -> str:
    """Mean and deviation, and of how many seeds where other rows have more."""
    most = max(len(results.get(column, ())) for results in grid.rows.values())
    return spread(values) + of_fewer(len(values), most)


def _seeds(entries: Sequence[Entry]) -> str:
    counts = collections.Counter((e.row, e.ipc, e.protocol) for e in entries).values()
    alike = len(set(counts)) == 1
    images = max(counts) if alike else f"up to {max(counts)} (in brackets: of fewer)"
    students = max(len(r["top1_per_seed"]) for e in entries for r in e.sets[SYNTHETIC].values())
    if (images, students) == (1, 1):
        return "one seed"
    return (
        f"mean ± standard deviation over {images} seed(s) of images and labels, with {students} of "
        f"students on each; a number without a deviation is of one"
    )


def latex(entries: Sequence[Entry]) -> str:
    """The accuracies as LaTeX tables (booktabs), one per protocol; in brackets: of fewer seeds."""
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
            cells = [_of_seeds(results.get(c, ()), grid, c) for c in grid.columns]
            cells = [cell.replace(" ± ", r" $\pm$ ") for cell in cells]
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
        for name, students in e.sets.items():
            made = name in (SYNTHETIC, HARD_CONTROL)  # of what follows only these are the images
            recovered = of(e.summary, "recover", "seconds_per_image") if made else None
            peak = e.peak_bytes if made else None
            similar = of(e.summary, "analyse", "intra_class_cosine", "synthetic") if made else None
            for student, result in students.items():
                numbers = [result[key] for key in ("top1", "top5", "best_top1")]
                numbers += [" ".join(map(str, result["top1_per_seed"])), result.get("held_out")]
                labels = expenses.label_bytes(e, name)
                stages = expenses.stage_seconds(e, name, student).values()
                held, real = (
                    expenses.all_bytes(e, name, student),
                    of(e.costs, name, "bytes", "real"),
                )
                cost = (recovered, peak, labels, similar, *stages, held, real)
                writer.writerow([e.row, e.ipc, e.protocol, e.seed, name, student, *numbers, *cost])
    return file.getvalue()


# --- the figure -----------------------------------------------------------------------------


MARKERS = "osD^v"  # one for every time that the colours come again


@styled
def accuracy_over_cost(entries: Sequence[Entry], cost: str = "seconds") -> Figure:
    """Accuracy over a cost of ``expenses.COSTS``: a panel per protocol, IPC and student.

    With the standard deviation over seeds; a method without a cost, or whose cost is not known, is
    a hollow mark at the left edge, controls are lines. Where that is so of all, the axis has no
    numbers.
    """
    panels = list(dict.fromkeys((e.protocol, e.ipc, s) for e in entries for s in e.sets[SYNTHETIC]))
    figure = Figure(figsize=(5.2 * min(len(panels), 3), 4.2 * -(-len(panels) // 3)))
    figure.set_layout_engine("constrained")
    axes = figure.subplots(-(-len(panels) // 3), min(len(panels), 3), squeeze=False).ravel()
    rows, handles = list(dict.fromkeys(e.row for e in entries)), {}
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (protocol, ipc, student) in zip(axes, panels, strict=False):
        mine = [e for e in entries if (e.protocol, e.ipc) == (protocol, ipc)]
        axis.set_title(f"{short(protocol)}, IPC {ipc}, {short(student)}")
        chosen = expenses.cost_of(cost, mine, SYNTHETIC)
        axis.set_ylabel("top-1, %")
        taken = {id(e): chosen.of(e, SYNTHETIC, student) for e in mine}
        told = [t for t in taken.values() if t]
        note = "" if len(told) == len(mine) else "\n(hollow: none, or not known)"
        axis.set_xlabel(f"{chosen.words}{note}")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axis.xaxis.set_major_formatter(EngFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        least = min(told, default=1.0)
        axis.set_xlim(least / 1.5, 1.5 * max(told, default=1.0))
        if not told:
            axis.set_xticks(())
            axis.set_xticks((), minor=True)
        for row in dict.fromkeys(e.row for e in mine):
            here = [e for e in mine if e.row == row]
            top1 = mean(e.sets[SYNTHETIC].get(student, {}).get("top1") for e in here)
            known = mean(taken[id(e)] for e in here)
            if top1 is None:
                continue
            number = rows.index(row)
            values = [100 * v for e in here for v in _top1_per_seed(e, student)]
            (points, *_) = axis.errorbar(
                known or least, 100 * top1, statistics.stdev(values) if len(values) > 1 else None,
                fmt=MARKERS[number // len(COLOURS) % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)], elinewidth=1, label=row,
                fillstyle="full" if known else "none",
            )  # fmt: skip
            handles[row] = points
        levels: dict[str, float] = {}
        for name in (*CONTROLS, *SELECTED_CONTROLS, *GENERATED_CONTROLS):
            values = [e.sets.get(name, {}).get(student, {}).get("top1") for e in mine]
            if protocol != OWN and (level := mean(values)) is not None:
                levels[name] = 100 * level
                axis.axhline(100 * level, color=QUIET, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        low, high = axis.get_ylim()
        for name, level in apart(levels, (high - low) / 25).items():
            axis.annotate(
                row_label(name), (1, level), xycoords=("axes fraction", "data"), ha="right",
                va="center", fontsize=7, color=QUIET, zorder=1.5,  # over lines, under marks
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
    figure.legend(
        [handles[row] for row in rows if row in handles],
        [short(row_label(row), LONGEST_SET) for row in rows if row in handles],
        loc="outside right upper", fontsize=9, frameon=False,
    )  # fmt: skip
    return figure


def apart(levels: Mapping[str, float], least: float) -> dict[str, float]:
    """Where words beside levels stand so that none covers another: in their order, upwards."""
    found, free = {}, -math.inf
    for name, level in sorted(levels.items(), key=lambda item: item[1]):
        found[name] = max(level, free)
        free = found[name] + least
    return found


def _top1_per_seed(entry: Entry, student: str) -> list[float]:
    return entry.sets[SYNTHETIC].get(student, {}).get("top1_per_seed", [])
