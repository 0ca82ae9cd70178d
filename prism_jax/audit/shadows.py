"""The shadow runs: cells of a comparison, each with teachers that saw its own images."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.analysis import audit, membership
from prism_jax.audit import canaries
from prism_jax.audit.canaries import Plan, Split
from prism_jax.audit.observing import ATTACKS, observe
from prism_jax.audit.rows import cell_of, of_row, of_run, rows_of
from prism_jax.cells import Cell, Cells, digest_of
from prism_jax.config import STAGES, Experiment
from prism_jax.data import workdir
from prism_jax.errors import UserError

MEMBERS, WITHOUT = "members", "without"


class Shadows(Cells):
    """All runs of all rows: a cell's seed is the number of its run."""

    COMMAND = "prism_jax.audit"

    def __init__(self, root: pathlib.Path, config: Any):
        """Refuse what cannot be audited; write nothing yet."""
        self.config = config
        rows = {row: of_row(config, row) for row in rows_of(config)}
        self.base = next(iter(rows.values()))
        self.without = tuple(config.without or ())
        if unknown := set(self.without) - set(config.rows):
            raise UserError(f"without names {', '.join(sorted(unknown))}; rows: {', '.join(rows)}")
        self.train, self.test = _split(self.base, "train"), _split(self.base, "test")
        self.plan: Plan = canaries.plan_of(
            self.train.labels_N, canaries=config.canaries, always=config.always,
            runs=config.shadows, seed=config.seed,
        )  # fmt: skip
        experiments = {}
        self.root = root  # whose folders the experiments name
        for run in range(config.shadows):
            for row, experiment in rows.items():
                cell = cell_of(config, row, run)
                path = self._folder_of(cell).with_suffix(".npz")
                experiments[cell] = of_run(experiment, str(path), run)
        super().__init__(root, experiments)

    def _folder_of(self, cell: Cell) -> pathlib.Path:
        kind = WITHOUT if cell.row in self.without else MEMBERS
        return self.root / "shadows" / f"{cell.seed:04d}" / kind

    def teachers(self, cell: Cell) -> pathlib.Path:
        return self._folder_of(cell)

    def digest(self, cell: Cell) -> str:
        """Wherever the working directory is: plan.json says what its data are."""
        experiment = self.experiments[cell]
        path = self._folder_of(cell).relative_to(self.root).as_posix()
        dataset = dataclasses.replace(experiment.dataset, path=path)
        return digest_of(dataclasses.replace(experiment, dataset=dataset))

    def write_data(self) -> None:
        """What the runs train on; canaries that were drawn otherwise are refused."""
        record = {
            "canaries": self.plan.canaries_N.tolist(),
            "always": self.plan.always_M.tolist(),
            "seed": self.config.seed,
            "images": {"train": self.train.digest, "test": self.test.digest},
        }
        path = epath.Path(self.root) / "plan.json"
        found = workdir.read_record(path) if path.exists() else None
        if found is None:
            workdir.write_record(path, record)
        elif found.get("images", record["images"]) != record["images"]:  # older ones do not say it
            raise UserError(
                f"{path} says that this audit was begun on other images than the data set has "
                f"now; use another --workdir, or the data that it was begun with"
            )
        elif {**found, "images": record["images"]} != record:
            raise UserError(
                f"{path} says that other images are canaries here; use another --workdir, or the "
                f"seed, canaries and always that it was begun with"
            )
        for cell in self.experiments:
            self.data(
                self._folder_of(cell).with_suffix(".npz"),
                self.plan.chosen(cell.seed, self._folder_of(cell).name),
            )

    def data(self, path: pathlib.Path, at_N: np.ndarray) -> str:
        """An archive of some training images, and all test images."""
        return str(canaries.write(epath.Path(path), self.train, self.test, at_N))

    def make(
        self, cell: Cell, context: Any, made_by: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Sets and students, and what an attacker sees of them."""
        from prism_jax import pipeline

        pipeline.run(context, STAGES[:-1])
        at = self.plan.canaries_N
        return observe(context, self.train.images_uint8_NHWC[at], self.train.labels_N[at])

    def attacks(self) -> list[audit.Attack]:
        """What was observed of every row, for the pairs of runs that are finished.

        Rows whose networks saw the same images have one teacher, which is attacked once.
        """
        found, teachers = [], set()
        for row, cells in self._cells_by_row().items():
            results = [self.result(cell) for cell in cells]
            both = [bool(a and b) for a, b in zip(results[::2], results[1::2], strict=True)]
            runs = [run for run in range(len(results)) if both[run // 2]]
            if len(runs) < membership.FEWEST:
                continue
            known = [result for run in runs if (result := results[run])]
            teacher = self.experiments[cells[0]].relabel.teachers[0]
            told = f"{teacher} ({self._folder_of(cells[0]).name})"
            for attack in ATTACKS:
                if attack == "teacher" and told in teachers:
                    continue
                values_RN = np.array([result[attack] for result in known])
                top1 = tuple(result["top1"].get(attack) for result in known)
                name = told if attack == "teacher" else row
                found.append(audit.Attack(name, attack, values_RN, self.plan.member_RN[runs], top1))
            teachers.add(told)
        return found

    def _cells_by_row(self) -> dict[str, list[Cell]]:
        return {
            row: [cell_of(self.config, row, run) for run in range(self.config.shadows)]
            for row in rows_of(self.config)
        }

    def write_tables(self, *, whole: bool = False) -> None:
        """All tables and figures of rows with enough runs: where it ends, or is stopped."""
        if not whole:
            return
        path = self.root / "gradients.json"
        study = workdir.read_record(path)["study"] if path.exists() else None
        for name, content in audit.documents(self.attacks(), study).items():
            workdir.write_bytes(self.root / name, content)

    def show(self) -> None:
        """Print the table, or why there is none yet."""
        if not (self.root / "table.md").exists():
            progress.say(f"no row has {membership.FEWEST} finished runs yet: {self.root}")
            return
        super().show()
        if not audit.has_auditor():
            progress.say(
                "the tables have no second opinion: jax-privacy is not installed (pip install "
                "'prism-jax[audit]', then the same command again)"
            )


def _split(experiment: Experiment, split: str) -> Split:
    from prism_jax.stages.inputs import Inputs

    inputs = Inputs(experiment)
    source = inputs.open(split)
    labels_N = np.asarray(source.labels_N, np.int32)
    return Split(inputs.read(source)[:], labels_N, workdir.digest(inputs.fields(source)))
