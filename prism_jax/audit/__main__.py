"""Audit what sets and their students give away of the training images; no claim follows.

    python -m prism_jax.audit --config=configs/audit/digits.py

Every row of the config makes a set in every shadow run; an attacker who knows all runs but a pair
says which canaries either was made from. What is finished is never done again, so the command
continues where it was stopped.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from prism_jax.errors import UserError

HELP = """\
prism_jax: audit sets

    python -m prism_jax.audit --config=FILE [--config.FIELD=VALUE ...] [flags]

Flags:
    --config=FILE        a file of configs/audit/
    --config.a=VALUE     override one field of it; --config.rows.ROW=None leaves a row out
    --workdir=DIR        where everything is written (default: runs/<name of the audit>)
    --plan               list the cells and which of them are finished, then stop
    --help               this text

Writes table.md, table.csv, roc.png and gradients.png beside the runs. The same command continues
an audit that was stopped; more shadows keep what fewer have made.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status, as ``prism_jax.main`` gives it.
    """
    from prism_jax.main import guarded

    return guarded(_main, argv, HELP)


def _main(argv: list[str]) -> int:
    from prism_jax.audit.rows import as_comparison, cell_of, check_config, rows_of
    from prism_jax.cells import check_root, until_stopped
    from prism_jax.compare import parsed
    from prism_jax.environment import prepare_environment
    from prism_jax.main import check_flags, parse

    problems: list[str] = []
    config, given = parse(argv, problems)
    check_flags(given, "an audit", ("workdir", "plan"), problems)
    if problems:
        raise UserError("; ".join(problems))
    check_config(config)
    root = given.workdir or f"runs/{config.name}"
    check_root(root, "an audit")
    # The audit's own config does not say how its cells use devices.
    cell = cell_of(config, rows_of(config)[0])
    prepare_environment(parsed(as_comparison(config), cell, problems), problems)
    if problems:
        raise UserError(f"{cell.row}: {'; '.join(problems)}")

    from prism_jax import parallel, progress
    from prism_jax.audit import gradients
    from prism_jax.audit.shadows import Shadows

    parallel.find_devices()
    if not parallel.is_main():
        raise UserError("an audit runs in one process; its cells use all of its devices")
    shadows = Shadows(pathlib.Path(root), config)
    if given.plan:
        for cell in shadows.experiments:
            done = "done" if shadows.result(cell) else "to do"
            progress.say(f"{done:6} {cell.name}")
        return 0
    gradients.check(shadows)
    shadows.write_data()

    def work(stop) -> None:
        gradients.run(shadows, stop)
        shadows.run(stop, argv)

    return until_stopped(work, root)


if __name__ == "__main__":
    sys.exit(main())
