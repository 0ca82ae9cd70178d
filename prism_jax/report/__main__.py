"""Look at finished runs: python -m prism_jax.report RUN [RUN ...] --to=page.html

One page of figures and numbers, of one run or of several side by side. It is one file that needs
nothing beside it and no network. In <page>_figures/ are its figures as PNG, SVG and PDF, and its
tables as numbers.json. Runs are only read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from etils import epath

from prism_jax import progress
from prism_jax.config.rules.common import seed
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.paths import at_home
from prism_jax.tools import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    return cli.run(_command, _parser(), argv, stopped="no page was written.")


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m prism_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", type=at_home, nargs="+", metavar="RUN", help="working directories, one data set")
    add("--to", type=at_home, required=True, help="the page to write: FILE.html")
    add("--network", help="whose features are measured in: a network that the first run squeezed")
    add("--classes", default="", help="of the pictures, names or numbers, separated by commas")
    add("--images", type=int, default=10_000, help="real images of a split that are looked at")
    add("--seed", type=int, default=0, help="of UMAP, and of the choice of real images")
    add("--data", type=at_home, help="where the real images are, if not where the runs found them")
    return parser


def _command(given: argparse.Namespace) -> None:
    to = epath.Path(given.to)
    if to.suffix != ".html":
        raise UserError(f"--to={to} is no page; name a file that ends in .html")
    if to.is_dir():
        raise UserError(f"--to={to} is a folder; name a file in it")
    if given.images < 1:
        raise UserError(f"--images={given.images}; at least one real image must be looked at")
    if problems := list(seed("--seed", given.seed)):
        raise UserError("; ".join(problems))
    for run in given.runs:
        inside = os.path.realpath(to).startswith(os.path.realpath(run) + os.sep)
        if inside and (epath.Path(run) / "config.json").exists():
            raise UserError(f"--to={to} is in {run}, and runs are only read; name another place")
    _prepare(given.runs[0])
    write(given.runs, to, given)


def _prepare(run: str) -> None:
    """Fix what decides bits, before JAX makes a backend."""
    from prism_jax.environment import prepare_environment

    problems: list[str] = []
    prepare_environment(workdir.read_run(epath.Path(run))["experiment"], problems)
    if problems:
        raise UserError("; ".join(problems))

    from prism_jax import parallel

    parallel.find_devices()


def write(roots: Sequence[str], to: epath.Path, given: Any) -> None:
    """Make the page of some runs, and the files beside it; the page comes last."""
    from prism_jax.analysis import page
    from prism_jax.report import sections as parts
    from prism_jax.report.finished import open_runs

    runs = open_runs(roots, data=given.data)
    classes = tuple(name.strip() for name in given.classes.split(",") if name.strip())
    options = parts.Options(given.network, classes, given.images, given.seed)
    found, notes = parts.sections(runs, options, lambda what: progress.say(f"report: {what}"))
    html = page.render(
        parts.title(runs), parts.subtitle(runs), found, headline=parts.headline(runs), notes=notes
    )
    beside, names = to.parent / f"{to.stem}_figures", set()
    for section in found:
        for part in section.parts:
            if isinstance(part, page.Picture):
                for form, data in part.forms.items():
                    workdir.write_bytes(beside / f"{part.name}.{form}", data)
                    names.add(f"{part.name}.{form}")
    for name in set(workdir.names(beside)) - names:  # of an earlier page
        if name.endswith((".png", ".svg", ".pdf")):
            (beside / name).unlink()
    workdir.write_json(beside / "numbers.json", page.numbers(found))
    workdir.write_bytes(to, html.encode())
    for note in notes:
        progress.say(f"note: {note}")
    progress.say(f"{to}, figures in {beside}")


if __name__ == "__main__":
    sys.exit(main())
