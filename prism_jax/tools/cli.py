"""What the tools' command lines have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from prism_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
          UserError: always.
        """
        raise UserError(f"{message}; see {self.prog} --help")


def run(
    command: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    stopped: str = "nothing was left half written.",
) -> int:
    """Run a tool; what a person can mend is one message, never a traceback.

    Args:
      command: the work.
      parser: reads the flags; without any it prints its help.
      argv: the flags; None: those of this process.
      stopped: what Ctrl-C leaves.

    Returns:
      The exit status: 0, 2 for what cannot be used, 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command(parser.parse_args(argv or ["--help"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = error.filename or "a file"
        print(f"error: {name} cannot be used: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return 130
    except SystemExit as ended:  # argparse has printed its help
        return int(ended.code or 0)
    return 0
