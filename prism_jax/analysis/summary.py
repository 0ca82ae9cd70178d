"""The summary of a run: its schema, and how several become one.

A summary says ``null`` for what is not known. Accuracies are fractions.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from prism_jax.errors import UserError

SCHEMA: dict[str, Any] = json.loads(
    resources.files("prism_jax.analysis").joinpath("summary.schema.json").read_text("utf-8")
)


def over_seeds(records: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Combine one student's records, one per seed, into its entry of a summary.

    Args:
      records: {"top1", "top5", "best_top1", "per_class", "seconds"} of each seed; top1 is the
        last epoch's, best_top1 that of the best test on the way. Where training images were held
        out, "held_out" is top1 on them.

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

    top1, held_out = known("top1"), mean("held_out")
    return {
        "top1": mean("top1"),
        "top1_std": statistics.stdev(top1) if top1 and len(top1) > 1 else None,
        "top1_per_seed": [record.get("top1") for record in records],
        "top5": mean("top5"),
        "best_top1": mean("best_top1"),
        "per_class": mean_by_class(),
        "seconds": sum(seconds) if (seconds := known("seconds")) else None,
        **({} if held_out is None else {"held_out": held_out}),
    }


def what_is_equal(run: Mapping[str, Any]) -> list[Any]:
    """What runs must share to be merged: a config's name alone leaves the flags' values open."""
    recover = run.get("recover", {})
    return [
        run["config"], run["method"], run.get("dataset", {}).get("name"), recover.get("ipc"),
        recover.get("primary"), run.get("protocol"),
    ]  # fmt: skip


def merge(runs: Sequence[Mapping[str, Any]], image_seeds: int | None = None) -> dict[str, Any]:
    """Combine runs that differ in their seeds into one summary.

    Accuracies of all runs' students are pooled, so their standard deviation spans what varies
    between runs; every other number is the mean over runs, None where a run lacks it.

    Args:
      runs: at least one summary; of all ``what_is_equal`` is equal, and none is another's copy.
      image_seeds: of how many seeds their images are, where that is known.
    """
    assert all(what_is_equal(run) == what_is_equal(runs[0]) for run in runs)
    if len(runs) == 1:
        return dict(runs[0])
    merged = _mean_of(list(runs))
    merged["runs"] = len(runs)
    merged["seeds"] = [seed for run in runs for seed in run["seeds"]]
    if image_seeds is not None:
        merged["image_seeds"] = image_seeds
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
    took = [entry.get("seconds") for entry in entries]  # each of all of its students
    return over_seeds(records) | {"seconds": None if None in took else sum(took)}


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
    "boolean": lambda value: isinstance(value, bool),
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "null": lambda value: value is None,
    "number": _is_number,
    "integer": lambda value: _is_number(value) and float(value).is_integer(),
}
