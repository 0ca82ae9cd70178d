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
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from prism_jax.cells import (
    CELLS,
    Cell,
    Cells,
    check_fields,
    check_root,
    check_seeds,
    digest_of,
    until_stopped,
)
from prism_jax.errors import UserError
from prism_jax.paths import at_home

HELP = """\
prism_jax: compare methods

    python -m prism_jax.compare --config=FILE [--config.FIELD=VALUE ...] [flags]

Flags:
    --config=FILE        a file of configs/compare/
    --config.a=VALUE     override one field of it
    --workdir=DIR        where everything is written (default: runs/<name of the comparison>)
    --plan               list the cells and which of them are finished, then stop
    --target=NAME        with --plan: hours on a machine that is not here, such as h100, by its
                         compiler
    --cost=AXIS          of the figure: seconds (default), work (without squeeze: what seconds
                         are where every network was imported), bytes, recover or memory
    --help               this text

Writes cells/, teachers/, generators/, table.md, table.tex, table.csv, differences.csv,
accuracy_over_cost.png and records.json.
The same command continues a comparison that was stopped, and adds what its config has gained.

    python -m prism_jax.compare --records=FILE[,FILE ...] [--workdir=DIR] [--cost=AXIS]

makes the tables anew from a records.json (or the folder that holds it), without the runs: printed,
and written to DIR where one is given. Of several, such as of seeds that machines shared out, it
makes those of all their cells, and a records.json of them.
"""
OWN = "own"  # the protocol that overrides nothing
RECORDS = "records.json"
FLAGS = ("workdir", "plan", "target", "cost", "records")
# Raised when a cell's record gains something: finished cells are then recorded anew, not made anew.
RECORD_VERSION = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status, as ``prism_jax.main`` gives it.
    """
    from prism_jax.main import guarded

    return guarded(_main, argv, HELP)


def _main(argv: list[str]) -> int:
    from prism_jax.environment import prepare_environment
    from prism_jax.main import check_flags, parse, parse_target

    problems: list[str] = []
    records, rest = _taken(argv, "records")
    cost, rest = _taken(rest, "cost")
    cost = cost or "seconds"
    if records is not None:
        folder, rest = _taken(rest, "workdir")
        if rest:
            raise UserError(f"--records={records} goes with --workdir and --cost, not {rest[0]}")
        return _from_records(records, folder, cost)
    config, given = parse(rest, problems)
    check_flags(given, "a comparison", FLAGS, problems)
    target = parse_target(given, problems)
    if problems:
        raise UserError("; ".join(problems))
    check_config(config)
    root = given.workdir or f"runs/{config.name}"
    check_root(root, "a comparison")
    # The comparison's own config does not say how its cells use devices.
    cell = cells(config)[0]
    prepare_environment(parsed(config, cell, problems), problems)
    if problems:
        raise UserError(f"{cell.name}: {'; '.join(problems)}")
    return _compare(config, root, given.plan, cost, argv, target)


def _taken(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a flag, "--name=value" or "--name value", and the other arguments."""
    from prism_jax.main import joined

    flag, value, rest = f"--{name}", None, []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == flag and arguments:
            value = arguments.pop(0)
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
        else:
            rest.append(argument)
    return value, joined(rest)


def _check_cost(name: str) -> None:
    from prism_jax.analysis.expenses import COSTS

    if name not in COSTS:
        raise UserError(f"--cost={name}; allowed: {', '.join(COSTS)}")


