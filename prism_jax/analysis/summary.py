"""The summary of a run: its schema, and the tables that a person reads in its place.

A summary says ``null`` for what is not known; a table says "–". Accuracies are fractions in the
file and percentages in print.
"""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_jax.errors import UserError
from prism_jax.progress import duration

SCHEMA: dict[str, Any] = json.loads(
    resources.files("prism_jax.analysis").joinpath("summary.schema.json").read_text("utf-8")
)
SYNTHETIC = "synthetic"
ROW_LABELS = {
    SYNTHETIC: "synthetic",
    "random_real": "random real, soft labels",
    "random_real_hard": "random real, hard labels",
    "full_real": "full real training set",
}
UNKNOWN = "–"


# --- the record -----------------------------------------------------------------------------


def over_seeds(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Combine one student's records, one per seed, into its entry of a summary.

    Args:
      records: {"top1", "top5", "best_top1", "per_class", "seconds"} of each seed; top1 is the
        last epoch's, best_top1 that of the best test on the way.

    Returns:
      Means, the sum of seconds, and the sample standard deviation of top1 (n - 1 below; None for
      one seed). A value that any seed lacks is None.
    """

    def known(key: str) -> list[Any] | None:
        values = [record.get(key) for record in records]
        return None if None in values else values

    def mean(key: str) -> float | None:
        return statistics.fmean(values) if (values := known(key)) else None

    def mean_by_class() -> list[float | None] | None:
        if (seeds := known("per_class")) is None:
            return None
        return [
            None if None in values else statistics.fmean(values)
            for values in zip(*seeds, strict=True)
        ]

    top1 = known("top1")
    return {
        "top1": mean("top1"),
        "top1_std": statistics.stdev(top1) if top1 and len(top1) > 1 else None,
        "top1_per_seed": [record.get("top1") for record in records],
        "top5": mean("top5"),
        "best_top1": mean("best_top1"),
        "per_class": mean_by_class(),
        "seconds": sum(seconds) if (seconds := known("seconds")) else None,
    }


def merge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combine runs of one config with different seeds into one summary.

    Accuracies of all runs' students are pooled, so their standard deviation spans what varies
    between runs; every other number is the mean over runs, None where a run lacks it.

    Args:
      runs: at least one summary, all of one config.
    """
    assert len({run["config"] for run in runs}) == 1
    if len(runs) == 1:
        return dict(runs[0])
    merged = _mean_of(list(runs))
    merged["runs"] = len(runs)
    merged["seeds"] = [seed for run in runs for seed in run["seeds"]]
    for key in ("validate", "controls"):
        if all(key in run for run in runs):
            merged[key] = _pool([run[key] for run in runs])
    return merged


def _mean_of(values: list[Any]) -> Any:
    """Numbers as their mean, dicts by key, anything else as the first run has it."""
    first = values[0]
    if isinstance(first, dict):
        keys = [key for key in first if all(key in value for value in values)]
        return {key: _mean_of([value[key] for value in values]) for key in keys}
    if all(_is_number(value) for value in values):
        same = all(value == first for value in values)
        return first if same else statistics.fmean(values)
    return None if None in values else first


def _pool(entries: list[Any]) -> Any:
    """Students by name, or controls of students by name, with all seeds pooled."""
    if "top1" not in entries[0]:
        keys = [key for key in entries[0] if all(key in entry for entry in entries)]
        return {key: _pool([entry[key] for entry in entries]) for key in keys}
    records = [{**entry, "top1": top1} for entry in entries for top1 in entry["top1_per_seed"]]
    return over_seeds(records)


def validate(summary: Any) -> None:
    """Check a summary against the schema.

    Raises:
      UserError: one message with every violation.
    """
    if found := list(violations(summary)):
        lines = "\n".join(f"  - {line}" for line in found)
        raise UserError(f"this is no summary.json of this version of prism_jax:\n{lines}")


def violations(
    value: Any, schema: Mapping[str, Any] = SCHEMA, name: str = "summary"
) -> Iterator[str]:
    """Yield what is wrong with a JSON value, for the part of JSON Schema that SCHEMA uses."""
    if "$ref" in schema:
        yield from violations(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], name)
        return
    if "const" in schema and value != schema["const"]:
        yield f"{name} is {value!r}; it must be {schema['const']!r}"
    allowed = schema.get("type", [])
    allowed = [allowed] if isinstance(allowed, str) else allowed
    if allowed and not any(_JSON_TYPES[kind](value) for kind in allowed):
        yield f"{name} is {value!r}; it must be of type {' or '.join(allowed)}"
    elif isinstance(value, dict):
        for key in schema.get("required", ()):
            if key not in value:
                yield f"{name}.{key} is missing"
        extra = schema.get("additionalProperties", True)
        for key, item in value.items():
            if key in schema.get("properties", {}):
                yield from violations(item, schema["properties"][key], f"{name}.{key}")
            elif extra is False:
                yield f"{name}.{key} is not a key of a summary"
            elif extra is not True:
                yield from violations(item, extra, f"{name}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), f"{name}[{i}]")
    elif _is_number(value):
        low, high = schema.get("minimum", -float("inf")), schema.get("maximum", float("inf"))
        if not low <= value <= high:
            yield f"{name} is {value}; it must be in [{low}, {high}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_JSON_TYPES = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
}


