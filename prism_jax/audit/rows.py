"""A row's experiment: as a comparison's, and then on the images of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from prism_jax import compare
from prism_jax.cells import Cell, check_fields, check_seeds
from prism_jax.config.sections import Experiment, Path
from prism_jax.errors import UserError

# Of the study of gradients too.
WANTED = (
    "name", "ipc", "shadows", "canaries", "always", "seed", "rows", "shared", "gradients.row",
    "gradients.images", "gradients.iterations", "gradients.alphas", "gradients.draws",
)  # fmt: skip


def check_config(config: Any) -> None:
    """Refuse what is no audit's config, or has no rows.

    Raises:
      UserError: with what it lacks.
    """
    check_fields(config, "audit", WANTED, ("argument", "dataset", "without"))
    check_seeds("seed", config.seed)
    if not rows_of(config):
        raise UserError(
            f"this audit has no rows: all of {', '.join(config.rows) or 'none'} are left out; it "
            f"needs one at least"
        )


def rows_of(config: Any) -> list[str]:
    """The rows but those that are None, which leaves them out."""
    return [row for row in config.rows if config.rows[row] is not None]


def as_comparison(config: Any) -> ConfigDict:
    """The fields of a comparison whose rows are those of an audit."""
    return ConfigDict(
        dict(
            argument=config.argument,
            shared=tuple(config.shared),
            dataset=config.dataset,
            rows=config.rows,
            ipcs=(config.ipc,),
            seeds=(0,),
            student_seeds=1,
            protocols={compare.OWN: ()},
            controls="",
            control_sets=(),
        )  # fmt: skip
    )


def cell_of(config: Any, row: str, run: int = 0) -> Cell:
    """The cell of a row in a run: its seed is the number of the run."""
    return Cell(row, config.ipc, run, compare.OWN)


def of_row(config: Any, row: str) -> Experiment:
    """A row's experiment on the whole data set.

    Raises:
      UserError: it cannot be used, or has a network that was trained on other images.
    """
    found: Experiment = compare.experiment_of(as_comparison(config), cell_of(config, row))
    imported = [n for n in found.squeeze.teachers if found.network(n).weights]
    if found.recover.maker == "generate" and found.generate.directory:
        imported.append("the generator")
    imported += ["CLIP"] if found.recover.clip else []
    imported += ["recover.initialise_from"] if found.recover.initialise == "folder" else []
    imported += ["relabel.labels_from"] if found.relabel.labels_from else []
    if imported:
        raise UserError(
            f"{row}: {', '.join(imported)} is from elsewhere, of images that are not known; an "
            f"audit makes all that it uses anew, so unset what is read"
        )
    return found


def of_run(experiment: Experiment, path: str, run: int) -> Experiment:
    """A row's experiment on the images of a run, with the seeds of that run."""
    return dataclasses.replace(
        experiment,
        seed=run,
        # A share of the images that is held out is none of them: it was left out before.
        dataset=dataclasses.replace(
            experiment.dataset, source="npz", path=Path(path), held_out=0.0
        ),
        squeeze=dataclasses.replace(experiment.squeeze, seed=run),
        validate=dataclasses.replace(experiment.validate, seeds=(run,)),
    )
