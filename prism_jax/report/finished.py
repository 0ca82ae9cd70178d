"""A finished working directory, opened for looking: nothing in it is written or set aside."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from prism_jax.analysis.words import SYNTHETIC
from prism_jax.config import STAGES, Experiment, restore
from prism_jax.config.sections import Path
from prism_jax.data import image_set, label_store, workdir
from prism_jax.data.lazy import Images
from prism_jax.data.metrics import read_lines
from prism_jax.data.weights import RECORD
from prism_jax.errors import UserError
from prism_jax.stages import analyse, controls, fingerprints, validate
from prism_jax.stages.context import Context
from prism_jax.stages.makers.optimise import kept_folder
from prism_jax.tools.export import command
from prism_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: what the page calls it.
      context: its experiment and directory.
      summary: its summary.json.
      manifest: its recover/manifest.json.
    """

    name: str
    context: Context
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]

    @property
    def root(self) -> epath.Path:
        return self.context.root

    @property
    def config(self) -> Experiment:
        return self.context.config

    @property
    def labels_N(self) -> np.ndarray:
        """Classes of the synthetic images, class-major."""
        return np.repeat(
            np.arange(self.manifest["num_classes"], dtype=np.int32), self.manifest["ipc"]
        )

    @functools.cached_property
    def images(self) -> Images:
        """The synthetic images, class-major.

        Raises:
          UserError: they are damaged, or not those that recover wrote.
        """
        classes, ipc = self.manifest["num_classes"], self.manifest["ipc"]
        found = self.context.inputs.hold(
            image_set.lazy_images(self.root / "recover" / "images", classes, ipc)
        )
        if image_set.digest(found) != self.manifest["digest"]:
            raise UserError(
                f"the images in {self.root / 'recover' / 'images'} are not those that recover "
                f"wrote; run the command of this run again, which repairs them"
            )
        return found

    @functools.cached_property
    def initial(self) -> Images:
        """Where the synthetic images began."""
        return analyse.initial_images(self.context)

    @functools.cached_property
    def start(self) -> str:
        """A digest of the first initial image of every class: equal where runs begin alike.

        Raises:
          UserError: what they are made of is not there any more.
        """
        first = np.arange(self.manifest["num_classes"]) * self.manifest["ipc"]
        return image_set.digest(self.initial[first])

    @functools.cached_property
    def random_real(self) -> Images:
        """As many random real images."""
        return controls.labelled_set(self.context, "random_real").images_uint8_NHWC

    def kept(self) -> dict[int, epath.Path]:
        """Where images were kept, by the iteration."""
        there = workdir.names(kept_folder(self.root / "recover", 0).parent)
        iterations = sorted(int(name) for name in there if name.isdecimal())
        return {i: kept_folder(self.root / "recover", i) for i in iterations}

    def losses(self) -> list[dict[str, Any]]:
        """What recover logged."""
        return read_lines(self.root / "recover" / "metrics.jsonl")

    def sets(self) -> dict[str, Mapping[str, Any]]:
        """Students' entries of the summary by the set that they learned from."""
        found = {SYNTHETIC: self.summary.get("validate", {}), **self.summary.get("controls", {})}
        return {name: students for name, students in found.items() if students}

    def record(self, teacher: str) -> dict[str, Any]:
        """What squeeze says of a teacher."""
        return workdir.read_record(self.context.networks.folder(teacher) / RECORD)

    def teachers(self) -> list[str]:
        """Networks that were squeezed and are here."""
        folder = self.context.networks.folder
        return [n for n in self.config.squeeze.teachers if (folder(n) / RECORD).exists()]

    def stored_data(self) -> dict[str, dict[str, Any]]:
        """What the real images were: those of recover's start, and the test images, where known."""
        found, trained = {}, self.root / "validate"
        for student in self.config.validate.students:
            for seed in self.summary["seeds"]:
                if said := workdir.read_fingerprint(trained / student / str(seed)):
                    found["test"] = said["test"]
        if said := workdir.read_fingerprint(self.root / "recover"):
            found["start"] = said["data"]
        return found

    def check_data(self) -> None:
        """Refuse other real images than the run's: what positions name would be others.

        Raises:
          UserError: they are others. Where there are none, who wants them says so.
        """
        inputs = self.context.inputs
        for name, said in self.stored_data().items():
            try:
                there = inputs.fields(inputs.start if name == "start" else inputs.open(name))
            except UserError:
                continue
            # Versions add keys.
            if any(there[key] != value for key, value in said.items() if key in there):
                what = "test images" if name == "test" else "images that recover began with"
                raise UserError(
                    f"the {what} of {self.root} were others than those that are there now "
                    f"({self.config.dataset.path or self.config.dataset.source}); name the run's "
                    f"with --data"
                )

    def student(self, of: str, student: str, seed: int) -> PyTree | None:
        """A trained student's variables; None where it, or its checkpoint, is not there.

        Args:
          of: the set that it learned from.

        Raises:
          UserError: the checkpoint is damaged, of before the end, or another network's.
        """
        base = self.root if of == SYNTHETIC else self.root / "controls" / of
        trained = base / "validate" / student / str(seed)
        # Without its record a student is not trained to the end.
        return (
            validate.read(self.context, trained, student) if (trained / RECORD).exists() else None
        )

    @property
    def label_bytes(self) -> int | None:
        """Of the stored soft labels; 0 where they are made while students train, or hard.

        None where they are elsewhere.
        """
        settings = self.config.relabel
        if not self.config.soft_labels or settings.mode == "online":
            return 0
        there = (self.root / "relabel" / label_store.MANIFEST).exists()
        if settings.labels_from or not there:
            return None
        return label_store.size_bytes(self.root / "relabel")