def _from_records(paths: str, folder: str | None, cost: str) -> int:
    """The tables of cells whose records are kept."""
    from prism_jax import progress
    from prism_jax.analysis import cells, comparison
    from prism_jax.data import workdir

    _check_cost(cost)
    if folder := folder and at_home(folder):
        check_root(folder, "a comparison")
    found = {}
    for path in [paths] if pathlib.Path(at_home(paths)).exists() else paths.split(","):
        file = pathlib.Path(at_home(path))
        file = file / RECORDS if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"there is no {file}; --records takes the {RECORDS} of a comparison")
        if str(file) in found:
            raise UserError(f"--records names {file} twice; name every comparison once")
        records = workdir.read_record(file)
        try:
            found[str(file)] = cells.from_records(records)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
    entries, choices = cells.merged(found)
    documents = comparison.documents(entries, choices, cost=cost)
    if folder:
        for name, content in documents.items():
            workdir.write_bytes(pathlib.Path(folder) / name, content)
        if len(found) > 1:
            together = cells.to_records(entries, choices)
            workdir.write_record(pathlib.Path(folder) / RECORDS, together)
    progress.say(documents["table.md"].decode())
    return 0


def choices_of(config: Any) -> Any:
    """What a comparison's sets are measured by.

    Raises:
      UserError: it names a row or set that the comparison does not have, or two by one name.
    """
    from prism_jax.analysis.differences import Choices
    from prism_jax.analysis.intervals import Resampling

    reference, selected = config.get("reference"), tuple(config.get("selected_real") or ())
    sets = {row: _more_controls(config, row) for row in config.rows}
    for row in config.get("more_controls") or ():
        names = _more_controls(config, row)
        others = [other for other in sets if other != row and not {*names}.isdisjoint(sets[other])]
        if row not in sets or others:
            why = f"{others[0]} has one of these too" if others else "there is no such row"
            raise UserError(
                f"more_controls gives {row} {', '.join(names)}, and {why}; the tables call a set "
                f"by its name alone, so one row makes it"
            )
    if config.controls is not None:
        sets[config.controls] = _control_sets(config)
    there = {row for row in config.rows if config.rows[row] is not None}
    for row in sorted(there & sets.keys()):
        if both := sorted(there.intersection(sets[row])):
            raise UserError(
                f"{both[0]} is a row, and a set that the row {row} trains on beside its images; "
                f"the tables would call both by one name: rename the row, or take the set out"
            )
    known = {*sets, *(f"{row}/{name}" for row, names in sets.items() for name in names)}
    known |= {name for names in sets.values() for name in names}
    for field, name in [("reference", reference), *(("selected_real", s) for s in selected)]:
        if name is not None and name not in known:
            raise UserError(f"{field} names {name!r}; allowed: {', '.join(sorted(known))}")
    resamples = config.get("resamples", Resampling.resamples)
    if not isinstance(resamples, int) or resamples < 100:
        raise UserError(f"resamples is {resamples!r}; it must be a whole number, 100 at least")
    controls = () if config.controls is None else (config.controls,)
    return Choices(Resampling(resamples), reference, selected, controls)


def _show_forecast(experiments: dict[Cell, Any], target: Any) -> None:
    """What every row takes on a machine that is not here, and all of them together.

    Seeds differ in nothing; images are made once for all protocols.
    """
    from prism_jax import progress
    from prism_jax.accelerators import forecast

    progress.say(f"\n{forecast.said_of(target)}")
    alike: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in experiments:
        alike.setdefault((cell.row, cell.ipc, cell.protocol), []).append(cell)
    known: forecast.Known = {}
    of_images = ("latents", "recover", "refining")  # made once for all protocols
    hours, unknown, made = 0.0, 0, set()
    for (row, ipc, protocol), cells in alike.items():
        progress.say(f"\n{row}, IPC {ipc}, {protocol}: {len(cells)} x")
        for name, stage in forecast.stages(experiments[cells[0]], target, known).items():
            if (row, ipc) in made and name.startswith(of_images):
                continue
            if name.startswith("generator"):
                continue
            progress.say(f"  {name} {stage.said}")
            hours += len(cells) * (stage.hours or 0.0)
            unknown += stage.hours is None
        made.add((row, ipc))
    besides = f", and {unknown} parts that are not forecast" if unknown else ""
    progress.say(
        f"\nin all {progress.hours_of(hours)}{besides}; teachers and generators are not counted"
    )


