"""Orbax behind three verbs: the state of one piece of work, saved whole and restored exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.types import PyTree

if TYPE_CHECKING:  # Orbax takes half a second to import: not before there is something to save
    import orbax.checkpoint as ocp


class Checkpoints:
    """Checkpoints of one piece of work (a unit of recover, a student), newest first.

    A piece of work belongs to one process, which saves and restores without any other: processes
    with more, less or no work never wait for one another here.

    Saving is asynchronous: the state is copied before :meth:`save` returns. An unfinished save
    leaves no checkpoint. A damaged one is named, set aside, and passed over for the one before:
    each carries a digest of its content. A whole one of other work is refused. One that could not
    be read is not damaged: that error is raised, and nothing is touched.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        every_seconds: float = 0.0,
        of: dict[str, Any] | None = None,
    ):
        """Open nothing yet.

        Args:
          folder: of this piece of work alone.
          every_seconds: the interval after which a save is ``due``.
          of: what decides the work, in JSON values; it is saved, and compared before a restore.
        """
        self._folder = workdir.absolute(folder)
        self._of = of
        self._every = every_seconds
        self._last = time.monotonic()
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            from prism_jax.data import orbax_files

            self._folder.mkdir(parents=True, exist_ok=True)
            self._manager = orbax_files.manager(self._folder)
        return self._manager

    @property
    def due(self) -> bool:
        """Whether the interval has passed since the last save, or since the beginning."""
        return time.monotonic() - self._last >= self._every

    def save(self, step: int, state: PyTree, meta: dict[str, Any] | None = None) -> None:
        """Save a state under a step; a step that is saved already is left as it is.

        Args:
          step: larger than those saved before.
          state: arrays and scalars.
          meta: JSON values that belong to it.
        """
        from prism_jax.data import orbax_files

        manager = self._open()
        if step not in manager.all_steps():
            leaves = [np.array(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
            saved = orbax_files.Save(leaves, {"of": self._of, **(meta or {})})
            manager.save(step, args=saved)
        self._last = time.monotonic()

    def restore(
        self, like: PyTree | Callable[[int], PyTree]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest whole checkpoint, or None; its leaves have the shapes and dtypes of ``like``.

        Args:
          like: a state, or a function from a step to one where shapes change with the steps.

        Returns:
          (step, state, meta) as they were saved.

        Raises:
          UserError: it is whole, but of other work; the differences are named.
          OSError, MemoryError: it could not be read now.
        """
        if not self._folder.exists():
            return None
        manager = self._open()
        for step in sorted(manager.all_steps(), reverse=True):
            wanted, structure = jax.tree_util.tree_flatten_with_path(
                like(step) if callable(like) else like
            )
            try:
                leaves, meta = _read(self._folder / str(step))
            except Damaged:
                aside = workdir.set_aside(self._folder / str(step))
                manager.reload()
                progress.say(
                    f"warning: the checkpoint {self._folder / str(step)} is damaged; it is set "
                    f"aside as {aside.name}, and the work since the one before it is redone."
                )
                continue
            if lines := self._differences(leaves, meta.pop("of", None), wanted):
                changed = "\n".join(f"  - {line}" for line in lines)
                raise UserError(
                    f"the checkpoint {self._folder / str(step)} belongs to other work, or to "
                    f"another version of this program:\n{changed}\n"
                    f"Nothing was changed. Either continue with what it was begun with, or move "
                    f"{self._folder} away: this piece of work is then done from its beginning."
                )
            return step, jax.tree.unflatten(structure, leaves), meta
        return None

    def _differences(
        self, leaves: Sequence[np.ndarray], of: dict[str, Any] | None, wanted: Sequence[Any]
    ) -> list[str]:
        """What a checkpoint has, and what is wanted, as "name: found -> wanted" lines."""
        if of is not None and self._of is not None:
            if lines := workdir.differences(of, self._of):
                return lines
        if len(leaves) != len(wanted):
            return [f"arrays: {len(leaves)} -> {len(wanted)}"]
        pairs = [(jax.tree_util.keystr(p), x, y) for (p, y), x in zip(wanted, leaves, strict=True)]
        return [
            f"{name}: {x.dtype}{x.shape} -> {y.dtype}{np.shape(y)}"
            for name, x, y in pairs
            if (x.shape, x.dtype) != (np.shape(y), y.dtype)
        ]

    def close(self) -> None:
        """Wait for a save in flight."""
        if self._manager is not None:
            self._manager.wait_until_finished()
            self._manager.close()
            self._manager = None

    def delete(self) -> None:
        """Remove every checkpoint: the work is done and its result is written."""
        self.close()
        if self._folder.exists():
            self._folder.rmtree()


def read_newest(
    folder: epath.PathLike, *, step: int | None = None
) -> tuple[int, list[np.ndarray], dict[str, Any]] | None:
    """The newest checkpoint, whatever its leaves are; changes nothing.

    Args:
      folder: of checkpoints, or of one of them.
      step: that the newest must be of, where it is known.

    Returns:
      (step, leaves, meta); None where it holds no checkpoint of ours.

    Raises:
      UserError: the newest is damaged, or of another step: one before it is of other weights.
      OSError, MemoryError: the newest could not be read now.
    """
    from prism_jax.data import orbax_files

    def is_ours(path: epath.Path) -> bool:
        return path.name.isdigit() and (path / "default" / orbax_files.FILE).is_file()

    folder = epath.Path(folder)
    steps = [folder] if is_ours(folder) else [f for f in folder.iterdir() if f.name.isdigit()]
    if not any(map(is_ours, steps)):
        return None
    newest = max(steps, key=lambda f: int(f.name))
    try:
        leaves, meta = _read(newest)
    except Damaged:
        raise UserError(
            f"the checkpoint {newest} is damaged, and is the last of {folder}"
        ) from None
    if step is not None and int(newest.name) != step:
        raise UserError(
            f"{folder} has no whole checkpoint of step {step}; its last is {newest.name}"
        )
    return int(newest.name), leaves, meta


class Damaged(Exception):
    """A checkpoint is not what was saved."""


def _read(step: epath.Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A checkpoint's leaves and meta.

    Raises:
      Damaged: its file is not there, or not what was saved.
      OSError, MemoryError: it could not be read, or not be held; that says nothing about it.
    """
    from prism_jax.data import orbax_files

    try:
        data = orbax_files.read(step / "default")
    except FileNotFoundError as error:
        raise Damaged from error
    try:
        return _checked(orbax_files.parsed(data))
    except MemoryError:
        raise
    except Exception as error:  # msgpack raises many kinds; each means: not this one.
        raise Damaged from error


def _checked(content: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A file's leaves and meta; raises where they are not what was saved."""
    from prism_jax.data import orbax_files

    leaves = [content["leaves"][name] for name in sorted(content["leaves"])]
    stated = json.loads(content["meta"])
    if stated["digest"] != orbax_files.digest(leaves, stated["meta"]):
        raise ValueError("its content is not what was saved")
    return leaves, stated["meta"]
