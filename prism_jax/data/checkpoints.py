"""Orbax behind three verbs: the state of one piece of work, saved whole and restored exactly."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from prism_jax import progress
from prism_jax.data import workdir
from prism_jax.types import PyTree

_FILE = "state.msgpack"


class _Handler(ocp.AsyncCheckpointHandler):
    """Writes NumPy arrays and JSON values as one file, from whichever process holds them.

    Orbax's own handlers write NumPy arrays on process 0 alone, and leave out the others' without
    a word (measured, 0.12). Ours belong to the one process that works on them.
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, "checkpoint")

    async def async_save(self, directory: epath.Path, args: _Save) -> list[Future]:
        return [self._writer.submit(self.save, directory, args)]

    def save(self, directory: epath.Path, args: _Save) -> None:
        data = {"leaves": dict(enumerate_names(args.leaves)), "meta": workdir.to_json(args.meta)}
        (directory / _FILE).write_bytes(serialization.msgpack_serialize(data))

    def restore(self, directory: epath.Path, args: Any = None) -> dict[str, Any]:
        return serialization.msgpack_restore((directory / _FILE).read_bytes())

    def close(self) -> None:
        self._writer.shutdown()


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclasses.dataclass
class _Save(ocp.args.CheckpointArgs):
    leaves: Sequence[np.ndarray]
    meta: dict[str, Any]


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclasses.dataclass
class _Restore(ocp.args.CheckpointArgs):
    pass


def enumerate_names(leaves: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Leaves by their position."""
    return [(f"leaf_{i:05d}", leaf) for i, leaf in enumerate(leaves)]


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
            self._folder.mkdir(parents=True, exist_ok=True)
            alone = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index(),
                active_processes={jax.process_index()},
                barrier_sync_key_prefix=workdir.digest(str(self._folder)),
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=2,
                create=False,
                multiprocessing_options=alone,
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, item_handlers=_Handler()
            )
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
            leaves = [np.array(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
            content = {"meta": meta or {}, "digest": _digest(leaves, meta or {})}
            manager.save(step, args=_Save(leaves, content))
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
        restored = self._open().restore(step, args=_Restore())
        leaves = [restored["leaves"][name] for name, _ in enumerate_names(wanted)]
        content = json.loads(restored["meta"])
        if content["digest"] != _digest(leaves, content["meta"]):
            raise ValueError("its content is not what was saved")
        forms = [(np.shape(x), x.dtype) for x in wanted]
        if [(x.shape, x.dtype) for x in leaves] != forms or len(leaves) != len(restored["leaves"]):
            raise ValueError("it has other shapes")
        return leaves, content["meta"]

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


def _digest(leaves: Sequence[np.ndarray], meta: dict[str, Any]) -> str:
    """SHA-256 of arrays, with their shapes and dtypes, and of the values beside them."""
    sha = hashlib.sha256(workdir.digest(meta).encode())
    for leaf in leaves:
        sha.update(f"{leaf.dtype}{leaf.shape}".encode())
        sha.update(leaf.tobytes())
    return sha.hexdigest()
