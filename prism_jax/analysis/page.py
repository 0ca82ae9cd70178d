"""The page of several runs: sections of figures and of tables that a person can sort and filter.

It is one file: styles, script and figures are in it, and nothing is fetched.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prism_jax.analysis import report
from prism_jax.analysis.words import UNKNOWN


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by; None: unknown, which comes last."""

    text: str
    value: float | str | None


class Table(NamedTuple):
    """A table.

    Attributes:
      title: what it is of.
      heads: of its columns.
      rows: cells, as many as there are heads; the first names the row.
      note: a sentence on how to read it.
    """

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


class Picture(NamedTuple):
    """A figure.

    Attributes:
      name: of its files, letters and underscores.
      title, caption: for a reader.
      forms: its bytes by format, "png" among them.
      is_chart: its colours may be turned over on a dark page; those of images may not.
    """

    name: str
    title: str
    caption: str
    forms: dict[str, bytes]
    is_chart: bool = True

    @property
    def width(self) -> int:
        """Of its PNG file on a page: charts have one and a half pixels for each there."""
        (pixels,) = struct.unpack(">I", self.forms["png"][16:20])
        return round(pixels / 1.5) if self.is_chart else pixels


class Section(NamedTuple):
    """A part of the page, and what a reader must know of it."""

    title: str
    lead: str
    parts: Sequence[Table | Picture]

    @property
    def anchor(self) -> str:
        """Where a link to it goes."""
        return re.sub(r"[^a-z]+", "-", self.title.lower()).strip("-")


def word(text: str) -> Cell:
    """A cell that is sorted as text."""
    return Cell(text, text)


def figure(value: float | None, show: Callable[[float], str]) -> Cell:
    """A cell that shows a number, and is sorted by it."""
    return Cell(UNKNOWN, None) if value is None else Cell(show(value), float(value))


def numbers(sections: Sequence[Section]) -> dict[str, list[dict[str, Any]]]:
    """Every table as JSON: rows by head, under "section/table"; shares are fractions."""
    found: dict[str, list[dict[str, Any]]] = {}
    for section in sections:
        for part in section.parts:
            if isinstance(part, Table):
                name = "/".join(filter(None, (section.title, part.title)))
                assert name not in found, name
                heads = [re.sub(", (%|points)$", "", head) for head in part.heads]
                found[name] = [
                    {head: cell.value for head, cell in zip(heads, row, strict=True)}
                    for row in part.rows
                ]
    return found


def render(
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    headline: Sequence[tuple[str, str]],
    notes: Sequence[str],
) -> str:
    """Write the page.

    Args:
      title, subtitle: of the page.
      sections: in their order.
      headline: the numbers at the top, each with what it is.
      notes: sentences that a reader must know, such as what was left out.

    Returns:
      HTML.
    """
    return (
        report.templates()
        .get_template("page.html.j2")
        .render(
            title=title,
            subtitle=subtitle,
            sections=[_shown(section) for section in sections],
            headline=headline,
            notes=notes,
        )
    )


def _shown(section: Section) -> dict[str, Any]:
    """A section as the template has it: of a part either "table" or "picture" is there."""
    parts: list[dict[str, Any]] = []
    for part in section.parts:
        if isinstance(part, Table):
            parts.append({"table": part, "picture": None, "numeric": _numeric(part)})
        else:
            source = report.inline(part.forms["png"])
            parts.append({"table": None, "picture": part, "source": source, "width": part.width})
    shown = {"title": section.title, "lead": section.lead, "anchor": section.anchor}
    return {**shown, "parts": parts}


def _numeric(table: Table) -> list[bool]:
    """Which columns hold numbers."""
    return [
        any(isinstance(row[at].value, float) for row in table.rows)
        for at in range(len(table.heads))
    ]