def open_runs(roots: Sequence[str], *, data: str | None = None) -> list[Run]:
    """Open finished runs, all of one data set.

    Args:
      roots: their working directories.
      data: where the real images are, in place of what the runs say.

    Raises:
      UserError: what is no finished run, runs of different data, or data that are not a run's.
    """
    if len({os.path.realpath(root) for root in roots}) < len(roots):
        raise UserError(f"a working directory is named twice: {', '.join(roots)}")
    names = _names(roots)
    runs = [_open(root, name, data) for root, name in zip(roots, names, strict=True)]
    first = runs[0].config.dataset
    for run in runs[1:]:
        for field in ("name", "num_classes", "image_size", "held_out"):
            ours, theirs = getattr(first, field), getattr(run.config.dataset, field)
            if ours != theirs:
                raise UserError(
                    f"{runs[0].root} has dataset.{field}={ours!r} and {run.root} {theirs!r}; only "
                    f"runs of the same data stand side by side: make a page for each"
                )
        if (tests := _tests(runs[0])) and (others := _tests(run)) and tests != others:
            raise UserError(
                f"{runs[0].root} and {run.root} were tested on different images; only runs of the "
                f"same data stand side by side: make a page for each"
            )
    for run in runs:
        run.check_data()
    return runs


def _tests(run: Run) -> Any:
    """What tells the test images of one run from those of another, whatever the version."""
    said = run.stored_data().get("test", {})
    return {key: said.get(key) for key in ("count", "digest")} if said else None


def _open(root: str, name: str, data: str | None) -> Run:
    folder = epath.Path(root)
    ran = workdir.read_run(folder)
    for file in ("recover/manifest.json", workdir.SUMMARY):
        if not (folder / file).exists():
            raise UserError(
                f"{root} is not finished: it has no {file}. Finish it with\n"
                f"    {command(folder, ran, ','.join(STAGES))}"
            )
    try:
        experiment = restore(ran["experiment"], fingerprints.LATER)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    if data is not None:
        dataset = dataclasses.replace(experiment.dataset, path=Path(data))
        experiment = dataclasses.replace(experiment, dataset=dataset)
    return Run(
        name,
        Context(experiment, folder),
        workdir.read_json(folder / workdir.SUMMARY),
        workdir.read_record(folder / "recover" / "manifest.json"),
    )


def _names(roots: Sequence[str]) -> list[str]:
    """The last parts of paths that tell them apart."""
    parts = [os.path.normpath(root).split(os.sep) for root in roots]
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(roots) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
