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
) -> dict[str, Any]:
    """Read the entries that decide a network's form.

    Args:
      config: the file.
      what: the network, for messages.
      free: entries of any value, and what stands for one that the file lacks.
      fixed: entries of one value only, which also stands for one that the file lacks.
      idle: entries that change nothing here.

    Returns:
      The free entries.

    Raises:
      UserError: an entry has another value than ours; one of a name unknown here says something.
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
    return {key: config.get(key, value) for key, value in free.items()}


def _told(entries: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in entries.items())
