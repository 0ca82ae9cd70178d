"""The tables that a person reads in place of summaries: one run's, and several side by side."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_jax.analysis.words import (
    SYNTHETIC,
    UNKNOWN,
    accuracy,
    accuracy_rows,
    facts,
    ipc,
    number,
    protocol,
    seconds,
    size,
    spread_note,
    students,
    teacher_rows,
    title,
)


def table(summary: Mapping[str, Any]) -> RenderableType:
    """The one table that ends a run, for a terminal."""
    parts: list[RenderableType] = [Text(title(summary), style="bold")]
    if names := students(summary):
        accuracies = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        accuracies.add_column("top-1 on real test images, %")
        for name in names:
            accuracies.add_column(name, justify="right")
        for row in accuracy_rows(summary):
            cells = [row.label, *map(accuracy, row.entries)]
            accuracies.add_row(*cells, style="bold cyan" if row.name == SYNTHETIC else "")
        parts += ["", accuracies, Text(spread_note(summary), style="dim")]
        if how := protocol(summary):
            parts.append(Text(how, style="dim"))
    if rows := teacher_rows(summary):
        teachers = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
        teachers.add_column("teacher")
        for heading in ("top-1", "drawn", "CE start → end", "BN start → end"):
            teachers.add_column(heading, justify="right")
        for of in rows:
            name = f"{of.name} (primary)" if of.primary else of.name
            teachers.add_row(name, of.top1, of.drawn, of.cross_entropy, of.bn_alignment)
        parts += ["", teachers]
    if found := facts(summary):
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim")
        for name, value in found.items():
            grid.add_row(name, value)
        parts += ["", grid]
    return Group(*parts)


def text(summary: Mapping[str, Any]) -> str:
    """The same table as plain text, as wide as it needs to be."""
    written = io.StringIO()
    console = Console(file=written, width=1000, color_system=None, force_jupyter=False)
    console.print(table(summary), highlight=False)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Compare runs in two Markdown tables: accuracies with their spread, and what they cost.

    A control that several runs share, with equal numbers, stands once; where the numbers differ,
    its row names the config; so do two synthetic sets of one method, always. The full real set
    comes last.
    """
    names = list(dict.fromkeys(name for summary in summaries for name in students(summary)))
    # what -> cells, and of a set that is no control which summary's -> config
    rows: dict[tuple[str, str], dict[tuple[tuple[str, ...], int | None], str]] = {}
    for at, summary in enumerate(summaries):
        for row in accuracy_rows(summary):
            entries = dict(zip(students(summary), row.entries, strict=True))
            cells = tuple(accuracy(entries.get(name)) for name in names)
            label = f"**{summary['method']}**" if row.name == SYNTHETIC else row.label
            shown = UNKNOWN if row.name == "full_real" else ipc(summary)
            key = cells, at if row.name == SYNTHETIC else None
            rows.setdefault((shown, label), {}).setdefault(key, summary["config"])
    accuracies = [
        (shown, label if len(found) == 1 else f"{label} (`{config}`)", *cells)
        for (shown, label), found in sorted(rows.items(), key=lambda item: item[0][0] == UNKNOWN)
        for (cells, _), config in found.items()
    ]
    notes = list(dict.fromkeys(spread_note(summary) for summary in summaries))
    costs = [
        (
            f"`{summary['config']}`",
            ipc(summary),
            seconds(summary.get("recover", {}).get("seconds_per_image")),
            size(summary.get("relabel", {}).get("bytes")),
            *(
                number(summary.get("analyse", {}).get("intra_class_cosine", {}).get(key))
                for key in ("synthetic", "initial", "real")
            ),
        )
        for summary in summaries
    ]
    return "\n".join(
        [
            *_markdown_table(("IPC", "trained on", *names), accuracies, left=2),
            "",
            f"Top-1 on real test images in per cent; {'; '.join(notes)}.",
            "",
            *_markdown_table(
                ("config", "IPC", "recover, per image", "soft labels",
                 "cosine synthetic", "initial", "real"),
                costs,
                left=1,
            ),
            "",
        ]
    )  # fmt: skip


def markdown_teachers(summaries: Sequence[Mapping[str, Any]]) -> str:
    """What the teachers did in each run: share drawn, and their terms at start and end."""
    rows = []
    for summary in summaries:
        distance = summary.get("recover", {}).get("distance_from_initial")
        for index, row in enumerate(teacher_rows(summary)):
            name = f"{row.name} (primary)" if row.primary else row.name
            rows.append(
                (
                    f"`{summary['config']}`" if index == 0 else "",
                    name,
                    row.top1,
                    row.drawn,
                    row.cross_entropy,
                    row.bn_alignment,
                    number(distance) if index == 0 else "",
                )
            )
    header = (
        "config", "teacher", "top-1", "drawn", "CE start → end", "BN start → end",
        "distance from initial",
    )  # fmt: skip
    return "\n".join(_markdown_table(header, rows, left=2)) + "\n"


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "|".join([":--"] * left + ["--:"] * (len(header) - left)) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
