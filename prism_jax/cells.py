"""Cells: many runs, each in a working directory of its own, that share their networks.

What is finished is never done again, so a command that makes cells continues where it was stopped.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prism_jax.errors import UserError

TEACHERS, GENERATORS, CELLS = "teachers", "generators", "cells"
# The share of the machine's memory at which the programs of finished cells are given up. A row of
# networks for small images leaves some 0.4 GB of them on a CPU.
MOST_MEMORY = 0.25


class Cell(NamedTuple):
    """One experiment among others."""

    row: str
    ipc: int
    seed: int
    protocol: str

    @property
    def name(self) -> str:
        return f"{self.row}/ipc{self.ipc}/seed{self.seed}/{self.protocol}"


class Cells(abc.ABC):
    """Cells, the folder they are in, and what is known of them.

    Attributes:
      COMMAND: the module that makes them.
      root: the folder.
      experiments: of the cells, in their order.
    """

    COMMAND: str

    def __init__(self, root: pathlib.Path, experiments: dict[Cell, Any]):
        check_environment(experiments)
        self.root, self.experiments = root, experiments

    @abc.abstractmethod
    def make(self, cell: Cell, context: Any, made_by: Callable[[], dict[str, Any]]) -> dict:
        """Everything that a cell makes, from the networks on, and what is kept of it."""

    @abc.abstractmethod
    def write_tables(self, *, whole: bool = False) -> None:
        """The tables of all cells that are finished.

        Args:
          whole: with what takes seconds: where the work ends, or is stopped.
        """

    def digest(self, cell: Cell) -> str:
        """What decides a cell's numbers."""
        return digest_of(self.experiments[cell])

    def folder(self, cell: Cell) -> pathlib.Path:
        return self.root / CELLS / cell.name

    def teachers(self, cell: Cell) -> pathlib.Path:
        """The folder whose teachers a cell shares with others."""
        return self.root / TEACHERS

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What is kept of a cell; None where it is not finished with its settings."""
        from prism_jax.data import workdir

        path = self.folder(cell) / "cell.json"
        if not path.exists():
            return None
        found = workdir.read_record(path)
        return found if found["experiment"] == self.digest(cell) else None

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
            with_teachers |= with_all_teachers(sharing)
        todo = [cell for cell in self.experiments if self.result(cell) is None]
        if todo:
            self._check_finished()
            progress.say(parallel.devices_in_words())
        most_memory = MOST_MEMORY
        try:
            with parallel.shared_programs():
                for number, cell in enumerate(todo, 1):
                    progress.say(f"cell {number} of {len(todo)}: {cell.name}")
                    with _named(cell):
                        squeezed = self._squeeze(cell, with_teachers[cell], stop, made_by)
                        self._run(cell, squeezed, stop, made_by)
                    self.write_tables()
                    most_memory = _forget(most_memory)
        finally:
            self.write_tables(whole=True)
        self.show()

    def _check_finished(self) -> None:
        """Refuse to add to cells that were made from other images or networks than are there now.

        Raises:
          UserError: the files that the settings name hold something else than before.
        """
        from prism_jax.stages.context import Context

        now: dict[tuple[str, ...], dict[str, str]] = {}
        changed = {}
        for cell, experiment in self.experiments.items():
            before = (self.result(cell) or {}).get("read")
            if not before:
                continue
            reads = digest_of(_reading(experiment)), *before
            if reads not in now:
                context = Context(experiment, str(self.folder(cell)))
                now[reads] = read_by(context, self.root, before)
            if differs := [what for what, of in now[reads].items() if before[what] != of]:
                changed[cell.name] = differs
        if changed:
            names, whats = list(changed), dict.fromkeys(w for ws in changed.values() for w in ws)
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise UserError(
                f"finished cells ({shown}) were made from other {', '.join(whats)} than the "
                f"settings name now, and one table would mix both. Use another --workdir, or put "
                f"back what was there; or delete {self.root / CELLS} and {self.root / TEACHERS}"
            )

    def show(self) -> None:
        """Print the table."""
        from prism_jax import progress

        progress.say(f"\n{(self.root / 'table.md').read_text()}\n{self.root / 'table.md'}")

    def _squeeze(
        self, cell: Cell, experiment: Any, stop: Any, made_by: Callable[[], dict[str, Any]]
    ) -> pathlib.Path:
        """What squeeze makes, once: the networks that any cell asks for, and what this one does.

        A generator, and what CLIP says of the classes, lie in a folder of their own for every kind,
        beside copies of the networks.

        Returns:
          The folder with all that the cell adopts.
        """
        from prism_jax import pipeline
        from prism_jax.data import workdir
        from prism_jax.stages import fingerprints, generator, guiding
        from prism_jax.stages.context import Context

        def squeeze(experiment: Any, root: pathlib.Path, source: pathlib.Path | None) -> None:
            context = Context(experiment, str(root), stop=stop, provenance=made_by())
            try:
                if source:
                    pipeline.adopt(context, source)
                pipeline.RUNNERS["squeeze"](context)
            finally:
                context.work.lock.release()

        networks = self.teachers(cell)
        recover = dataclasses.replace(experiment.recover, maker="optimise", clip=0.0)
        squeeze(dataclasses.replace(experiment, recover=recover), networks, None)
        context, own = Context(experiment, str(networks)), {}
        if generator.wanted(context):
            own["generator"] = fingerprints.generator(context)
        if guiding.wanted(context):
            own["clip"] = fingerprints.clip_texts(context)
        if not own:
            return networks
        root = self.root / GENERATORS / workdir.digest(own)
        squeeze(experiment, root, networks)
        return root

    def _run(
        self, cell: Cell, squeezed: pathlib.Path, stop: Any, made_by: Callable[[], dict[str, Any]]
    ) -> None:
        """One cell's pipeline, which begins with what others have made."""
        from prism_jax import pipeline
        from prism_jax.data import workdir
        from prism_jax.stages.context import Context

        experiment, root = self.experiments[cell], self.folder(cell)
        context = Context(experiment, str(root), stop=stop, provenance=made_by())
        try:
            pipeline.adopt(context, squeezed)
            made = self.make(cell, context, made_by)
            record = {"experiment": self.digest(cell), "read": read_by(context, self.root), **made}
            workdir.write_record(root / "cell.json", record)
        finally:
            context.work.lock.release()


