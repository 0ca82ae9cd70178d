"""Devices and processes: the only module that knows how many there are.

Recover and relabel give every device work of its own (:class:`LaneMap`), or recover a batch to
several (:class:`SpanMap`); a training spreads each batch over several (:class:`DataMesh`).

A *lane* is one device, or one thread of a CPU (:class:`CoreMap`), working on one image batch of its
own. Lanes share the teachers' weights and the program, and nothing else: the compiled step holds no
collective, so lanes may run different numbers of iterations, draw different teachers, and start and
finish independently.

Devices may be *described* instead of here (:func:`described`): programs are then built and
compiled for them as for others, on shapes alone, and cannot be run.

Processes share work, not arrays: each takes its part of a list on which all agree, writes its
results to the common working directory, and waits for the others' to appear there. There are no
collectives: where a stage begins, the main process tells the others what is missing.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import gc
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from prism_jax import environment
from prism_jax.errors import Unreachable, UserError
from prism_jax.types import PyTree

T = TypeVar("T")

AXIS = "lane"
ROWS = "rows"
MAPS = ("shard_map", "pmap")
CORE_LANES = 2  # batches at a time on a CPU; a third brings a few per cent, for its memory

_DESCRIBED: contextvars.ContextVar[tuple[jax.Device, ...]] = contextvars.ContextVar(
    "described", default=()
)


@contextlib.contextmanager
def described(devices: Sequence[jax.Device]) -> Iterator[None]:
    """Build programs for devices of a ``jax.experimental.topologies`` description.

    Inside, they are all the devices there are; what is placed on them keeps its shape, its type
    and its place, and may itself be a ``jax.ShapeDtypeStruct``.
    """
    token = _DESCRIBED.set(tuple(devices))
    try:
        yield
    finally:
        _DESCRIBED.reset(token)


def devices() -> list[jax.Device]:
    """The devices of this process, or those described in their place."""
    return list(_DESCRIBED.get()) or jax.local_devices()


def put(tree: PyTree, where: Sharding) -> PyTree:
    """A tree on the devices of a sharding; its shapes, where these are only described."""
    if _DESCRIBED.get():
        return jax.tree.map(lambda x: shape_of(x, sharding=where), tree)
    return jax.device_put(tree, where)


def shape_of(x: Any, lead: tuple[int, ...] = (), **place: Sharding) -> jax.ShapeDtypeStruct:
    """The shape and type of a leaf, with axes in front of its own."""
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return jax.ShapeDtypeStruct((*lead, *np.shape(x)), dtype, **place)


_SHARED: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar(
    "shared", default=None
)


@contextlib.contextmanager
def shared_programs() -> Iterator[None]:
    """Inside, lane maps of equal keys share one program: many runs compile once.

    Within another it is a part of that one.
    """
    there = _SHARED.get()
    token = _SHARED.set({} if there is None else there)
    try:
        yield
    finally:
        _SHARED.reset(token)


def forget_programs() -> None:
    """Give back the memory of all compiled programs; what is run again comes from JAX's cache."""
    if (programs := _SHARED.get()) is not None:
        programs.clear()
    jax.clear_caches()
    gc.collect()


