"""What a config.json says of a network's form, and a refusal of every form that is not ours."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from prism_jax.errors import UserError


def stated(
    config: dict[str, Any],
    what: str,
    *,
    free: dict[str, Any],
    fixed: dict[str, Any],
    idle: Collection[str] = (),
    listed: Collection[str] = (),
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Read the entries that decide a network's form.

    Args:
      config: the file.
      what: the network, for messages.
      free: entries of any value of a kind, and what stands for one that the file lacks: counts
        and measures are above zero; where None does, it is a count or null.
      fixed: entries of one value only, which also stands for one that the file lacks.
      idle: entries that change nothing here.
      listed: counts that may be a list, too.
      optional: entries that may be null, too.

    Returns:
      The free entries.

    Raises:
      UserError: an entry has another value than ours, or none of its kind; one of a name unknown
        here says something.
    """
    other = {key: config[key] for key in fixed if config.get(key, fixed[key]) != fixed[key]}
    if other:
        raise UserError(
            f"this {what} has {_told(other)}; only {_told({k: fixed[k] for k in other})} is "
            "implemented. Take weights of the plain form"
        )
    known = {*free, *fixed, *idle}
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value not in (None, False)
    }
    if unknown:
        raise UserError(
            f"the config of this {what} states {_told(unknown)}, which is unknown here and may "
            "change what the network computes. Take weights of the plain form"
        )
    found = {key: config.get(key, value) for key, value in free.items()}
    for key, value in found.items():
        if value is None and (free[key] is None or key in optional):
            continue
        several = key in listed and isinstance(value, list) and value
        if not all(_fits(one, free[key]) for one in (value if several else [value])):
            raise UserError(_misfit(what, key, value, free[key]))
    return found


def counts(config: dict[str, Any], what: str, key: str, usual: tuple[int, ...]) -> tuple[int, ...]:
    """An entry that lists counts, one a level.

    Raises:
      UserError: it lists none, or other things.
    """
    value = config.get(key, usual)
    listed = isinstance(value, (list, tuple)) and value
    if not listed or not all(_fits(one, 1) for one in value):
        raise UserError(_misfit(what, key, value, 1, many=True))
    return tuple(value)


def check_divides(what: str, key: str, parts: int, wholes: Collection[int]) -> None:
    """Refuse a number of groups or heads that channels do not divide into.

    Raises:
      UserError: it names the entry.
    """
    if left := [whole for whole in wholes if whole % parts]:
        raise UserError(
            f"this {what} has {key}={parts}, which does not divide its {left[0]} channels: its "
            f"entries do not belong together. Download its config again"
        )


KINDS = {bool: "true or false", str: "a word", float: "a number above 0"}


def _fits(value: Any, usual: Any) -> bool:
    """Whether an entry is of the kind of its usual value; true and false are no numbers."""
    if isinstance(usual, (bool, str)):
        return type(value) is type(usual)
    numbers = (int, float) if isinstance(usual, float) else (int,)
    return type(value) in numbers and 0 < value < float("inf")


def _misfit(what: str, key: str, value: Any, usual: Any, many: bool = False) -> str:
    kind = KINDS.get(type(usual), "a whole number above 0")
    return (
        f"this {what} has {key}={value!r}; it must be {'a list, each ' * many}{kind}. Download its "
        f"config again, or take weights of the plain form"
    )


def _told(entries: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in entries.items())