# --- what is in it, in words ----------------------------------------------------------------


class Row(NamedTuple):
    """One training set of the accuracy table, and each student's entry or None."""

    name: str
    label: str
    entries: tuple[dict[str, Any] | None, ...]


def row_label(name: str) -> str:
    """The words for a training set."""
    return ROW_LABELS.get(name, name)


def students(summary: Mapping[str, Any]) -> list[str]:
    """Every student of a summary, in order."""
    sets = [summary.get("validate", {}), *summary.get("controls", {}).values()]
    return list(dict.fromkeys(name for by_student in sets for name in by_student))


def accuracy_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The synthetic set and every control, in the order of ``students(summary)``."""
    sets = {SYNTHETIC: summary.get("validate", {}), **summary.get("controls", {})}
    names = students(summary)
    return [
        Row(name, row_label(name), tuple(by_student.get(student) for student in names))
        for name, by_student in sets.items()
    ]


def accuracy(entry: Mapping[str, Any] | None) -> str:
    """An entry as "93.1 ± 0.4", in per cent."""
    if not entry or entry["top1"] is None:
        return UNKNOWN
    spread = entry.get("top1_std")
    return percent(entry["top1"]) + (f" ± {100 * spread:.1f}" if spread is not None else "")


def more(entry: Mapping[str, Any] | None) -> str:
    """What else is known of an entry: "best 93.5, top-5 99.6", in per cent."""
    found = {"best": "best_top1", "top-5": "top5"}
    known = {words: (entry or {}).get(key) for words, key in found.items()}
    return ", ".join(f"{words} {percent(x)}" for words, x in known.items() if x is not None)


def protocol(summary: Mapping[str, Any]) -> str:
    """How the students of a summary were trained, in words; empty where none was."""
    if (how := summary.get("protocol")) is None:
        return ""
    loss = how["loss"] + (f" (T = {how['temperature']:g})" if how["temperature"] else "")
    if how["ce_weight"]:
        loss += f" + {how['ce_weight']:g} cross entropy"
    rate = f"{how['optimiser']} at {how['learning_rate']:g}, {how['schedule']}"
    found = [loss, rate, f"{how['epochs']} epochs in batches of {how['batch_size']}"]
    if how["bn_group"] != how["batch_size"]:
        found.append(f"BatchNorm over {how['bn_group']} images")
    if how["ema"] is not None:
        found.append(f"weights and statistics averaged ({how['ema']:g})")
    return "; ".join(found)


class ClassRow(NamedTuple):
    """One class of the synthetic set's students, in words."""

    name: str
    accuracies: tuple[str, ...]


CLASSES_SHOWN = 20


