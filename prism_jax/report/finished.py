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
from prism_jax.config import Experiment, restore
from prism_jax.config.sections import Path
from prism_jax.data import image_set, label_store, workdir
from prism_jax.data.checkpoints import read_newest
from prism_jax.data.lazy import Images
from prism_jax.data.metrics import read_lines
from prism_jax.data.weights import RECORD, variables_of
from prism_jax.errors import UserError
from prism_jax.models.import_torch import variable_shapes
from prism_jax.stages import analyse, controls, fingerprints
from prism_jax.stages.context import Context
from prism_jax.stages.makers.optimise import kept_folder
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

    def student(self, of: str, student: str, seed: int) -> PyTree | None:
        """A trained student's variables; None where its checkpoint is not there any more.

        Args:
          of: the set that it learned from.

        Raises:
          UserError: the checkpoint is damaged, or another network's.
        """
        base = self.root if of == SYNTHETIC else self.root / "controls" / of
        folder = base / "validate" / student / str(seed) / "checkpoints"
        found = read_newest(folder) if folder.exists() else None
        if found is None:
            return None
        _, leaves, meta = found
        module = self.context.networks.build(student, student=True)
        like = variable_shapes(module, self.context.inputs.image_shape)
        averaged = self.config.validate.ema is not None
        variables = variables_of(leaves, meta.get("averaged", averaged), {"batch_stats": {}} | like)
        if variables is None:
            raise UserError(f"the checkpoint in {folder} is of another network than {student}")
        return variables

    @property
    def label_bytes(self) -> int:
        """Of the stored soft labels; 0 where they are made while students train, or hard."""
        there = (self.root / "relabel" / label_store.MANIFEST).exists()
        return label_store.size_bytes(self.root / "relabel") if there else 0


def open_runs(roots: Sequence[str], *, data: str | None = None) -> list[Run]:
    """Open finished runs, all of one data set.

    Args:
      roots: their working directories.
      data: where the real images are, in place of what the runs say.

    Raises:
      UserError: what is no finished run, or runs of different data.
    """
    if len({os.path.realpath(root) for root in roots}) < len(roots):
        raise UserError(f"a working directory is named twice: {', '.join(roots)}")
    names = _names(roots)
    runs = [_open(root, name, data) for root, name in zip(roots, names, strict=True)]
    first = runs[0].config.dataset
    for run in runs[1:]:
        for field in ("name", "num_classes", "image_size"):
            ours, theirs = getattr(first, field), getattr(run.config.dataset, field)
            if ours != theirs:
                raise UserError(
                    f"{runs[0].root} has dataset.{field}={ours!r} and {run.root} {theirs!r}; only "
                    f"runs of the same data stand side by side: make a page for each"
                )
    return runs


def _open(root: str, name: str, data: str | None) -> Run:
    folder = epath.Path(root)
    if not (folder / "config.json").exists():
        raise UserError(f"{root} is no working directory of a run (no config.json)")
    ran = workdir.read_json(folder / "config.json")
    for file in ("recover/manifest.json", "summary.json"):
        if not (folder / file).exists():
            raise UserError(
                f"{root} is not finished: it has no {file}. Run its command again, which continues "
                f"it: {ran['provenance'].get('command', '(not recorded)')}"
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
        workdir.read_json(folder / "summary.json"),
        workdir.read_record(folder / "recover" / "manifest.json"),
    )


def _names(roots: Sequence[str]) -> list[str]:
    """The last parts of paths that tell them apart."""
    parts = [os.path.normpath(root).split(os.sep) for root in roots]
    depth = 1
    while len({tuple(p[-depth:]) for p in parts}) < len(roots) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]
