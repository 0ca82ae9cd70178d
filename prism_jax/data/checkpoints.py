"""Orbax behind three verbs: the state of one piece of work, saved whole and restored exactly."""

from __future__ import annotations

import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from prism_jax.types import PyTree


class Checkpoints:
    """Checkpoints of one piece of work (a unit of recover, a student), newest first.

    Saving is asynchronous: the state is copied before :meth:`save` returns. An unfinished save
    leaves no checkpoint. One that cannot be read is passed over for the one before it.
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
        """Save a state under a step; a step that is saved already is left as it is."""
        manager = self._open()
        if step not in manager.all_steps():
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
            arguments = ocp.args.Composite(
                state=ocp.args.StandardSave({f"leaf_{i:05d}": x for i, x in enumerate(leaves)}),
                meta=ocp.args.JsonSave(meta or {}),
            )
            manager.save(step, args=arguments)
        self._last = time.monotonic()

    def restore(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest readable checkpoint with the shapes and dtypes of ``like``, or None."""
        if not self._folder.exists():
            return None
        manager = self._open()
        leaves, structure = jax.tree.flatten(like)
        abstract = {f"leaf_{i:05d}": np.zeros(np.shape(x), x.dtype) for i, x in enumerate(leaves)}
        for step in sorted(manager.all_steps(), reverse=True):
            try:
                restored = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
                    ),
                )
            except Exception:  # Orbax raises many kinds; each means: not this one.
                continue
            arrays = [np.asarray(restored["state"][name]) for name in abstract]
            pairs = zip(arrays, leaves, strict=True)
            if all(a.shape == np.shape(x) and a.dtype == x.dtype for a, x in pairs):
                return step, jax.tree.unflatten(structure, arrays), restored["meta"] or {}
        return None

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
