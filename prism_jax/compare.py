"""Compare methods under equal protocols, and under each method's own, with the same controls.

    python -m prism_jax.compare --config=configs/compare/digits.py

A *cell* is a method at an IPC, with one seed, under one protocol: an experiment of its own in a
working directory of its own. Teachers are made once for all of them, images once for all
protocols of a method. What is finished is never done again, so the command continues where it
was stopped; the tables are written anew after every cell.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from prism_jax.errors import UserError

HELP = """\
prism_jax: compare methods

    python -m prism_jax.compare --config=FILE [--config.FIELD=VALUE ...] [flags]

Flags:
    --config=FILE        a file of configs/compare/
    --config.a=VALUE     override one field of it
    --workdir=DIR        where everything is written (default: runs/<name of the comparison>)
    --plan               list the cells and which of them are finished, then stop
    --help               this text

Writes cells/, teachers/, table.md, table.tex, table.csv and accuracy_over_cost.png.
The same command continues a comparison that was stopped, and adds what its config has gained.
"""
OWN = "own"  # the protocol that overrides nothing
TEACHERS = "teachers"


class Cell(NamedTuple):
    """One experiment of a comparison."""

    row: str
    ipc: int
    seed: int
    protocol: str

    @property
    def name(self) -> str:
        return f"{self.row}/ipc{self.ipc}/seed{self.seed}/{self.protocol}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status, as ``prism_jax.main`` gives it.
    """
    from prism_jax.main import guarded

    return guarded(_main, argv, HELP)


def _main(argv: list[str]) -> int:
    from prism_jax.environment import prepare_environment
    from prism_jax.main import parse

    problems: list[str] = []
    config, given = parse(argv, problems)
    if problems:
        raise UserError("; ".join(problems))
    # The comparison's own config does not say how its cells use devices.
    for cell in cells(config)[:1]:
        prepare_environment(parsed(config, cell, problems), problems)
        if problems:
            raise UserError(f"{cell.name}: {'; '.join(problems)}")
    return _compare(config, given.workdir or f"runs/{config.name}", given.plan, argv)


def _compare(config: Any, root: str, plan: bool, argv: Sequence[str]) -> int:
    from prism_jax import parallel, progress

    parallel.find_devices()
    if not parallel.is_main():
        raise UserError("a comparison runs in one process; its cells use all of its devices")
    experiments = {cell: experiment_of(config, cell) for cell in cells(config)}
    comparison = Comparison(pathlib.Path(root), experiments)
    if plan:
        for cell in experiments:
            done = "done" if comparison.result(cell) else "to do"
            progress.say(f"{done:6} {cell.name}")
        return 0
    return until_stopped(lambda stop: comparison.run(stop, argv), root)


def until_stopped(work: Callable[[Any], None], root: str) -> int:
    """Work until it is done, or a stop is requested: the exit status."""
    from prism_jax.stages.coordination import Interrupted, StopSignal

    stop = StopSignal()
    stop.install()
    try:
        work(stop)
    except Interrupted as interrupted:
        print(
            f"stopped by {interrupted}; everything so far is saved in {root}. Run the same "
            f"command again to continue.",
            file=sys.stderr,
        )
        return 128 + interrupted.signum
    return 0


# --- what is compared -----------------------------------------------------------------------


def cells(config: Any) -> list[Cell]:
    """All cells, in the order in which they are worked on: early tables are comparable.

    Protocol by protocol and seed by seed, everything; the controls first.
    """
    found = []
    for protocol in config.protocols:
        for seed in config.seeds:
            for ipc in config.ipcs:
                for row in sorted(config.rows, key=lambda row: row != config.controls):
                    if row != config.controls or protocol != OWN:
                        found.append(Cell(row, ipc, seed, protocol))
    return found


def experiment_of(config: Any, cell: Cell) -> Any:
    """The experiment of one cell: a method's config, with overrides.

    Raises:
      UserError: it cannot be used; the cell is named.
    """
    from prism_jax.config import resolve

    problems: list[str] = []
    fields = parsed(config, cell, problems)
    try:
        return resolve(fields, problems)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