def _compare(
    config: Any, root: str, plan: bool, cost: str, argv: Sequence[str], target: Any = None
) -> int:
    from prism_jax import parallel, progress

    _check_cost(cost)
    parallel.find_devices(
        alone="a comparison is one process' work: run it on a machine of one host"
    )
    if not parallel.is_main():
        raise UserError("a comparison runs in one process; its cells use all of its devices")
    experiments = {cell: experiment_of(config, cell) for cell in cells(config)}
    starts = {cell: found for cell in experiments if (found := start_of(config, cell))}
    comparison = Comparison(pathlib.Path(root), experiments, starts, choices_of(config), cost)
    comparison.check_networks()
    if plan:
        todo = [cell for cell in experiments if comparison.result(cell) is None]
        for cell in experiments:
            progress.say(f"{'to do' if cell in todo else 'done':6} {cell.name}")
        if target:
            _show_forecast({cell: experiments[cell] for cell in todo}, target)
        return 0
    comparison.check()
    return until_stopped(lambda stop: comparison.run(stop, argv), root)


# --- what is compared -----------------------------------------------------------------------

WANTED = ("name", "ipcs", "seeds", "student_seeds", "rows", "protocols", "shared")


def check_config(config: Any) -> None:
    """Refuse what is no comparison's config, or has no cells.

    Raises:
      UserError: with what it lacks.
    """
    check_fields(config, "compare", WANTED, ("argument", "controls"))
    check_seeds("seeds", *config.seeds)
    if not cells(config):
        rows, protocols = (
            ", ".join(name for name in group if group[name] is not None) or "none"
            for group in (config.rows, config.protocols)
        )
        raise UserError(
            f"this comparison has no cells: rows {rows}, protocols {protocols}, ipcs "
            f"{tuple(config.ipcs)}, seeds {tuple(config.seeds)}; it needs one of each, and under "
            f"{OWN!r} a row beside the controls"
        )


def cells(config: Any) -> list[Cell]:
    """All cells, in the order in which they are worked on: early tables are comparable.

    Protocol by protocol and seed by seed, everything; the controls first. A row or protocol that is
    None is left out; those of ``one_protocol`` go through all protocols but their own.
    """
    rows = [row for row in config.rows if config.rows[row] is not None]
    shared_only = (config.controls, *(config.get("one_protocol") or ()))
    found = []
    for protocol in (name for name in config.protocols if config.protocols[name] is not None):
        for seed in config.seeds:
            for ipc in config.ipcs:
                for row in sorted(rows, key=lambda row: row != config.controls):
                    if row not in shared_only or protocol != OWN:
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
        experiment = resolve(fields, problems)
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error
    if experiment.recover.ipc != cell.ipc:
        raise UserError(
            f"{cell.name}: recover.ipc is {experiment.recover.ipc}, and its column IPC {cell.ipc}: "
            f"an override states it, or the row's config does not read its argument "
            f"(get_config(argument) with 'ipc{cell.ipc}' in it); leave it to ipcs"
        )
    return experiment


def parsed(config: Any, cell: Cell, problems: list[str]) -> Any:
    """The fields of one cell's experiment, not yet checked."""
    from prism_jax.main import parse

    if not config.rows[cell.row]:
        raise UserError(f"rows.{cell.row} is empty; a row is a method's config, and overrides")
    file, *own = config.rows[cell.row]
    if start := start_of(config, cell):
        own += ["recover.initialise=folder", f"recover.initialise_from={start.images}"]
    data = (f"dataset.{field}={value}" for field, value in (config.get("dataset") or {}).items())
    overrides = [*data, *config.shared, *own, *config.protocols[cell.protocol]]
    first = cell.seed * config.student_seeds
    students = tuple(range(first, first + config.student_seeds))
    overrides += [f"seed={cell.seed}", f"validate.seeds={students}"]
    if cell.row == config.controls:
        overrides.append(f"validate.controls={','.join(_control_sets(config)) or '()'}")
    elif cell.protocol != OWN:
        overrides.append(f"validate.controls={','.join(_more_controls(config, cell.row)) or '()'}")
    last = dict(override.partition("=")[::2] for override in overrides)  # a list would grow
    argument = ",".join(filter(None, (config.argument, f"ipc{cell.ipc}")))
    flags = [f"--config={file}:{argument}", *(f"--config.{k}={v}" for k, v in last.items())]
    try:
        return parse(flags, problems)[0]
    except UserError as error:
        raise UserError(f"{cell.name}: {error}") from error


