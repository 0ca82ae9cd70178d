"""The networks of a run: built by name, and squeezed teachers read from their folders."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from etils import epath

from prism_jax.config import Dtype, Experiment
from prism_jax.data import workdir
from prism_jax.data.weights import RECORD, WEIGHTS, sha256, unpack_variables
from prism_jax.errors import UserError
from prism_jax.models import build
from prism_jax.stages.inputs import Inputs, own_normalisation
from prism_jax.teachers import TeacherPool, describe
from prism_jax.types import Normalisation, PyTree


class Networks:
    """The networks that an experiment names."""

    def __init__(self, config: Experiment, root: epath.Path, inputs: Inputs):
        """Read nothing yet.

        Args:
          root: the working directory, in which teachers have their folders.
          inputs: the data whose classes they tell apart.
        """
        self._config, self._root, self._inputs = config, root, inputs

    def build(self, name: str, *, student: bool = False, dtype: Dtype = "float32") -> nn.Module:
        """A named network's module: a student's head is the dataset's, a teacher's its weights'."""
        network = self._config.network(name)
        head = None if student else network.head_classes
        return build(
            network.architecture,
            head or self._config.dataset.num_classes,
            width=network.width,
            depth=network.depth,
            stem=network.stem,
            dtype=jnp.dtype(dtype),
        )

    def normalisation(self, name: str) -> Normalisation:
        """How images are read for a teacher: as is stated for its weights, or the data set's way.

        Raises:
          UserError: what is stated is for images of another number of channels.
        """
        own = own_normalisation(self._config.network(name))
        if own and len(own.mean) != self._inputs.info.channels:
            raise UserError(
                f"networks.{name}.mean has {len(own.mean)} numbers; {self._inputs.info.name} has "
                f"{self._inputs.info.channels} channels; state one number per channel there and in "
                f"networks.{name}.std, or leave both unset"
            )
        return own or self._inputs.normalisation

    def check(self) -> None:
        """Refuse, before any of them is trained, teachers that cannot read the images.

        Raises:
          UserError: as ``normalisation``.
        """
        for name in self._config.squeeze.teachers:
            self.normalisation(name)

    def class_indices(self, name: str) -> tuple[int, ...] | None:
        """The outputs of a network's head that are the classes of the data; None: all of them.

        Unless the config states them, a head of ImageNet's 1,000 classes (or 1,001, with the
        background first) is cut to the classes that the data has of them.

        Raises:
          UserError: the head has other classes, and which of them are meant is not known.
        """
        network, classes = self._config.network(name), self._config.dataset.num_classes
        head = network.head_classes or classes
        if network.class_indices is not None or head == classes:
            return network.class_indices
        known = self._inputs.open("train").imagenet_indices
        if head in (1000, 1001) and known is not None:
            return tuple(index + head - 1000 for index in known)
        raise UserError(
            f"{name} has a head of {head} classes and the data {classes}, and which of them they "
            f"are is not known (class folders named by WordNet IDs would tell it); state "
            f"networks.{name}.class_indices"
        )

    def folder(self, name: str) -> epath.Path:
        return self._root / "squeeze" / name

    def load(self, name: str) -> PyTree:
        """A squeezed teacher's variables.

        Raises:
          UserError: it is not there, or its file is not the one that was written.
        """
        folder = self.folder(name)
        if not (folder / RECORD).exists():
            raise UserError(
                f"teacher {name} is not in {folder}; run the squeeze stage first "
                f"(--stages=squeeze,...), or adopt it with --from=<workdir that has it>"
            )
        data = (folder / WEIGHTS).read_bytes() if (folder / WEIGHTS).exists() else b""
        if sha256(data) != workdir.read_record(folder / RECORD)["sha256"]:
            raise UserError(
                f"{folder / WEIGHTS} is damaged: its content is not what squeeze wrote. Delete "
                f"{folder} and run the same command again; only this teacher is redone."
            )
        return unpack_variables(data)

    def digests(self, names: Sequence[str]) -> dict[str, str]:
        """SHA-256 of squeezed teachers' weights, by name."""
        return {name: workdir.read_record(self.folder(name) / RECORD)["sha256"] for name in names}

    def pool(self, names: Sequence[str], dtype: Dtype = "float32") -> TeacherPool:
        """These squeezed teachers, ready to read images of the dataset."""
        teachers, variables = [], []
        for name in names:
            network = self._config.network(name)
            teachers.append(
                describe(
                    name,
                    self.build(name, dtype=dtype),
                    self._inputs.image_shape,
                    normalisation=self.normalisation(name) if network.mean else None,
                    class_indices=self.class_indices(name),
                )
            )
            variables.append(self.load(name))
        return TeacherPool(tuple(teachers), tuple(variables), self._inputs.normalisation)