def parsed(config: Any, cell: Cell, problems: list[str]) -> Any:
    """The fields of one cell's experiment, not yet checked."""
    from prism_jax.main import parse

    file, *own = config.rows[cell.row]
    data = (f"dataset.{field}={value}" for field, value in config.get("dataset", {}).items())
    overrides = [*data, *config.shared, *own, *config.protocols[cell.protocol]]
    first = cell.seed * config.student_seeds
    students = tuple(range(first, first + config.student_seeds))
    overrides += [f"seed={cell.seed}", f"validate.seeds={students}"]
    if cell.row == config.controls:
        overrides.append(f"validate.controls={','.join(config.control_sets)}")
    elif cell.protocol != OWN:
        overrides.append("validate.controls=()")
    last = dict(override.partition("=")[::2] for override in overrides)  # a list would grow
    argument = ",".join(filter(None, (config.argument, f"ipc{cell.ipc}")))
    flags = [f"--config={file}:{argument}", *(f"--config.{k}={v}" for k, v in last.items())]
    try:
        return parse(flags, problems)[0]
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


class Comparison:
    """Cells, the folder they are in, and what is known of them."""

    COMMAND = "prism_jax.compare"

    def __init__(self, root: pathlib.Path, experiments: dict[Cell, Any]):
        self.root, self.experiments = root, experiments
        self._peaks: dict[tuple[str, int], int | None] = {}

    def folder(self, cell: Cell) -> pathlib.Path:
        return self.root / "cells" / cell.name

    def teachers(self, cell: Cell) -> pathlib.Path:
        """The folder whose teachers a cell shares with others."""
        return self.root / TEACHERS

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's summary and costs; None where it is not finished with its settings."""
        from prism_jax.data import workdir

        path = self.folder(cell) / "cell.json"
        if not path.exists():
            return None
        found = workdir.read_record(path)
        return found if found["experiment"] == self.digest(cell) else None

    def digest(self, cell: Cell) -> str:
        """What decides a cell's numbers."""
        return digest_of(self.experiments[cell])

    def run(self, stop: Any, argv: Sequence[str]) -> None:
        """Everything that is missing, and the tables."""
        from prism_jax import parallel, progress
        from prism_jax.environment import provenance

        command = {"command": f"python -m {self.COMMAND} {shlex.join(argv)}"}

        def made_by() -> dict[str, Any]:  # memory grows while a cell is made
            return provenance(argv) | command

        with_teachers: dict[Cell, Any] = {}
        for folder in {self.teachers(cell): None for cell in self.experiments}:
            sharing = {c: e for c, e in self.experiments.items() if self.teachers(c) == folder}
            with_teachers |= _with_all_teachers(sharing)
        todo = [cell for cell in self.experiments if self.result(cell) is None]
        try:
            with parallel.shared_programs():
                for number, cell in enumerate(todo, 1):
                    progress.say(f"cell {number} of {len(todo)}: {cell.name}")
                    self._squeeze(cell, with_teachers[cell], stop, made_by)
                    self._run(cell, stop, made_by)
                    self.write_tables()
        finally:
            self.write_tables(figure=True)
        self._show()

    def _show(self) -> None:
        from prism_jax import progress

        progress.say(f"\n{(self.root / 'table.md').read_text()}\n{self.root / 'table.md'}")

    def _squeeze(
        self, cell: Cell, experiment: Any, stop: Any, made_by: Callable[[], dict[str, Any]]
    ) -> None:
        """The networks that any cell asks for, and the statistics that this one does; once."""
        from prism_jax import pipeline
        from prism_jax.stages.context import Context

        root = str(self.teachers(cell))
        context = Context(experiment, root, stop=stop, provenance=made_by())
        try:
            pipeline.RUNNERS["squeeze"](context)
        finally:
            context.work.lock.release()

    def _run(self, cell: Cell, stop: Any, made_by: Callable[[], dict[str, Any]]) -> None:
        """One cell's pipeline, which begins with what others have made."""
        from prism_jax import pipeline
        from prism_jax.data import workdir
        from prism_jax.stages.context import Context

        experiment, root = self.experiments[cell], self.folder(cell)
        context = Context(experiment, str(root), stop=stop, provenance=made_by())
        try:
            pipeline.adopt(context, self.teachers(cell))
            record = {"experiment": self.digest(cell), **self._make(cell, context, made_by)}
            workdir.write_record(root / "cell.json", record)
        finally:
            context.work.lock.release()

    def _make(
        self, cell: Cell, context: Any, made_by: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Everything that a cell makes, and what is kept of it."""
        from prism_jax import pipeline
        from prism_jax.config import STAGES
        from prism_jax.data import workdir
        from prism_jax.stages import analyse

        others = list(self._with_equal_images(cell))
        for other in others:
            if (self.folder(other) / "recover" / "manifest.json").exists():
                pipeline.adopt(context, self.folder(other))
                break
        # Equal images are analysed once.
        analysed = any(self.result(other) for other in others)
        pipeline.run(context, STAGES[:-1] if analysed else STAGES)
        sets = {found.name: found for found in pipeline.sets(context)}
        if not analyse.is_summarised(context, sets):
            analyse.write_summary(context, sets, made_by())
        return {
            "peak_bytes": self._peak_bytes(cell),
            "summary": workdir.read_json(self.folder(cell) / "summary.json"),
        }

    def _peak_bytes(self, cell: Cell) -> int | None:
        """Of recover, as compiled: the same for every seed and protocol."""
        from prism_jax import plan

        if cell[:2] not in self._peaks:
            alike = (self.result(c) for c in self.experiments if c[:2] == cell[:2])
            known = [found["peak_bytes"] for found in alike if found is not None]
            peak = known[0] if known else plan.recover_bytes(self.experiments[cell])
            self._peaks[cell[:2]] = peak
        return self._peaks[cell[:2]]

    def _with_equal_images(self, cell: Cell) -> Iterator[Cell]:
        for other in self.experiments:
            if other[:3] == cell[:3] and other.protocol != cell.protocol:
                yield other

    def write_tables(self, *, figure: bool = False) -> None:
        """The tables of all cells that are finished, and the figure, which takes seconds."""
        from prism_jax.analysis import comparison
        from prism_jax.data import workdir

        found = [
            comparison.Entry(*cell, summary=result["summary"], peak_bytes=result["peak_bytes"])
            for cell in self.experiments
            if (result := self.result(cell)) is not None
        ]
        if not found:
            return
        for name, content in comparison.documents(found, figure=figure).items():
            workdir.write_bytes(self.root / name, content)


def _with_all_teachers(experiments: dict[Cell, Any]) -> dict[Cell, Any]:
    """The experiments, each with the teachers of all.

    Raises:
      UserError: they make the same teacher differently.
    """
    networks: dict[str, Any] = {}
    teachers: list[str] = []
    first = next(iter(experiments.values()))
    plain = dataclasses.replace(first.squeeze, teachers=())
    for cell, experiment in experiments.items():
        if dataclasses.replace(experiment.squeeze, teachers=()) != plain:
            raise UserError(
                f"{cell.name} trains its teachers differently from the others; state the fields of "
                f"squeeze in the comparison's `shared`, so that all share their teachers"
            )
        for name in experiment.squeeze.teachers:
            network = experiment.network(name)
            if networks.setdefault(name, network) != network:
                raise UserError(
                    f"{cell.name} means another network by {name} than the others; state "
                    f"networks.{name} in the comparison's `shared`"
                )
            teachers += [name] if name not in teachers else []
    return {
        cell: dataclasses.replace(
            experiment,
            networks={**experiment.networks, **networks},
            squeeze=dataclasses.replace(experiment.squeeze, teachers=tuple(teachers)),
        )
        for cell, experiment in experiments.items()
    }


def digest_of(experiment: Any) -> str:
    """What decides an experiment's numbers."""
    from prism_jax.config import to_dict
    from prism_jax.data import workdir
    from prism_jax.stages.fingerprints import BITS_VERSION

    return workdir.digest({"bits_version": BITS_VERSION, **to_dict(experiment)})


if __name__ == "__main__":
    sys.exit(main())
