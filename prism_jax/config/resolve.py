"""The one way in: from ConfigDict to an experiment.

``ml_collections`` is the language of ``configs/``; past :func:`resolve` nothing knows it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from prism_jax.config.sections import Experiment, Path
from prism_jax.errors import UserError
from prism_jax.paths import at_home

# What a person calls the types of fields.
KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a string",
    bool: "True or False",
    tuple: "a list of values",
}


def resolve(config: Any, problems: Sequence[str] = ()) -> Experiment:
    """Turn a config into an experiment.

    Args:
      config: an ``ml_collections.ConfigDict`` (or nested dicts) with the fields of ``Experiment``.
      problems: what is known to be wrong already, to be said in the same message.

    Returns:
      The experiment, checked.

    Raises:
      UserError: one message with every violation.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    found: list[str] = []
    values = _completed(values, found)
    experiment = _build(Experiment, values, "", found)
    if not found:
        from prism_jax.config import rules  # reads the tables of the whole package

        found = rules.violations(experiment)
    found = [*problems, *found]
    if len(found) == 1:
        raise UserError(found[0])
    if found:
        lines = "\n".join(f"  - {problem}" for problem in found)
        raise UserError(f"{len(found)} things cannot be used:\n{lines}")
    return experiment


def restore(values: Mapping[str, Any], later: Mapping[str, Mapping[str, Any]]) -> Experiment:
    """The experiment of a working directory's config.json, of whichever version wrote it.

    It was checked when it ran, and is only looked at now: rules are not asked again. A field that
    its version had not is what it was without: ``later``'s value, or none.

    Args:
      values: nested dicts, with the fields of ``Experiment`` that there were.
      later: by section ("network" for each of them) and field: what its absence means.

    Raises:
      UserError: a field that this version does not know, or of another type.
    """
    problems: list[str] = []
    experiment = _build(Experiment, _filled(Experiment, dict(values), later), "", problems)
    if problems:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        raise UserError(f"this config.json is of another version of prism_jax:\n{lines}")
    return experiment


def _filled(cls: type, values: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a dataclass, with those that are absent."""
    found = dict(values)
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            found[name] = _filled(hint, found.get(name) or {}, later.get(name, {}))
        elif name == "networks":
            each = found.get(name, {}).items()
            found[name] = {key: {**later.get("network", {}), **fields} for key, fields in each}
        elif name not in found:
            found[name] = later[name] if name in later else _nothing(hint)
    return found


def _nothing(hint: Any) -> Any:
    """The value of a type that stands for not being used."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union) and type(None) in arguments:
        return None
    if origin is Literal:
        return arguments[0]
    if origin is tuple and Ellipsis not in arguments:
        return tuple(map(_nothing, arguments))
    return (origin or getattr(hint, "__supertype__", hint))()


def _completed(values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The fields of a data set of one's own that its storage tells: classes and normalisation.

    Without ``dataset.mean`` they are ImageNet's where teachers have weights from elsewhere, which
    were trained for it, and otherwise measured.
    """
    dataset = values.get("dataset")
    if not isinstance(dataset, dict) or not isinstance(dataset.get("name"), str):
        return values
    if "num_classes" not in dataset or dataset["num_classes"] is not None:
        return values
    from prism_jax.data.sources import own

    name, path = dataset["name"], dataset.get("path")
    if not own.is_own(name):
        from prism_jax.data.datasets import DATASETS

        known = DATASETS[name].num_classes if name in DATASETS else None
        return {**values, "dataset": {**dataset, "num_classes": known}}
    try:
        path = at_home(path) if isinstance(path, str) else None
    except UserError:
        return {**values, "dataset": {**dataset, "num_classes": 0}}  # said of the field
    try:
        found: dict[str, Any] = {"num_classes": own.own_info(name, path).num_classes}
        networks, squeeze = values.get("networks") or {}, values.get("squeeze") or {}
        imported = [
            teacher
            for teacher in squeeze.get("teachers") or ()
            if any((networks.get(teacher) or {}).get(f) for f in ("checkpoint", "start_from"))
        ]
        if dataset.get("mean") is None and dataset.get("std") is None and not imported:
            measured = own.measure_normalisation(name, path)
            found |= {"mean": measured.mean, "std": measured.std}
    except UserError as error:
        problems.append(str(error))
        found = {"num_classes": 0}  # said once
    return {**values, "dataset": {**dataset, **found}}


def _build(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    hints = typing.get_type_hints(cls)
    built = {}
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if field.name in values:
            built[field.name] = _convert(hints[field.name], values[field.name], name, problems)
        elif field.default is dataclasses.MISSING:
            problems.append(f"{name} is missing")
    for key in values.keys() - hints.keys():
        near = difflib.get_close_matches(str(key), list(hints), n=1)
        meant = f"; did you mean {prefix}{near[0]}?" if near else ""
        problems.append(f"{prefix}{key} is no field of the config{meant}")
    return None if problems else cls(**built)


def _convert(hint: Any, value: Any, name: str, problems: list[str]) -> Any:
    """One value as its declared type, or a line in ``problems``."""
    origin, arguments = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return _build(hint, value, f"{name}.", problems)
    elif origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        words = [a for a in kinds if get_origin(a) is Literal]
        kind = words[0] if words and isinstance(value, str) else kinds[0]
        return _convert(kind, value, name, problems)
    elif origin is Literal:
        return _convert(str, value, name, problems)  # which strings: rules.literals
    elif origin is tuple:
        if arguments[0] is str:  # "a,b" is ("a", "b"), also as the one value of a flag
            value = (value,) if isinstance(value, str) else value
            if isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                value = [str(v) for v in value]  # names that are numbers, in a flag
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                value = [part.strip() for v in value for part in v.split(",") if part.strip()]
        if isinstance(value, (list, tuple)):
            if arguments[-1] is not Ellipsis and len(value) != len(arguments):
                problems.append(f"{name} is {value!r}; it needs {len(arguments)} values")
                return None
            return tuple(
                _convert(arguments[0], v, f"{name}[{i}]", problems) for i, v in enumerate(value)
            )
    elif origin is dict:
        if isinstance(value, dict):
            return {k: _convert(arguments[1], v, f"{name}.{k}", problems) for k, v in value.items()}
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and math.isfinite(value):
            return float(value)
    elif hint is Path:
        if isinstance(value, str):
            try:
                return at_home(value)
            except UserError as error:
                problems.append(f"{name}: {error}")
                return None
    elif isinstance(value, hint):
        return value
    what = KINDS.get(origin or hint, "a group of fields")
    problems.append(f"{name} is {value!r}; it must be {what}")
    return None