@contextlib.contextmanager
def _named(cell: Cell) -> Iterator[None]:
    """Say of which cell a refusal is; its remedies are those of a run."""
    try:
        yield
    except UserError as error:
        ours = " (These cells take no --from: in another --workdir all is made anew.)"
        error.args = (f"{cell.name}: {error}{ours if '--from=' in str(error) else ''}",)
        raise


def _forget(most: float) -> float:
    """Give up the programs of finished cells where memory has grown; from where on it has next.

    What else the process holds, data sets say, does not shrink: then it may first double again.
    """
    from prism_jax import environment, parallel

    if environment.used_memory() < most:
        return most
    parallel.forget_programs()
    environment.return_freed_memory()
    return max(MOST_MEMORY, 2 * environment.used_memory())


def check_fields(config: Any, kind: str, wanted: Sequence[str], there: Sequence[str] = ()) -> None:
    """Refuse a config of something else, and one in which something is unset, by what it lacks.

    Args:
      kind: whose config it must be, and the folder of ``configs/`` that holds such.
      wanted: fields that must have a value, "group.field" within a group.
      there: fields that may be None.

    Raises:
      UserError: it has not got all of them.
    """

    def value(name: str) -> Any:
        found = config
        for key in name.split("."):
            found = None if found is None else found.get(key)
        return found

    lacking = [name for name in wanted if value(name) is None]
    lacking += [name for name in there if name not in config]
    if lacking:
        raise UserError(
            f"the config has no {', '.join(lacking)}, so nothing to {kind}; --config takes a file "
            f"of configs/{kind}/, and these fields need a value"
        )


def check_seeds(name: str, *values: Any) -> None:
    """Refuse what is no seed.

    Raises:
      UserError: not all of them are whole numbers of 32 bits.
    """
    from prism_jax.config.rules.common import SEEDS

    for value in values:
        if not isinstance(value, int) or not 0 <= value < SEEDS:
            raise UserError(
                f"{name} has {value!r}; a seed is a whole number, zero or positive, below {SEEDS}"
            )


