"""Orbax behind three verbs: the state of one piece of work, saved whole and restored exactly."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from prism_jax import progress
from prism_jax.data import workdir
from prism_jax.types import PyTree


class Checkpoints:
    """Checkpoints of one piece of work (a unit of recover, a student), newest first.

    Saving is asynchronous: the state is copied before :meth:`save` returns. An unfinished save
    leaves no checkpoint. A damaged one is named, set aside, and passed over for the one before:
    each carries a digest of its content, for Orbax notices only some of the bits that may flip.
    """

    def __init__(self, folder: epath.PathLike, *, every_seconds: float = 0.0):
        self._folder = epath.Path(folder).absolute()
        self._every = every_seconds
        self._last = time.monotonic()
        self._manager: ocp.CheckpointManager | None = None

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
            self._manager = ocp.CheckpointManager(self._folder, options=options)
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
        manager = self._open()
        if step not in manager.all_steps():
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
            content = {"meta": meta or {}, "digest": _digest(leaves, meta or {})}
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave({_name(i): x for i, x in enumerate(leaves)}),
                meta=ocp.args.JsonSave(content),
            )
            manager.save(step, args=arguments)
        self._last = time.monotonic()

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest whole checkpoint with the shapes and dtypes of ``like``, or None.

        Returns:
          (step, state, meta) as they were saved.
        """
        if not self._folder.exists():
            return None
        manager = self._open()
        wanted, structure = jax.tree.flatten(like)
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                leaves, meta = self._read(step, wanted)
            except Exception:  # Orbax raises many kinds; each means: not this one.
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
        abstract = {_name(i): np.zeros(np.shape(x), x.dtype) for i, x in enumerate(wanted)}
        restored = self._open().restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            ),
        )
        leaves = [np.asarray(restored["state"][name]) for name in abstract]
        meta = restored["meta"]["meta"]
        if restored["meta"]["digest"] != _digest(leaves, meta):
            raise ValueError("its content is not what was saved")
        if [leaf.shape for leaf in leaves] != [like.shape for like in abstract.values()]:
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


def _name(leaf: int) -> str:
    return f"leaf_{leaf:05d}"


def _digest(leaves: Sequence[np.ndarray], meta: dict[str, Any]) -> str:
    """SHA-256 of arrays, with their shapes and dtypes, and of the values beside them."""
    sha = hashlib.sha256(workdir.digest(meta).encode())
    for leaf in leaves:
        sha.update(f"{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()
