"""Compare finished runs in Markdown: python -m prism_jax.tools.results WORKDIR [WORKDIR ...]

Runs that differ in their seeds alone become one row with mean and spread, which says whether images
vary or students alone. A set that not all of them have trained on is left out, and named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from prism_jax.analysis import summary, tables
from prism_jax.analysis.words import row_label
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.paths import at_home
from prism_jax.tools import cli

# What decides no result: where things are, and how they are read.
PLACES = ("path", "threads", "workers", "cache_gigabytes")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables.

    Returns:
      The exit status.
    """
    parser = cli.Parser(
        prog="python -m prism_jax.tools.results",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=at_home, nargs="+", metavar="WORKDIR")
    return cli.run(lambda given: print(compared(given.runs)), parser, argv)


def compared(folders: Sequence[str]) -> str:
    """The Markdown tables of runs.

    Raises:
      UserError: a folder without a summary or with a damaged one, one that is named twice, or two
        that have students of equal seeds on equal images.
    """
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise UserError(f"a working directory is named twice: {', '.join(folders)}")
    alike: dict[str, dict[str, dict]] = {}
    for folder in folders:
        path = epath.Path(folder) / workdir.SUMMARY
        if not path.exists():
            raise UserError(f"{folder} holds no summary.json; run its config to the end first")
        found = workdir.read_json(path)
        try:
            summary.validate(found)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        alike.setdefault(_what_is_equal(folder, found), {})[folder] = found
    notes = [note for runs in alike.values() for note in _left_out(runs)]
    merged = [summary.merge(list(runs.values()), _image_seeds(runs)) for runs in alike.values()]
    datasets = {found.get("dataset", {}).get("name") for found in merged}
    for found in merged if len(datasets) > 1 else ():  # numbers of several do not compare
        found["config"] = f"{found['config']} on {found.get('dataset', {}).get('name')}"
    configs = [found["config"] for found in merged]
    for found, runs in zip(merged, alike.values(), strict=True):
        if configs.count(found["config"]) > 1:  # other settings of one config
            found["config"] = f"{found['config']}, {next(iter(runs))}"
    text = [tables.markdown(merged), *notes, tables.markdown_teachers(merged)]
    return "\n".join(text)


def _what_is_equal(folder: str, found: Mapping[str, Any]) -> str:
    """All settings but seeds and places, where they are there; else what the summary says."""
    if not (epath.Path(folder) / "config.json").exists():
        return json.dumps(summary.what_is_equal(found))
    fields = workdir.read_run(folder)["experiment"]
    del fields["seed"], fields["validate"]["seeds"]
    for name in PLACES:
        fields["dataset"].pop(name, None)
    return json.dumps([summary.what_is_equal(found), fields], sort_keys=True)


def _image_seeds(runs: Mapping[str, Mapping[str, Any]]) -> int | None:
    """Of how many seeds the images of runs are that differ in nothing but seeds; None: not known.

    Raises:
      UserError: two of them have the same students on the same images.
    """
    seeds = {folder: _seed(folder) for folder in runs}
    for one, other in itertools.combinations(runs, 2):
        common = sorted(set(runs[one]["seeds"]) & set(runs[other]["seeds"]))
        alike = seeds[one] == seeds[other]
        if seeds[one] is None or seeds[other] is None:  # a summary alone
            alike = runs[one].get("validate") == runs[other].get("validate") is not None
        if common and alike:
            raise UserError(
                f"{one} and {other} have equal settings and seeds (students "
                f"{', '.join(map(str, common))}), as a folder and its copy have: they are one "
                f"result, not two; leave one out"
            )
    return None if None in seeds.values() else len(set(seeds.values()))


def _seed(folder: str) -> int | None:
    """Of a run's images and labels, where its config.json is there."""
    if not (epath.Path(folder) / "config.json").exists():
        return None
    seed: int = workdir.read_run(folder)["experiment"]["seed"]
    return seed


def _left_out(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sets that some runs of a row have, and others not."""
    have = {folder: set(run.get("controls", {})) for folder, run in runs.items()}
    notes = []
    for name in sorted(set.union(*have.values()) - set.intersection(*have.values())):
        lacking = ", ".join(folder for folder, sets in have.items() if name not in sets)
        notes.append(f"Left out: {row_label(name)}, which {lacking} did not train on.\n")
    return notes


if __name__ == "__main__":
    sys.exit(main())