def check_root(path: str, kind: str) -> None:
    """Refuse a working directory that cells cannot lie in.

    Raises:
      UserError: it is a file, or in an object store.
    """
    from prism_jax.data import workdir

    if workdir.is_store(path):
        raise UserError(
            f"--workdir={path} is in an object store, and {kind} is written to a folder of this "
            f"machine; name one, and copy it there (of runs only those of prism_jax.main can be "
            f"at gs://)"
        )
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_dir():
        raise UserError(f"--workdir={path} is a file; name a folder, or one that is not there")


# Of ``parallel``: what holds for a whole process, and so for all of its cells.
OF_THE_PROCESS = ("deterministic", "matmul_precision")


def check_environment(experiments: Mapping[Cell, Any]) -> None:
    """Refuse cells that a process cannot all make as they ask.

    Raises:
      UserError: they ask for different settings of the process.
    """
    for field in OF_THE_PROCESS:
        asked: dict[Any, Cell] = {}
        for cell, experiment in experiments.items():
            asked.setdefault(getattr(experiment.parallel, field), cell)
        if len(asked) > 1:
            told = " and ".join(f"{value!r} ({cell.name})" for value, cell in asked.items())
            raise UserError(
                f"parallel.{field} is {told}; one process makes all cells, and has one of these: "
                f"state it in `shared`"
            )


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
        return interrupted.status
    return 0


def with_all_teachers(experiments: dict[Cell, Any]) -> dict[Cell, Any]:
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


def _reading(experiment: Any) -> Any:
    """An experiment of which only counts what ``read_by`` depends on."""
    kept: set[str] = set()
    if experiment.recover.initialise == "folder" or experiment.recover.clip:
        kept |= {"recover"}
    if experiment.generate.directory:
        kept |= {"recover", "generate"}
    if experiment.relabel.labels_from:
        kept |= {"recover", "relabel"}
    sections = {"recover", "relabel", "validate", "analyse", "generate"}
    return dataclasses.replace(
        experiment, name="", seed=0, **{section: None for section in sorted(sections - kept)}
    )


def read_by(
    context: Any, root: pathlib.Path, known: Collection[str] | None = None
) -> dict[str, str]:
    """Digests of what a run reads: real images, its networks' making or weights, what others made.

    Args:
      root: the folder of all cells; images that one begins with and another made are not read.
      known: of what alone they are wanted; None: of everything.
    """
    from prism_jax.data import workdir
    from prism_jax.stages import fingerprints, imported

    config, inputs = context.config, context.inputs
    images = fingerprints.real_images(context)
    teachers = fingerprints.pool(context, config.squeeze.teachers)
    found = {f"{split} images": digest for split, digest in images.items()} | {
        f"teacher {name}": digest for name, digest in teachers.items()
    }
    more: dict[str, Callable[[], str]] = {}
    if config.recover.initialise == "folder" and not (
        pathlib.Path(config.recover.initialise_from).is_relative_to(root / CELLS)
    ):
        more["initial images"] = lambda: workdir.digest(inputs.fields(inputs.start))
    if config.recover.maker == "generate" and config.generate.directory:
        more["generator"] = lambda: workdir.digest(fingerprints.generator(context))
    if config.recover.clip:
        more["CLIP"] = lambda: workdir.digest(fingerprints.clip(context))
    if config.relabel.labels_from:
        more["labels"] = lambda: imported.digest_of_labels(context)
    # What older cells did not record is not looked for: it may be gone.
    found |= {what: of() for what, of in more.items() if known is None or what in known}
    return {what: of for what, of in found.items() if known is None or what in known}


# Fields that are younger than finished cells, and what it means that those lack them.
ADDED: dict[str, dict[str, Any]] = {"generate": {"encode_batch_size": None}}


def digest_of(experiment: Any, start: str | None = None) -> str:
    """What decides an experiment's numbers; ``start`` is that of the cell it begins with."""
    from prism_jax.config import to_dict
    from prism_jax.data import workdir
    from prism_jax.stages.fingerprints import BITS_VERSION

    fields = {"bits_version": BITS_VERSION, **to_dict(experiment)}
    for section, added in ADDED.items():
        if of := fields[section]:  # what only reads has no such section
            fields[section] = {k: v for k, v in of.items() if k not in added or v != added[k]}
    return workdir.digest(fields | ({"start": start} if start else {}))
