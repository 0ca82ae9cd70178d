"""The report of a run: one HTML file that needs nothing beside it and no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from prism_jax.analysis import words

CAPTIONS = {
    "grid": (
        "Images",
        "The synthetic images beside the images they began as, one class per row.",
    ),
    "students": (
        "Students",
        "Accuracy on real test images while a student trains: lines are means over seeds, bands "
        "run from the least to the greatest.",
    ),
    "recover": (
        "Loss terms",
        "What each teacher said of the images while they were optimised, unweighted: means over "
        "image batches, with bands from the least to the greatest. Dashed: a teacher that was "
        "read at both ends and did not supervise.",
    ),
}
ALONE = "The synthetic images, one class per row; they began as noise."
IMAGES = ("grid",)  # figures whose colours dark mode must leave alone


def render(
    summary: Mapping[str, Any],
    *,
    figures: Mapping[str, bytes],
    config: Mapping[str, Any],
    notes: Sequence[str],
    class_names: Sequence[str] | None = None,
) -> str:
    """Write the report of a run.

    Args:
      summary: what ``summary.validate`` accepts.
      figures: PNG bytes; those named in ``CAPTIONS`` come first and have their captions.
      config: the resolved experiment as JSON values.
      notes: sentences a reader must know, such as warnings of the run.
      class_names: by class; by default "class 3".

    Returns:
      HTML.
    """
    environment = templates()
    environment.filters |= {
        "accuracy": words.accuracy,
        "more": words.more,
        "value": _value,
    }
    order = [name for name in CAPTIONS if name in figures]
    order += [name for name in figures if name not in CAPTIONS]
    return environment.get_template("report.html.j2").render(
        summary=summary,
        headline=headline(summary),
        students=words.students(summary),
        rows=words.accuracy_rows(summary),
        spread=words.spread_note(summary),
        protocol=words.protocol(summary),
        classes=words.class_rows(summary, class_names),
        teachers=words.teacher_rows(summary),
        facts=words.facts(summary),
        figures=[_figure(name, figures[name], summary) for name in order],
        environment=_environment(summary),
        sections=_sections(config),
        notes=notes,
    )


def templates() -> Any:
    """Jinja's environment of this package's templates; text of a run is never taken for HTML."""
    import jinja2

    def read(name: str) -> str:
        return resources.files("prism_jax.analysis").joinpath(name).read_text("utf-8")

    return jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(read),
    )  # fmt: skip


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers at the top, each with what it is."""
    names = words.students(summary)
    entries = {row.name: row.entries for row in words.accuracy_rows(summary)}

    def top1(row: str, student: int, what: str) -> tuple[str, str]:
        text = words.accuracy(entries[row][student])
        unit = "" if text == words.UNKNOWN else " %"
        return text + unit, f"top-1 of {names[student]}, {what}"

    found = [top1(words.SYNTHETIC, i, "synthetic set") for i in range(len(names[:2]))]
    if names and "random_real" in entries:
        found.append(top1("random_real", 0, "as many random real images"))
    if "images" in (facts := words.facts(summary)):
        images, _, per_class = facts["images"].partition(" ")
        found.append((images, f"synthetic images, {per_class.strip('()')}"))
    return found


def _figure(name: str, png: bytes, summary: Mapping[str, Any]) -> dict[str, Any]:
    title, caption = CAPTIONS.get(name, (name, ""))
    if name == "grid" and summary.get("recover", {}).get("distance_from_initial", 0) is None:
        caption = ALONE
    return {
        "title": title,
        "caption": caption,
        "source": inline(png),
        "is_chart": name not in IMAGES,
    }


def inline(png: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _environment(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    run = {key: summary.get(key) for key in ("config", "preset", "method", "seeds", "commit")}
    found = {"Run": run, "Data": summary.get("dataset", {})}
    found["Precision"] = summary.get("precision", {})
    found |= {"Machine": summary["machine"], "Versions": summary["versions"]}
    return {title: fields for title, fields in found.items() if fields}


def _sections(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The config by section; fields outside any section come first."""
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    nested = {key: dict(value) for key, value in config.items() if isinstance(value, Mapping)}
    return ({"experiment": top} if top else {}) | {k: v for k, v in nested.items() if v}


def _value(value: Any) -> str:
    """A value as a person writes it."""
    if value is None:
        return words.UNKNOWN
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return ", ".join(str(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