def _more_controls(config: Any, row: str) -> tuple[str, ...]:
    """The sets that a row's protocols train on beside its images; of what it alone can make."""
    return tuple((config.get("more_controls") or {}).get(row) or ())


def _control_sets(config: Any) -> tuple[str, ...]:
    """The sets that the row of controls trains on beside its images."""
    return tuple(config.get("control_sets") or ())


class Start(NamedTuple):
    """Where a cell's images begin: with another's, or with one of its controls'."""

    cell: Cell
    control: str | None

    @property
    def images(self) -> str:
        """Their folder, in that of the comparison."""
        inside = f"controls/{self.control}" if self.control else "recover"
        return f"{CELLS}/{self.cell.name}/{inside}/images"


def start_of(config: Any, cell: Cell) -> Start | None:
    """The row that ``starts`` names for a cell's, at the same IPC, seed and protocol.

    Raises:
      UserError: there is no such row before it, or it does not make that control.
    """
    from prism_jax.config import SOFT_CONTROLS

    named = (config.get("starts") or {}).get(cell.row)
    if named is None:
        return None
    row, _, control = named.partition("/")
    rows = [found.row for found in cells(config) if found[1:] == cell[1:]]
    if row not in rows[: rows.index(cell.row)]:
        raise UserError(
            f"{cell.name} starts from {row!r}; allowed: the rows before it under this protocol "
            f"({', '.join(rows[: rows.index(cell.row)])})"
        )
    made = _control_sets(config) if row == config.controls else _more_controls(config, row)
    kept = [name for name in made if name in SOFT_CONTROLS]
    if control and (cell.protocol == OWN or control not in kept):
        raise UserError(
            f"{cell.name} starts from {named!r}; the sets of {row} that it can start from are "
            f"{', '.join(kept) or 'none'}: state it in the comparison's `more_controls`"
        )
    return Start(cell._replace(row=row), control or None)


