"""Run a command; what a person can mend is one message."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from prism_jax import parallel
from prism_jax.environment import prepare_environment
from prism_jax.errors import UserError
from prism_jax.tools import cli
from prism_jax.tools.teachers.arguments import parser
from prism_jax.tools.teachers.commands import list_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    return cli.run(_command, parser(), argv)


def _command(options: argparse.Namespace) -> None:
    problems: list[str] = []
    prepare_environment({}, problems)
    if problems:
        raise UserError("; ".join(problems))
    if options.run is not list_command:
        parallel.find_devices()
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
