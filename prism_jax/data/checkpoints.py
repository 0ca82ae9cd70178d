"""Orbax behind three verbs: the state of one piece of work, saved whole and restored exactly."""

from __future__ import annotations

import hashlib
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
    each carries a digest of its content.
    """

    def __init__(self, folder: epath.PathLike, *, every_seconds: float = 0.0):
        self._folder = epath.Path(folder).absolute()
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
            content = {"meta": meta or {}, "digest": _digest(leaves, meta or {})}
            manager.save(step, args=orbax_files.Save(leaves, content))
        self._last = time.monotonic()

    def restore(
        self, like: PyTree | Callable[[int], PyTree]
    ) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest whole checkpoint with the shapes and dtypes of ``like``, or None.

        Args:
          like: a state, or a function from a step to one where shapes change with the steps.

        Returns:
          (step, state, meta) as they were saved.
        """
        if not self._folder.exists():
            return None
        manager = self._open()
        for step in sorted(manager.all_steps(), reverse=True):
            wanted, structure = jax.tree.flatten(like(step) if callable(like) else like)
            try:
                leaves, meta = self._read(step, wanted)
            except Exception:  # Orbax and msgpack raise many kinds; each means: not this one.
                aside = workdir.set_aside(self._folder / str(step))
                manager.reload()
                progress.say(
                    f"warning: the checkpoint {self._folder / str(step)} is damaged; it is set "
                    f"aside as {aside.name}, and the work since the one before it is redone."
                )
                continue
            return step, jax.tree.unflatten(structure, leaves), meta
        return None

    def _read(self, step: int, wanted: Sequence[Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
        """One checkpoint's leaves and meta; raises where they are not what was saved."""
        from prism_jax.data import orbax_files

        leaves, meta = _checked(self._open().restore(step, args=orbax_files.Restore()))
        if [(x.shape, x.dtype) for x in leaves] != [(np.shape(x), x.dtype) for x in wanted]:
            raise ValueError("it has other shapes")
        return leaves, meta

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
    folder: epath.PathLike,
) -> tuple[int, list[np.ndarray], dict[str, Any]] | None:
    """The newest whole checkpoint, whatever its leaves are; changes nothing.

    Args:
      folder: of checkpoints, or of one of them.

    Returns:
      (step, leaves, meta); None where it holds no checkpoint of ours.

    Raises:
      UserError: it holds some, and all are damaged.
    """
    from prism_jax.data import orbax_files

    folder, damaged = epath.Path(folder), []
    steps = [f for f in (folder, *folder.iterdir()) if f.name.isdigit()]
    for step in sorted(steps, key=lambda f: int(f.name), reverse=True):
        if (step / "default" / orbax_files.FILE).is_file():
            try:
                return int(step.name), *_checked(orbax_files.read(step / "default"))
            except Exception:  # msgpack raises many kinds; each means: not this one.
                damaged.append(str(step))
    if damaged:
        raise UserError(f"no checkpoint in {folder} is whole; damaged: {', '.join(damaged)}")
    return None


def _checked(content: dict[str, Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    """A file's leaves and meta; raises where they are not what was saved."""
    leaves = [content["leaves"][name] for name in sorted(content["leaves"])]
    stated = json.loads(content["meta"])
    if stated["digest"] != _digest(leaves, stated["meta"]):
        raise ValueError("its content is not what was saved")
    return leaves, stated["meta"]


def _digest(leaves: Sequence[np.ndarray], meta: dict[str, Any]) -> str:
    """SHA-256 of arrays, with their shapes and dtypes, and of the values beside them."""
    sha = hashlib.sha256(workdir.digest(meta).encode())
    for leaf in leaves:
        sha.update(f"{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()
