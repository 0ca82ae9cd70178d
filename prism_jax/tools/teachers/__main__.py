"""Run a command; what a person can mend is one message."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from prism_jax import parallel
from prism_jax.environment import prepare_environment
from prism_jax.errors import UserError
from prism_jax.tools.teachers.arguments import parser
from prism_jax.tools.teachers.commands import list_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(argv or ["--help"])
        problems: list[str] = []
        prepare_environment({}, problems)
        if problems:
            raise UserError("; ".join(problems))
        if options.run is not list_command:
            parallel.find_devices()
        options.run(options)
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
        print("stopped; nothing was left half written.", file=sys.stderr)
        return 130
    except SystemExit as stopped:  # argparse has printed its help
        return int(stopped.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
