"""Devices: the only module that knows how many there are.

A *lane* is one device working on one image batch of its own. Lanes share the teachers' weights
and the program, and nothing else: the compiled step holds no collective, so lanes may run
different numbers of iterations, draw different teachers, and start and finish independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from prism_jax.types import PyTree

AXIS = "lane"
MAPS = ("shard_map", "pmap")


class LaneMap:
    """A function of ``(shared, seed, *lane)`` mapped over devices, one ``lane`` tuple each.

    ``shared`` is replicated once. A lane's trees live on its own device between calls
    (:meth:`place`), results stay there too, and only what is wanted is fetched.
    """

    def __init__(
        self,
        function: Callable,
        shared: PyTree,
        *,
        arity: int,
        devices: Sequence[jax.Device],
        how: str = "shard_map",
        donate: Sequence[int] = (),
    ):
        """Map ``function``.

        Args:
          function: pure; returns a tree of arrays.
          shared: its first argument, the same for every lane (teachers' weights).
          arity: how many trees a lane tuple holds.
          devices: one lane each.
          how: "shard_map" or "pmap".
          donate: positions in the lane tuple whose buffers the call may reuse.
        """
        if how not in MAPS:
            raise ValueError(f"how is {how!r}; allowed: {', '.join(MAPS)}")
        self.devices = list(devices)
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self._shared = jax.device_put(shared, NamedSharding(self._mesh, P()))
        self.traces = 0  # once per shape, whatever subset, unit or count is run

        def counted(*arguments):
            self.traces += 1
            return function(*arguments)

        donated = tuple(2 + position for position in donate)
        if how == "pmap":
            axes = (None, None, *[0] * arity)
            self._mapped = jax.pmap(
                counted, AXIS, in_axes=axes, devices=self.devices, donate_argnums=donated
            )
        else:
            self._mapped = jax.jit(_shard_map(counted, self._mesh, arity), donate_argnums=donated)

    def __len__(self) -> int:
        return len(self.devices)

    def place(self, tree: PyTree, lane: int) -> PyTree:
        """A tree's leaves on one lane's device, with the lane axis in front.

        The leaves are copied, so that donating them cannot take the caller's arrays.
        """
        sharding = SingleDeviceSharding(self.devices[lane])
        return jax.tree.map(lambda x: jax.device_put(np.array(x)[None], sharding), tree)

    @staticmethod
    def fetch(lane_tree: PyTree) -> PyTree:
        """A lane's tree as NumPy arrays, without the lane axis."""
        return jax.tree.map(lambda x: np.array(x)[0], jax.device_get(lane_tree))

    def __call__(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> list[PyTree]:
        """Run every lane once.

        Args:
          seed: shared by all lanes.
          lanes: one tuple of placed trees per device, of equal shapes.

        Returns:
          Per lane, its placed result.
        """
        return self._split(self._mapped(*self._arguments(seed, lanes)))

    def compile(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> Any:
        """The compiled program for such arguments, to be inspected (HLO, memory)."""
        return self._mapped.lower(*self._arguments(seed, lanes)).compile()

    def _arguments(self, seed, lanes):
        assert len(lanes) == len(self), "one lane tuple per device"
        joined = (self._join(trees) for trees in zip(*lanes, strict=True))
        return self._shared, np.uint32(seed), *joined

    def _join(self, lanes: Sequence[PyTree]) -> PyTree:
        sharding = NamedSharding(self._mesh, P(AXIS))

        def join(*shards):
            shape = (len(self.devices), *shards[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))

        return jax.tree.map(join, *lanes)

    def _split(self, tree: PyTree) -> list[PyTree]:
        leaves, structure = jax.tree.flatten(tree)
        by_device = [{s.device: s.data for s in leaf.addressable_shards} for leaf in leaves]
        return [
            jax.tree.unflatten(structure, [shards[device] for shards in by_device])
            for device in self.devices
        ]


def _shard_map(function: Callable, mesh: Mesh, arity: int) -> Callable:
    def on_lane(shared, seed, *lane):
        inner = jax.tree.map(lambda x: x[0], lane)
        return jax.tree.map(lambda x: x[None], function(shared, seed, *inner))

    return jax.shard_map(
        on_lane,
        mesh=mesh,
        in_specs=(P(), P(), *[P(AXIS)] * arity),
        out_specs=P(AXIS),
        check_vma=False,
    )


def lane_devices(limit: int) -> list[jax.Device]:
    """The local devices to use for ``limit`` independent batches."""
    return jax.local_devices()[: max(1, limit)]


def process_share(items: Sequence[Any]) -> list[Any]:
    """The items that this process works on: every process takes every n-th."""
    return list(items)[jax.process_index() :: jax.process_count()]
