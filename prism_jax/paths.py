"""Paths as a person writes them."""

from __future__ import annotations

import os

from prism_jax.errors import UserError


def at_home(path: str) -> str:
    """A path with the home directory for a leading ``~`` or ``~user``, which no shell expands in
    ``--flag=~/x``. Any other, as ``gs://`` and ``./~``, is returned as it is.

    Raises:
      UserError: there is no such home directory, or the path is no text.
    """
    if not is_text(path):
        raise UserError(
            f"{os.fsencode(path)!r} is no UTF-8, which results are written in; rename it"
        )
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found == path:
        home = path.split("/")[0]
        raise UserError(
            f"{path} begins with {home}, for which there is no home directory; a folder of that "
            f"name is ./{home}"
        )
    return found


def is_text(name: str) -> bool:
    """Whether the name of a file is text: Python has lone surrogates for what is no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