class LaneMap:
    """A function of ``(shared, seed, *lane)`` mapped over devices, one ``lane`` tuple each.

    ``shared`` is replicated once. A lane's trees live on its own device between calls
    (:meth:`place`), results stay there too, and only what is wanted is fetched.

    Attributes:
      together: all lanes run at once or none, so each needs work; else one without is None.
    """

    together = True

    def __init__(
        self,
        function: Callable,
        shared: PyTree,
        *,
        arity: int,
        devices: Sequence[jax.Device],
        how: str = "shard_map",
        donate: Sequence[int] = (),
        key: Hashable = None,
    ):
        """Map ``function``.

        Args:
          function: pure; returns a tree of arrays.
          shared: its first argument, the same for every lane (teachers' weights).
          arity: how many trees a lane tuple holds.
          devices: one lane each; a CPU several times for ``CoreMap`` alone.
          how: "shard_map" or "pmap".
          donate: positions in the lane tuple whose buffers the call may reuse.
          key: all that the function's results depend on beside its arguments: see
            ``shared_programs``; None shares nothing.
        """
        if how not in MAPS:
            raise ValueError(f"how is {how!r}; allowed: {', '.join(MAPS)}")
        self.devices = list(devices)
        self._places = list(dict.fromkeys(self.devices))  # one each, see ``CoreMap``
        self._mesh = Mesh(np.array(self._places), (AXIS,))
        self._shared = put(shared, NamedSharding(self._mesh, P()))
        self._traced: list[None] = []
        programs = _SHARED.get() if key is not None else None
        address = (key, tuple(self._places), arity, how, tuple(donate))
        if programs is not None and address in programs:
            self._mapped = programs[address]
            return

        traced = self._traced  # alone: a shared program outlives its first map, and not its weights

        def counted(*arguments):
            traced.append(None)
            return function(*arguments)

        donated = tuple(2 + position for position in donate)
        if how == "pmap":
            axes = (None, None, *[0] * arity)
            self._mapped = jax.pmap(
                counted, AXIS, in_axes=axes, devices=self._places, donate_argnums=donated
            )
        else:
            self._mapped = jax.jit(_shard_map(counted, self._mesh, arity), donate_argnums=donated)
        if programs is not None:
            programs[address] = self._mapped

    def __len__(self) -> int:
        return len(self.devices)

    @property
    def traces(self) -> int:
        """How often the function was traced: once per shape, whatever is run."""
        return len(self._traced)

    def place(self, tree: PyTree, lane: int) -> PyTree:
        """A tree's leaves on one lane's device, with the lane axis in front.

        The leaves are copied, so that donating them cannot take the caller's arrays.
        """
        sharding = SingleDeviceSharding(self.devices[lane])
        if _DESCRIBED.get():
            return jax.tree.map(lambda x: shape_of(x, (1,), sharding=sharding), tree)
        return arrived(jax.tree.map(lambda x: jax.device_put(np.array(x)[None], sharding), tree))

    @staticmethod
    def fetch(lane_tree: PyTree) -> PyTree:
        """A lane's tree as NumPy arrays, without the lane axis."""
        return jax.tree.map(lambda x: np.array(x)[0], jax.device_get(lane_tree))

    def __call__(self, seed: int, lanes: Sequence[tuple[PyTree, ...] | None]) -> list[PyTree]:
        """Run every lane once.

        Args:
          seed: shared by all lanes.
          lanes: one tuple of placed trees per lane, of equal shapes; None for one without work,
            unless they run ``together``.

        Returns:
          Per lane, its placed result; None where there was no work.
        """
        return self._run(seed, lanes)

    def _run(self, seed: int, lanes: Sequence[Any]) -> list[PyTree]:
        return self._split(self._mapped(*self._arguments(seed, lanes)))

    def spread(self, seed: int, batches: Sequence[tuple[PyTree, ...]]) -> list[PyTree]:
        """Run up to one batch a lane, of equal shapes; lanes that have none repeat one, if need be.

        Returns:
          Their placed results.
        """
        count = len(self) if self.together else len(batches)
        lanes = [
            tuple(self.place(tree, at) for tree in batches[at % len(batches)])
            for at in range(count)
        ]
        return self(seed, lanes)[: len(batches)]

    def stream(self, seed: int, batches: Iterable[PyTree]) -> Iterator[PyTree]:
        """Run any number of batches of equal shapes, as many at once as there are lanes.

        Yields:
          Their results, fetched, in order.
        """
        batches = iter(batches)
        while group := list(itertools.islice(batches, len(self))):
            for result in self.spread(seed, [(batch,) for batch in group]):
                yield self.fetch(result)

    def lower(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> jax.stages.Lowered:
        """The program for such arguments, to be compiled and inspected."""
        return self._mapped.lower(*self._arguments(seed, lanes))

    def lower_for(self, *trees: PyTree) -> jax.stages.Lowered:
        """The program for lanes of such trees, of which only the shapes count where described."""
        lanes = [tuple(self.place(tree, at) for tree in trees) for at in range(len(self))]
        return self.lower(0, lanes)

    def compile(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> jax.stages.Compiled:
        """The compiled program for such arguments, to be inspected (HLO, memory)."""
        return self.lower(seed, lanes).compile()

    def _arguments(self, seed, lanes):
        assert len(lanes) == len(self._places), "one lane tuple per device"
        joined = (self._join(trees) for trees in zip(*lanes, strict=True))
        return self._shared, np.uint32(seed), *joined

    def _join(self, lanes: Sequence[PyTree]) -> PyTree:
        sharding = NamedSharding(self._mesh, P(AXIS))

        def join(*shards):
            shape = (len(shards), *shards[0].shape[1:])
            if _DESCRIBED.get():
                return jax.ShapeDtypeStruct(shape, shards[0].dtype, sharding=sharding)
            return jax.make_array_from_single_device_arrays(shape, sharding, list(shards))

        return jax.tree.map(join, *lanes)

    def _split(self, tree: PyTree) -> list[PyTree]:
        leaves, structure = jax.tree.flatten(tree)
        by_device = [{s.device: s.data for s in leaf.addressable_shards} for leaf in leaves]
        return [
            jax.tree.unflatten(structure, [shards[device] for shards in by_device])
            for device in self._places
        ]


class CoreMap(LaneMap):
    """As :class:`LaneMap`, on one CPU: a lane runs the program of one lane in a thread of its own.

    One program leaves cores idle where its operations are too small to be divided, and two beside
    one another do not: measured in docs/performance.md. The bits are those of one lane.
    """

    together = False

    def __init__(self, *arguments: Any, **options: Any):
        """Map as ``LaneMap`` does; ``devices`` names the CPU once for each lane."""
        super().__init__(*arguments, **options)
        assert len(self._places) == 1
        self._threads = futures.ThreadPoolExecutor(len(self) - 1, "lane")  # the first is the caller
        self._fits: dict[Any, bool] = {}

    def _run(self, seed: int, lanes: Sequence[Any]) -> list[PyTree]:
        begun = [self._arguments(seed, [lane]) for lane in lanes if lane is not None]
        if self._fit(begun):
            others = [self._threads.submit(self._alone, arguments) for arguments in begun[1:]]
            try:
                results = [self._alone(begun[0])]
            finally:
                futures.wait(others)
            results += [other.result() for other in others]
        else:
            results = [self._alone(arguments) for arguments in begun]
        ended = iter(results)
        return [None if lane is None else next(ended) for lane in lanes]

    def _alone(self, arguments: tuple) -> PyTree:
        [result] = self._split(self._mapped(*arguments))
        return jax.block_until_ready(result)

    def _fit(self, begun: Sequence[tuple]) -> bool:
        """Whether lanes may run beside one another. Compiles, so that no two threads do."""
        if len(begun) == 1:
            return False
        shapes = len(begun), *(x.shape for x in jax.tree.leaves(begun[0][2:]))
        if shapes not in self._fits:
            analysis = self._mapped.lower(*begun[0]).compile().memory_analysis()
            self._fits[shapes] = lanes_at_once(analysis, len(begun)) > 1
        return self._fits[shapes]

    def lower(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> jax.stages.Lowered:
        """The program of one lane, see ``LaneMap``."""
        return super().lower(seed, lanes[:1])


def lanes_at_once(analysis: Any, lanes: int) -> int:
    """How many of a CPU's lanes run beside one another: all, or one where memory is short.

    Half of what is free is for them; processes that begin together have a part of it each.

    Args:
      analysis: the memory of the program of one lane, as compiled; None: unknown.
    """
    if analysis is None:
        return 1
    each = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    return lanes if lanes * each <= environment.free_memory() / 2 / processes_here() else 1


def lane_map(
    function: Callable, shared: PyTree, *, devices: Sequence[jax.Device], **options: Any
) -> LaneMap:
    """A function mapped over the devices that ``lane_devices`` names; see ``LaneMap``."""
    kind = CoreMap if len(set(devices)) < len(devices) else LaneMap
    return kind(function, shared, devices=devices, **options)


class SpanMap:
    """As :class:`LaneMap`, but a lane is several devices that share one image batch.

    Programs are written for the whole batch; XLA divides images among a lane's devices and adds
    up what spans them, so that a BatchNorm's moments are those of the whole batch and a gradient
    is that of the whole batch's loss. Each lane has a program of its own.
    """

    together = False

    def __init__(
        self,
        function: Callable,
        shared: PyTree,
        *,
        devices: Sequence[jax.Device],
        span: int,
        donate: Sequence[int] = (),
    ):
        """Map ``function`` as ``LaneMap`` does, ``span`` devices to a lane."""
        assert len(devices) >= span > 1 and len(devices) % span == 0
        groups = [devices[at : at + span] for at in range(0, len(devices), span)]
        self._span = span
        self._meshes = [Mesh(np.array(group), (ROWS,)) for group in groups]
        self._shared = [put(shared, NamedSharding(m, P())) for m in self._meshes]
        self.traces = 0

        def counted(*arguments):
            self.traces += 1
            return function(*arguments)

        self._jit = jax.jit(counted, donate_argnums=tuple(2 + position for position in donate))

    def __len__(self) -> int:
        return len(self._meshes)

    def place(self, tree: PyTree, lane: int) -> PyTree:
        """A tree on one lane's devices: images divided, all else on each of them."""
        copy = (lambda x: x) if _DESCRIBED.get() else np.array
        return arrived(jax.tree.map(lambda x: put(copy(x), self._where(x, lane)), tree))

    def _where(self, x: Any, lane: int) -> NamedSharding:
        by_images = np.ndim(x) == 4 and np.shape(x)[0] % self._span == 0
        return NamedSharding(self._meshes[lane], P(ROWS) if by_images else P())

    @staticmethod
    def fetch(lane_tree: PyTree) -> PyTree:
        """A lane's tree as NumPy arrays."""
        return jax.tree.map(np.array, jax.device_get(lane_tree))

    def __call__(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> list[PyTree]:
        """Run every lane once; see ``LaneMap``."""
        assert len(lanes) == len(self), "one lane tuple per group of devices"
        results = [
            None if a is None else self._jit(s, np.uint32(seed), *a)
            for s, a in zip(self._shared, lanes, strict=True)
        ]
        # As `place` leaves them, so that the next call, or a resumed run's first, is one program.
        return [
            jax.tree.map(lambda x, at=at: jax.device_put(x, self._where(x, at)), result)
            for at, result in enumerate(results)
        ]

    def lower(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> jax.stages.Lowered:
        """The program of the first lane, see ``LaneMap``."""
        return self._jit.lower(self._shared[0], np.uint32(seed), *lanes[0])

    def lower_for(self, *trees: PyTree) -> jax.stages.Lowered:
        """The program for lanes of such trees, see ``LaneMap``."""
        return self.lower(0, [tuple(self.place(tree, 0) for tree in trees)])

    def compile(self, seed: int, lanes: Sequence[tuple[PyTree, ...]]) -> jax.stages.Compiled:
        """The compiled program of the first lane."""
        return self.lower(seed, lanes).compile()


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


class DataMesh:
    """Devices that train or test one network: its weights on each, a batch's rows spread over them.

    Programs are written for the whole batch; XLA divides them and adds the sums over devices. So a
    sum that spans devices cannot be forgotten, and a gradient is that of the whole batch's loss.
    On one device this is plain ``jax.jit``.
    """

    def __init__(self, devices: tuple[jax.Device, ...], *, described: bool = False):
        """Take devices; a single one must be JAX's default, unless it is described."""
        mesh = Mesh(np.array(devices), (ROWS,))
        self.count = len(devices)
        self._plain = self.count == 1 and not described
        self._everywhere = NamedSharding(mesh, P())
        self._by_rows = NamedSharding(mesh, P(ROWS))

    def jit(self, function: Callable, *, donate: Sequence[int] = ()) -> jax.stages.Wrapped:
        """Compile a function whose results every device holds whole."""
        where = None if self.count == 1 else self._everywhere
        return jax.jit(function, donate_argnums=tuple(donate), out_shardings=where)

    def replicate(self, tree: PyTree) -> PyTree:
        """A tree on every device."""
        return tree if self._plain else put(tree, self._everywhere)

    def put(self, x: np.ndarray) -> jax.Array:
        """An array of a batch: its rows divided, or all of it on every device where they do not."""
        if self._plain:
            return arrived(jax.device_put(x))
        where = self._by_rows if self.divides(np.shape(x)) else self._everywhere
        return arrived(put(x, where))

    def spread(self, tree: PyTree) -> PyTree:
        """A batch where the program reads it."""
        if not self._plain:
            return jax.tree.map(self.put, tree)
        return jax.tree.map(lambda x: self.put(x) if isinstance(x, np.ndarray) else x, tree)

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether an array's rows can be divided equally."""
        return bool(shape) and shape[0] % self.count == 0

    def keep_spread(self, x: jax.Array) -> jax.Array:
        """Inside a program: an array whose rows are divided as a batch's are."""
        if self.count == 1 or not self.divides(x.shape):
            return x
        return jax.lax.with_sharding_constraint(x, self._by_rows)


def data_mesh(count: int = 1) -> DataMesh:
    """The first local devices; always the same object, so that programs are compiled once."""
    assert 1 <= count <= local_devices(), count
    return _data_mesh(tuple(_of_this_process()[:count]), bool(_DESCRIBED.get()))


@functools.cache
def _data_mesh(devices: tuple[jax.Device, ...], described: bool) -> DataMesh:
    return DataMesh(devices, described=described)


def arrived(tree: PyTree) -> PyTree:
    """Arrays just sent to a device; on a CPU they are there when this returns.

    A CPU's program whose arguments are there runs in the calling thread, which keeps the memory of
    its temporaries from call to call (``environment.prepare_environment``); others run elsewhere.
    """
    return jax.block_until_ready(tree) if on_cpu() else tree


def devices_in_words() -> str:
    """What a run says of the devices it has, and where it may have missed some."""
    devices = jax.local_devices()
    said = f"{len(devices)} x {devices[0].device_kind}"
    plugins = [name for name in _CUDA_PLUGINS if importlib.util.find_spec(name)]
    if devices[0].platform == "cpu" and plugins and not os.environ.get("JAX_PLATFORMS"):
        said += (
            f"; warning: {plugins[0]} is installed and JAX found no GPU (nvidia-smi tells whether "
            f"the driver sees one; JAX_PLATFORMS=cuda makes JAX say why)"
        )
    return said


def platform() -> str:
    """What programs are built for: "cpu", "gpu" or "tpu"."""
    name = devices()[0].platform
    return name if name in ("cpu", "tpu") else "gpu"


def suited(*, cpu: T, default: T, tpu: T | None = None) -> T:
    """Of the forms of one thing, the one for what programs are built for.

    It is chosen when a program is traced, since it is lowered for the devices of here.
    ``lax.platform_dependent`` chooses when it is lowered, and traces all forms: the same program
    for up to twice the time.

    Args:
      default: for a GPU; for a TPU, too, where it has none of its own.
    """
    return {"cpu": cpu, "tpu": default if tpu is None else tpu}.get(platform(), default)


def on_cpu() -> bool:
    """Whether programs run on a CPU, not only are built for one."""
    return not _DESCRIBED.get() and platform() == "cpu"


@contextlib.contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Say what to do where a device's memory does not suffice.

    Raises:
      UserError: it does not.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not any(word in str(error) for word in _EXHAUSTED):
            raise
        said, more = "the device has not enough memory", ""
        if _EXHAUSTED[0] not in str(error):
            said, more = "the device's libraries find not enough memory, it seems", _FOR_LIBRARIES
        raise UserError(
            f"{said} ({str(error).splitlines()[0]}). {more}{remedy} What was finished stays where "
            f"it is."
        ) from error


# What XLA says, and what CUDA's libraries do, for which XLA leaves the rest of a GPU's memory.
_EXHAUSTED = ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY", "ALLOC_FAILED", "STATUS_NOT_INITIALIZED")
_FOR_LIBRARIES = (
    "Leave them more: XLA_PYTHON_CLIENT_MEM_FRACTION=.6 in the environment (JAX takes .75 of a GPU "
    "at its start), and see that nobody else uses it. Or: "
)


_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# What brings a platform's devices, by the names that JAX has for it.
_INSTALLED = {
    "cuda": "pip install 'prism-jax[cuda13]' (or [cuda12], as the driver asks) for an NVIDIA GPU",
    "tpu": "pip install 'prism-jax[tpu]' on a machine with a TPU",
}
_INSTALLED["gpu"] = _INSTALLED["cuda"]


def find_devices(alone: str = "") -> None:
    """Let JAX look for its devices, after ``start_processes``.

    Args:
      alone: what is one process' work, and where it is to be done; said to one of a slice.

    Raises:
      UserError: it finds none, for what ``JAX_PLATFORMS`` asks for is misspelt or not installed, or
        for another process has none; or it finds processes that were not joined.
    """
    try:
        jax.local_devices()
    except Exception as error:  # JAX raises several kinds, an AssertionError without a text too
        wanted = jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # made at run time
        said = (str(error).splitlines() or ["it sees none of this kind"])[0]
        if "local_topology" in str(error):  # every process waits for what every other one has
            raise UserError(
                f"another process of this run found no devices, or ended; see its message ({said})"
            ) from error
        remedies = [_INSTALLED[name] for name in wanted.split(",") if name in _INSTALLED]
        if wanted:
            remedies.append("unset JAX_PLATFORMS for whatever is there")
        raise UserError(
            f"JAX finds no device{wanted and f' for JAX_PLATFORMS={wanted}'}: {said}\n"
            f"{'; or '.join([*remedies, 'set JAX_PLATFORMS=cpu for the processor'])}"
        ) from error
    if jax.process_count() > 1 and _store() is None:  # a TPU slice tells how many there are
        raise UserError(
            f"this is one of {jax.process_count()} processes of a slice that were not joined; "
            f"{alone or 'give --distributed=on to every one'}"
        )


def local_devices() -> int:
    """How many devices this process has."""
    return len(_of_this_process())


def sharing_devices() -> int:
    """How many devices of this process a training is spread over unless it is told.

    On a v5e or v6e of several hosts the compiler refuses a program that communicates among a part
    of the slice ("device assignment should include all slice devices"): there it is one.
    """
    everywhere = _DESCRIBED.get() or jax.devices()
    hosts = {device.process_index for device in everywhere}
    flat = everywhere[0].platform == "tpu" and "lite" in everywhere[0].device_kind
    return 1 if flat and len(hosts) > 1 else local_devices()


def _of_this_process() -> list[jax.Device]:
    """Devices that a training can be spread over: of described ones, those of the first host."""
    return [d for d in devices() if d.process_index == devices()[0].process_index]


def lane_devices(limit: int, span: int = 1) -> list[jax.Device]:
    """The local devices to use for ``limit`` independent batches of ``span`` devices each.

    What is described is used whole: a program of a TPU slice is compiled for all of its chips. A
    CPU that is one device is named once for each batch that runs on it at a time.
    """
    limit = len(devices()) if _DESCRIBED.get() else max(1, limit)
    if len(devices()) == span == 1 and on_cpu() and environment.cores() > 1:
        return devices() * min(limit, CORE_LANES)
    lanes = min(limit, len(devices()) // span)
    return devices()[: lanes * span]


# --- processes ------------------------------------------------------------------------------

MODES = ("auto", "on", "off")
HEARTBEAT_SECONDS = 100  # a process that is silent for longer is dead, and ends the others
# How long processes wait for the last one to start: images of containers are fetched, nodes made.
START_SECONDS = 1800


def cluster(environ: Mapping[str, str]) -> str | None:
    """The cluster manager that started several processes of this command, or None."""

    def several(name: str) -> bool:
        value = environ.get(name, "")
        return value.isdecimal() and int(value) > 1

    if several("SLURM_NTASKS") and "SLURM_PROCID" in environ:
        interactive = environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]) == "1"
        return None if interactive else "SLURM"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    if "," in environ.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    if several("MEGASCALE_NUM_SLICES"):
        return "TPU slices"
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return "Kubernetes"
    return None


def has_what_it_sees(environ: Mapping[str, str]) -> bool:
    """Whether all devices that a process of a cluster manager sees are its own.

    So it is where there is one process a node, or where it was given one GPU alone, which is then
    the first that it sees, whatever its number on the node.
    """
    if (visible := environ.get("CUDA_VISIBLE_DEVICES")) and "," not in visible:
        return True
    if local := environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return local == "1"
    tasks, nodes = _slurm(environ)
    return tasks is not None and tasks == nodes


def start_processes(
    mode: str,
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> None:
    """Join the other processes of this run, before JAX looks for devices.

    Args:
      mode: "auto" joins where a cluster manager started several processes, or where the other
        arguments say so; "on" always, asking JAX to find out how; "off" never.
      coordinator: "host:port" of process 0, where no cluster manager tells.
      processes: how many there are.
      process: which one this is.

    Raises:
      UserError: the arguments do not go together.
      Unreachable: the others did not come.
    """
    if mode not in MODES:
        raise UserError(f"--distributed={mode} is unknown; allowed: {', '.join(MODES)}")
    told = (coordinator, processes, process)
    if any(t is not None for t in told) and any(t is None for t in told):
        raise UserError(
            "--coordinator, --processes and --process go together: "
            "--coordinator=<host of process 0>:<port> --processes=<how many> --process=<which>"
        )
    if processes is not None and process is not None and not 0 <= process < processes:
        raise UserError(f"--process={process} is not one of 0 to {processes - 1} (--processes)")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise UserError(f"--coordinator={coordinator} names no port; write HOST:PORT")
    explicit = coordinator is not None
    if mode == "off" and explicit:
        raise UserError(
            f"--distributed=off runs this process alone, and --coordinator={coordinator} names "
            f"others; leave one of them out"
        )
    if mode == "off" or (mode == "auto" and not explicit and cluster(os.environ) is None):
        return
    arguments: dict[str, Any] = {}
    if explicit:
        arguments = {
            "coordinator_address": coordinator, "num_processes": processes, "process_id": process,
        }  # fmt: skip
    if (explicit or has_what_it_sees(os.environ)) and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        # All devices that it sees. Otherwise JAX gives a process of SLURM or Open MPI one: that of
        # its number on the node.
        arguments["local_device_ids"] = []
    # It would swallow a SIGTERM, for a question that nobody here asks of it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=3600,  # others may still work; the last to end ends it
        )
    except (RuntimeError, ValueError) as error:
        kind = UserError if isinstance(error, ValueError) else Unreachable
        raise kind(
            f"the processes of this run could not be joined ({str(error).splitlines()[0]}); use "
            f"--distributed=off for one process, or name --coordinator, --processes, --process"
        ) from error


def is_main() -> bool:
    """Whether this process writes what there is one of: manifests, figures, the report."""
    return jax.process_index() == 0


def process_count() -> int:
    """How many processes share this run."""
    return jax.process_count()


def processes_here() -> int:
    """How many processes of this run share this machine, by what started them."""
    count = jax.process_count()
    if count == 1:
        return 1
    if (_joined().coordinator_address or "").startswith(("127.", "localhost:")):
        return count
    if local := os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(local)
    tasks, nodes = _slurm(os.environ)
    return math.ceil(int(tasks) / int(nodes)) if tasks and nodes else 1


def _slurm(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Of SLURM's step, or job, the numbers of processes and of machines."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS")
    return tasks, environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES")


def name() -> str:
    """This process, as its messages name it."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def tell(key: str, value: str) -> None:
    """Let the other processes know something, once; the main process does."""
    if jax.process_count() > 1:
        _store().key_value_set(f"prism_jax/{key}", value)


def told(key: str) -> str | None:
    """What the main process told under a key; None after a second in which it told nothing."""
    try:
        return _store().blocking_key_value_get(f"prism_jax/{key}", 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise Unreachable(
            f"process 0 is gone ({str(error).splitlines()[0]}); what was finished is kept. Run "
            f"the same command again on every process."
        ) from error


class Stopped(NamedTuple):
    """Why another process ended before its work did; by an error of which exit status, or None."""

    why: str
    status: int | None


def say_stopped(why: str, *, status: int | None) -> None:
    """Let the other processes know that this one ends before its work does."""
    if jax.process_count() > 1:
        said = json.dumps(Stopped(f"{name()}: {why}", status))
        _store().key_value_set(f"prism_jax/stopped/{jax.process_index()}", said)


def stopped_elsewhere() -> Stopped | None:
    """What a process said that ended before its work did, one that failed first; or None."""
    if jax.process_count() == 1:
        return None
    found = [Stopped(*json.loads(s)) for _, s in _store().key_value_dir_get("prism_jax/stopped/")]
    return next((s for s in found if s.status), found[0] if found else None)


def _store() -> Any:
    """The key-value store of jax.distributed."""
    return _joined().client


def _joined() -> Any:
    """What jax.distributed knows of the other processes, which has no public door."""
    from jax._src import distributed

    return distributed.global_state


def process_share(items: Sequence[Any]) -> list[Any]:
    """The items that this process works on."""
    return share(items, jax.process_index(), jax.process_count())


def share(items: Sequence[Any], process: int, processes: int) -> list[Any]:
    """The items that fall to one of several processes: every process takes every n-th."""
    return list(items)[process::processes]


def longest_first(items: Iterable[T], length: Callable[[T], int]) -> list[T]:
    """The order of work: what takes longest begins first, so that devices end together.

    Otherwise the order is kept. It must change no result: a piece of work knows nothing of when it
    is worked on.
    """
    return sorted(items, key=length, reverse=True)