class Comparison(Cells):
    """The cells of a comparison.

    Attributes:
      starts: the cells that begin with another's images.
      choices: what sets are measured by.
      cost: the figure's axis.
    """

    COMMAND = "prism_jax.compare"

    def __init__(
        self,
        root: pathlib.Path,
        experiments: dict[Cell, Any],
        starts: dict[Cell, Start],
        choices: Any,
        cost: str,
    ):
        self._digests: dict[Cell, str] = {}
        for cell, experiment in experiments.items():  # a start's comes before
            start = starts.get(cell)
            begun = self._digests[start.cell] if start else None
            self._digests[cell] = digest_of(experiment, begun)
        self.starts, self.choices, self.cost = starts, choices, cost
        self.root = root  # where starts are
        placed = {c: self._placed(e) if c in starts else e for c, e in experiments.items()}
        super().__init__(root, placed)
        self._peaks: dict[tuple[str, int], int | None] = {}

    def digest(self, cell: Cell) -> str:
        """Of its settings and its start's, wherever the folder is."""
        return self._digests[cell]

    def _placed(self, experiment: Any) -> Any:
        """An experiment whose start is named from where the command runs."""
        there = str(self.root / experiment.recover.initialise_from)
        recover = dataclasses.replace(experiment.recover, initialise_from=there)
        return dataclasses.replace(experiment, recover=recover)

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """Also None where its record says less than is asked now."""
        found = super().result(cell)
        return found if found and found.get("version") == RECORD_VERSION else None

    def check_networks(self) -> None:
        """Refuse a row whose teachers do not read its images.

        Raises:
          UserError: such a row.
        """
        from prism_jax import plan

        for cell, experiment in self.experiments.items():
            if self.result(cell) is None:
                try:
                    plan.check(experiment)
                except UserError as error:
                    raise UserError(f"row {cell.row}: {error}") from error

    def check(self) -> None:
        """Refuse, before any work, what some cell needs and is not there.

        Raises:
          UserError: images or weights; the rows that need them are named.
        """
        from prism_jax import plan

        rows: dict[str, list[str]] = {}
        todo = [cell for cell in self.experiments if self.result(cell) is None]
        for cell in todo:
            experiment, root = self.experiments[cell], str(self.folder(cell))
            look = plan.missing if cell is todo[0] else plan.missing_weights  # images are alike
            for line in look(experiment, root):
                rows.setdefault(line, []).append(cell.row)
        if rows:
            lines = [f"{line} (for {', '.join(dict.fromkeys(of))})" for line, of in rows.items()]
            raise UserError(
                "the comparison needs what is not there (--config.rows.ROW=None leaves a row "
                "out):\n" + "\n".join(f"  - {line}" for line in lines)
            )

    def make(
        self, cell: Cell, context: Any, made_by: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Images and students; what others have made of it is taken from them."""
        from prism_jax import pipeline
        from prism_jax.analysis.words import SYNTHETIC
        from prism_jax.config import HARD_CONTROL, STAGES
        from prism_jax.data import workdir
        from prism_jax.stages import analyse, costs, validate

        experiment = self.experiments[cell]
        self._adopt_anchors(cell, context)
        others = list(self._with_equal_images(cell))
        for other in others:
            if (self.folder(other) / "recover" / "manifest.json").exists():
                pipeline.adopt(context, self.folder(other))
                break
        # Equal images are analysed once, and every record says what was found.
        known = [found["summary"] for other in others if (found := self.result(other))]
        analysed = next((of["analyse"] for of in known if "analyse" in of), None)
        pipeline.run(context, STAGES[:-1] if analysed else STAGES)
        sets = {found.name: found for found in pipeline.sets(context)}
        if not analyse.is_summarised(context, sets):
            analyse.write_summary(context, sets, made_by())
        spent = {name: costs.of(context, found) for name, found in sets.items()}
        if (start := self.starts.get(cell)) and (begun := self.result(start.cell)):
            for name in {SYNTHETIC, HARD_CONTROL} & spent.keys():  # of the same images
                spent[name] = costs.after(spent[name], begun["costs"][start.control or SYNTHETIC])
        summary = workdir.read_json(self.folder(cell) / workdir.SUMMARY)
        return {
            "version": RECORD_VERSION,
            "peak_bytes": self._peak_bytes(cell),
            "summary": ({"analyse": analysed} if analysed else {}) | summary,
            "imported": [t for t in experiment.squeeze.teachers if experiment.network(t).weights],
            "right": {name: validate.right_answers(context, s) for name, s in sets.items()},
            "costs": spent,
        }

    def _adopt_anchors(self, cell: Cell, context: Any) -> None:
        """Latents of real images and anchors that another generating cell has already."""
        from prism_jax import pipeline
        from prism_jax.stages import anchoring

        near = sorted(self.experiments, key=lambda other: other[1:3] != cell[1:3])
        for other in near:
            if not anchoring.missing(context):
                return
            if other != cell and (self.folder(other) / "generate").exists():
                pipeline.adopt(context, self.folder(other))

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

    def write_tables(self, *, whole: bool = False) -> None:
        """The tables and the records of all cells that are finished.

        Args:
          whole: with the figure and the intervals, which take seconds.
        """
        from prism_jax.analysis import cells, comparison
        from prism_jax.data import workdir

        found = [
            cells.entry_of(cell._asdict() | result)
            for cell in self.experiments
            if (result := self.result(cell)) is not None
        ]
        if not found:
            return
        documents = comparison.documents(found, self.choices, cost=self.cost, whole=whole)
        for name, content in documents.items():
            workdir.write_bytes(self.root / name, content)
        workdir.write_record(self.root / RECORDS, cells.to_records(found, self.choices))


if __name__ == "__main__":
    sys.exit(main())
