"""Compare finished runs in Markdown: python -m prism_jax.tools.results WORKDIR [WORKDIR ...]

Runs that differ in their seeds alone become one row with mean and spread.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from etils import epath

from prism_jax.analysis import summary, tables
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.paths import at_home

HELP = """\
usage: python -m prism_jax.tools.results WORKDIR [WORKDIR ...]

Prints the tables of the README for finished runs. Runs that differ in their seeds alone
become one row with mean and spread.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Returns:
      The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    try:
        print(compared([at_home(folder) for folder in argv]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def compared(folders: Sequence[str]) -> str:
    """The Markdown tables of runs.

    Raises:
      UserError: a folder without a summary, or with a damaged one.
    """
    alike: dict[str, list[dict]] = {}
    for folder in folders:
        path = epath.Path(folder) / "summary.json"
        if not path.exists():
            raise UserError(f"{folder} holds no summary.json; run its config to the end first")
        found = workdir.read_json(path)
        summary.validate(found)
        alike.setdefault(json.dumps(summary.what_is_equal(found)), []).append(found)
    merged = [summary.merge(runs) for runs in alike.values()]
    return tables.markdown(merged) + "\n" + tables.markdown_teachers(merged)


if __name__ == "__main__":
    sys.exit(main())