def class_rows(
    summary: Mapping[str, Any], class_names: Sequence[str] | None = None
) -> list[ClassRow]:
    """Accuracy by class, one column per student of the synthetic set.

    All classes in their order; of more than ``CLASSES_SHOWN`` the hardest and the easiest, by the
    mean over students.
    """
    per_class = [entry.get("per_class") for entry in summary.get("validate", {}).values()]
    if not per_class or None in per_class:
        return []
    by_class = list(zip(*per_class, strict=True))
    rows: Sequence[int] = range(len(by_class))
    if len(rows) > CLASSES_SHOWN:
        known = [c for c in rows if None not in by_class[c]]
        ranked = sorted(known, key=lambda c: statistics.fmean(by_class[c]))
        rows = [*ranked[: CLASSES_SHOWN // 2], *ranked[-CLASSES_SHOWN // 2 :]]
    return [
        ClassRow(class_names[c] if class_names else f"class {c}", tuple(map(percent, by_class[c])))
        for c in rows
    ]


def spread_note(summary: Mapping[str, Any]) -> str:
    """Which spread the accuracies of a summary show."""
    entries = [entry for row in accuracy_rows(summary) for entry in row.entries]
    known = [entry for entry in entries if entry and entry["top1"] is not None]
    counts = sorted({len(entry.get("top1_per_seed", [])) or 1 for entry in known})
    if not counts:
        return "no student was trained"
    if counts[-1] == 1:
        return "one student seed, no spread"
    if summary.get("runs", 1) > 1:
        return (
            f"mean ± standard deviation over {counts[-1]} runs (recover, labels, random real "
            f"images and students vary, teachers are fixed)"
        )
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"mean ± standard deviation over {number} student seeds of one synthetic set"


class TeacherRow(NamedTuple):
    """One teacher of the pool, in words."""

    name: str
    primary: bool
    top1: str
    params: str
    batch_norms: str
    drawn: str
    cross_entropy: str
    bn_alignment: str


def teacher_rows(summary: Mapping[str, Any]) -> list[TeacherRow]:
    """What is known of every teacher of the pool."""
    recover = summary.get("recover", {})

    def change(teacher: str, term: str) -> str:
        terms = recover.get("terms", {}).get(teacher)
        ends = [terms[end][term] if terms else None for end in ("start", "end")]
        return UNKNOWN if ends == [None, None] else " → ".join(number(value) for value in ends)

    return [
        TeacherRow(
            name=name,
            primary=name == recover.get("primary"),
            top1=percent(record["top1"]),
            params=large(record["params"]),
            batch_norms=str(_known(record["batch_norms"])),
            drawn=percent(recover.get("teachers_drawn", {}).get(name), digits=0, sign=" %"),
            cross_entropy=change(name, "ce"),
            bn_alignment=change(name, "bn"),
        )
        for name, record in summary.get("teachers", {}).items()
    ]


def facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The other numbers of a summary, in words; those of stages that did not run are absent."""
    found = {}
    if recover := summary.get("recover"):
        found["images"] = f"{_known(recover['images'])} ({_known(recover['ipc'])} per class)"
        found["recover"] = f"{seconds(recover['seconds_per_image'])} per image"
        if recover["peak_bytes"] is not None:
            found["recover"] += f", {size(recover['peak_bytes'])} of memory at most"
        if recover.get("distance_from_initial") is not None:
            found["distance from initial"] = (
                f"{number(recover['distance_from_initial'])} (RMS of pixels in [0, 1])"
            )
    if relabel := summary.get("relabel"):
        found["soft labels"] = f"{size(relabel['bytes'])} on disk"
    best = {name: entry.get("best_top1") for name, entry in summary.get("validate", {}).items()}
    if known := {name: x for name, x in best.items() if x is not None}:
        found["best test on the way"] = ", ".join(
            f"{name} {percent(x)}" for name, x in known.items()
        )
    if analyse := summary.get("analyse"):
        cosine = analyse["intra_class_cosine"]
        found["intra-class cosine"] = ", ".join(
            f"{name} {number(cosine[name])}" for name in ("synthetic", "initial", "real")
        )
    return found


# --- numbers in words -----------------------------------------------------------------------


def percent(fraction: float | None, *, digits: int = 1, sign: str = "") -> str:
    """A fraction in per cent."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.{digits}f}{sign}"


def number(value: float | None) -> str:
    """A number with three significant digits."""
    if value is None:
        return UNKNOWN
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def seconds(value: float | None) -> str:
    """A duration; short ones keep three significant digits."""
    if value is None:
        return UNKNOWN
    return f"{number(value)} s" if value < 9.95 else duration(value)


def size(count: float | None) -> str:
    """A number of bytes, in decimal units."""
    return UNKNOWN if count is None else large(count, units=(" B", " kB", " MB", " GB", " TB"))


def large(count: float | None, *, units: Sequence[str] = ("", " k", " M", " G", " T")) -> str:
    """A count with three significant digits and a decimal unit."""
    if count is None:
        return UNKNOWN
    power = 0
    scaled = float(count)
    while scaled >= 999.5 and power < len(units) - 1:
        scaled, power = scaled / 1000, power + 1
    return (f"{scaled:.0f}" if power == 0 else number(scaled)) + units[power]


def _known(value: Any) -> Any:
    return UNKNOWN if value is None else value


# --- the tables -----------------------------------------------------------------------------


def table(summary: Mapping[str, Any]) -> RenderableType:
    """The one table that ends a run, for a terminal."""
    parts: list[RenderableType] = [Text(_title(summary), style="bold")]
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
    its row names the config. The full real set comes last.
    """
    names = list(dict.fromkeys(name for summary in summaries for name in students(summary)))
    rows: dict[tuple[str, str], dict[tuple[str, ...], str]] = {}  # what -> cells -> config
    for summary in summaries:
        for row in accuracy_rows(summary):
            entries = dict(zip(students(summary), row.entries, strict=True))
            cells = tuple(accuracy(entries.get(name)) for name in names)
            label = f"**{summary['method']}**" if row.name == SYNTHETIC else row.label
            ipc = UNKNOWN if row.name == "full_real" else _ipc(summary)
            rows.setdefault((ipc, label), {}).setdefault(cells, summary["config"])
    accuracies = [
        (ipc, label if len(found) == 1 else f"{label} (`{config}`)", *cells)
        for (ipc, label), found in sorted(rows.items(), key=lambda item: item[0][0] == UNKNOWN)
        for cells, config in found.items()
    ]
    notes = list(dict.fromkeys(spread_note(summary) for summary in summaries))
    costs = [
        (
            f"`{summary['config']}`",
            _ipc(summary),
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


def _title(summary: Mapping[str, Any]) -> str:
    parts = [summary["config"], f"preset {summary['preset']}", f"method {summary['method']}"]
    narrow = [k for k, v in summary.get("precision", {}).items() if v != "float32"]
    parts += [f"bfloat16 in {', '.join(narrow)}"] if narrow else []
    return ", ".join(parts + ([f"IPC {ipc}"] if (ipc := _ipc(summary)) != UNKNOWN else []))


def _ipc(summary: Mapping[str, Any]) -> str:
    return str(_known(summary.get("recover", {}).get("ipc")))


def _markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "|".join([":--"] * left + ["--:"] * (len(header) - left)) + "|"
    for row in rows:
        yield f"| {' | '.join(row)} |"
