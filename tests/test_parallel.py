"""The same bits of images for any number of devices, any chunking and any interruption.

Images are 16 px in batches of 10 here: below that, no convolution is divided among threads and a
wrong size of the thread pool would go unnoticed (measured; the twin below depends on it).
"""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import subprocess
import sys
import threading
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import small_pool
from helpers.running import advance, begin, collectives, images_of, make_unit

from prism_jax import parallel, synthesis
from prism_jax.errors import UserError

SIZE, CHUNK, STOP = 16, 50, 23
RECIPE = synthesis.Recipe(granularity="per_iteration", roll=2)
LABELS = np.arange(10) % 5
# Eight batches, each with its own draws and views, and three different budgets.
UNITS = [make_unit(slot, slot % 3, 55 - 6 * (slot % 3), LABELS) for slot in range(8)]


@functools.cache
def pool():
    return small_pool(2, image_shape=(SIZE, SIZE, 1))


def run(units=UNITS, states=None, **options):
    states = begin(pool(), RECIPE, units, SIZE) if states is None else states
    return advance(pool(), RECIPE, units, states, **options)


@functools.cache
def expected() -> np.ndarray:
    """All units on one device, 50 iterations per dispatch."""
    return images_of(run(devices=1, chunk=CHUNK))


def test_eight_devices_and_units_that_differ():
    assert jax.device_count() == 8
    images = expected()
    assert images.shape == (8, 10, SIZE, SIZE, 1) and np.isfinite(images).all()
    assert len({image.tobytes() for image in images}) == 8


@pytest.mark.parametrize("how", parallel.MAPS)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_any_number_of_devices_and_either_map(devices, how):
    np.testing.assert_array_equal(images_of(run(devices=devices, how=how)), expected())


@pytest.mark.parametrize("how", parallel.MAPS)
def test_two_batches_beside_one_another_on_one_cpu(how):
    """And the last of three alone."""
    images = images_of(run(UNITS[:3], threads=2, how=how))
    np.testing.assert_array_equal(images, expected()[:3])


@pytest.mark.parametrize("chunk", [1, 7])
def test_any_number_of_iterations_per_dispatch(chunk):
    np.testing.assert_array_equal(images_of(run(devices=8, chunk=chunk)), expected())


def test_interrupted_within_a_chunk_and_continued_on_other_devices():
    halfway = run(devices=8, chunk=CHUNK, until=STOP)
    assert {int(state.step) for state in halfway} == {STOP}
    assert all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in jax.tree.leaves(halfway))
    np.testing.assert_array_equal(images_of(run(states=halfway, devices=2)), expected())

    # Twin: a state without Adam's moments is another run.
    lost = [
        state._replace(
            opt_state=synthesis.initial_state(pool(), RECIPE, state.images_BHWC).opt_state
        )
        for state in halfway[:2]
    ]
    assert not np.array_equal(images_of(run(UNITS[:2], lost, devices=2)), expected()[:2])


def test_one_unit_does_not_depend_on_its_lane_or_its_neighbours():
    turned = [*UNITS[3:], *UNITS[:3]]
    images = images_of(run(turned, devices=8))
    np.testing.assert_array_equal(images, np.roll(expected(), -3, axis=0))


def test_a_bit_is_noticed():
    """Twin: one pixel that starts one unit in the last place away is another image."""
    states = begin(pool(), RECIPE, UNITS[:1], SIZE)
    images = states[0].images_BHWC.copy()
    images[0, 8, 8, 0] = np.nextafter(images[0, 8, 8, 0], np.float32(0))
    moved = images_of(run(UNITS[:1], [states[0]._replace(images_BHWC=images)]))
    assert (moved[0] != expected()[0]).mean() > 0.1


# --- the thread pool, which only a new process can change ----------------------------------------

PROGRAM = """
import sys
import numpy as np
import test_parallel as here
units = here.UNITS[:2]
np.save(sys.argv[1], here.images_of(here.run(units, devices=int(sys.argv[2]))))
"""


MOMENTS = """
import sys
import numpy as np
from prism_jax.models import layers
maps_BHWC = np.random.default_rng(0).standard_normal((8, 28, 28, 64), np.float32)
np.save(sys.argv[1], np.stack(layers.moments(maps_BHWC)))
"""


def elsewhere(path: pathlib.Path, program: str, *, threads: int, devices: int = 1) -> np.ndarray:
    """What a program of another process saves."""
    folder = pathlib.Path(__file__).parent
    environment = os.environ | {
        "NPROC": str(threads),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder.parent)]),
    }
    command = [sys.executable, "-c", program, str(path), str(devices)]
    subprocess.run(command, env=environment, check=True)
    return np.load(path)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_process_with_fewer_devices_and_the_same_threads_has_the_same_bits(tmp_path, devices):
    images = elsewhere(tmp_path / "images.npy", PROGRAM, threads=8, devices=devices)
    np.testing.assert_array_equal(images, expected()[:2])


def test_another_size_of_the_thread_pool_has_other_bits(tmp_path):
    """The twin of all of the above: without NPROC the promise would be an accident.

    The small maps of the pool above are summed by one thread whatever NPROC says; these are not.
    """
    found = [elsewhere(tmp_path / f"{n}.npy", MOMENTS, threads=n) for n in (1, 8, 8)]
    assert not np.array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], found[2])


# --- what the program holds -----------------------------------------------------------------------


def lanes_for(engine, count=1):
    state = begin(pool(), RECIPE, UNITS[:1], SIZE)[0]
    return [
        (engine.place(unit, i), engine.place(state, i), engine.place(np.int32(count), i))
        for i, unit in enumerate(UNITS[: len(engine)])
    ]


@pytest.mark.parametrize("how", parallel.MAPS)
def test_the_step_of_one_batch_per_device_holds_no_collective(how):
    engine = synthesis.engine(pool(), RECIPE, devices=jax.devices(), how=how)
    assert collectives(engine.compile(0, lanes_for(engine))) == []


@pytest.mark.parametrize("how", parallel.MAPS)
def test_a_collective_would_be_found(how):
    def over_lanes(shared, seed, x):
        return jax.lax.psum(x + shared, parallel.AXIS)

    lane_map = parallel.LaneMap(over_lanes, jnp.float32(1), arity=1, devices=jax.devices(), how=how)
    lanes = [(lane_map.place(np.float32(i), i),) for i in range(8)]
    assert collectives(lane_map.compile(0, lanes)) == ["all-reduce"]
    assert [float(lane_map.fetch(x)) for x in lane_map(0, lanes)] == [36.0] * 8


# --- the map itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", parallel.MAPS)
def test_lanes_share_the_first_argument_and_nothing_else(how):
    def function(shared, seed, x, n):
        return {"y": shared * x + seed.astype(jnp.float32), "n": n + 1}

    lane_map = parallel.LaneMap(
        function, np.float32(10), arity=2, devices=jax.devices()[:2], how=how
    )
    lanes = [
        (lane_map.place(np.arange(3, dtype=np.float32) + i, i), lane_map.place(np.int32(i), i))
        for i in range(2)
    ]
    first, second = map(lane_map.fetch, lane_map(7, lanes))
    np.testing.assert_array_equal(first["y"], [7, 17, 27])
    np.testing.assert_array_equal(second["y"], [17, 27, 37])
    assert (first["n"], second["n"]) == (1, 2)
    assert lane_map.traces == 1


class Meeting(parallel.CoreMap):
    """Every lane waits for another one; those that are alone wait in vain."""

    def __init__(self, *arguments, seconds, **options):
        super().__init__(*arguments, **options)
        self.meeting, self.seconds = threading.Barrier(2), seconds

    def _alone(self, arguments):
        self.meeting.wait(self.seconds)
        return super()._alone(arguments)


def beside(lanes=2, kind=parallel.CoreMap, **options):
    """A map on one CPU that adds, and what each of some lanes is given."""
    found = kind(
        lambda shared, seed, x: x + shared, np.float32(1), arity=1,
        devices=jax.devices()[:1] * lanes, donate=(0,), **options,
    )  # fmt: skip
    return found, lambda count: [(found.place(np.full(3, i, np.float32), i),) for i in range(count)]


def test_lanes_of_a_cpu_run_at_the_same_time_as_one_program(monkeypatch):
    lane_map, lanes = beside(kind=Meeting, seconds=60)
    assert [x.tolist() for x in map(lane_map.fetch, lane_map(0, lanes(2)))] == [[1] * 3, [2] * 3]
    assert lane_map.traces == 1 and len(lane_map) == 2
    # Where there is no memory for both, one after the other, to the same results.
    monkeypatch.setattr(parallel.environment, "free_memory", lambda: 0)
    lane_map, lanes = beside()
    assert [x.tolist() for x in map(lane_map.fetch, lane_map(0, lanes(2)))] == [[1] * 3, [2] * 3]
    # The twin: then they do not meet.
    lane_map, lanes = beside(kind=Meeting, seconds=0.1)
    with pytest.raises(threading.BrokenBarrierError):
        lane_map(0, lanes(2))


def test_lanes_of_a_cpu_without_work_are_none_and_errors_are_heard(monkeypatch):
    lane_map, lanes = beside(3)
    first, none, last = lane_map(0, [lanes(1)[0], None, lanes(3)[2]])
    assert none is None
    assert [lane_map.fetch(x).tolist() for x in (first, last)] == [[1] * 3, [3] * 3]
    stream = lane_map.stream(0, [np.float32(i) for i in range(7)])
    assert [float(x) for x in stream] == [1, 2, 3, 4, 5, 6, 7]
    alone = lane_map._alone

    def failing(arguments):
        if threading.current_thread().name.startswith("lane"):
            raise MemoryError("in a thread")
        return alone(arguments)

    monkeypatch.setattr(lane_map, "_alone", failing)
    assert lane_map.fetch(lane_map(0, lanes(1))[0]).tolist() == [1] * 3  # the caller's is none
    with pytest.raises(MemoryError, match="in a thread"):
        lane_map(0, lanes(2))


@pytest.mark.parametrize(
    ("each", "processes", "at_once"), [(50, 1, 2), (51, 1, 1), (25, 2, 2), (26, 2, 1), (None, 1, 1)]
)
def test_lanes_beside_one_another_need_half_of_what_is_free(monkeypatch, each, processes, at_once):
    """Of 200 bytes; processes that begin together share that half."""
    monkeypatch.setattr(parallel.environment, "free_memory", lambda: 200)
    monkeypatch.setattr(parallel, "processes_here", lambda: processes)
    one = each and SimpleNamespace(temp_size_in_bytes=each - 9, output_size_in_bytes=9)
    assert parallel.lanes_at_once(one, 2) == at_once


@pytest.mark.parametrize(
    ("count", "coordinator", "environ", "here"),
    [(1, None, {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 1), (8, "127.0.0.1:99", {}, 8),
     (8, "10.0.0.1:99", {}, 1), (8, "10.0.0.1:99", {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
     (8, "n1:99", {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "3"}, 3),
     (8, "n1:99", {"SLURM_NTASKS": "8", "SLURM_NNODES": "8"}, 1)],
)  # fmt: skip
def test_who_shares_a_machine_shares_its_memory(monkeypatch, count, coordinator, environ, here):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    joined = SimpleNamespace(coordinator_address=coordinator)
    monkeypatch.setattr(parallel, "_joined", lambda: joined)
    assert parallel.processes_here() == here


@pytest.mark.parametrize(
    ("said", "library"),
    [("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes", False),
     ("INTERNAL: Failed to load module: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
     ("FAILED_PRECONDITION: DNN library: CUDNN_STATUS_ALLOC_FAILED", True),
     ("INTERNAL: CUBLAS_STATUS_NOT_INITIALIZED", True)],
)  # fmt: skip
def test_too_little_memory_is_known_by_all_its_names(said, library):
    with pytest.raises(UserError, match=said) as raised, parallel.enough_memory("Lower it."):
        raise jax.errors.JaxRuntimeError(said)
    assert "Lower it." in str(raised.value)
    assert ("XLA_PYTHON_CLIENT_MEM_FRACTION" in str(raised.value)) == library
    with pytest.raises(jax.errors.JaxRuntimeError), parallel.enough_memory("Lower it."):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def test_a_shared_program_keeps_nobodys_weights():
    """Of the first of equal keys neither: on a device, teachers' are the dearest that there is."""

    def held(key):
        weights = np.zeros(3, np.float32)
        made = parallel.lane_map(
            lambda shared, seed, x: x + shared, weights, arity=1,
            devices=jax.devices()[:1] * 2, key=key,
        )  # fmt: skip
        assert made(0, [(made.place(np.ones(3), 0),), None])[0] is not None
        return weakref.ref(made)

    with parallel.shared_programs():
        first = held("one")
        gc.collect()
        assert first() is None


@pytest.mark.parametrize(
    ("cores", "devices", "found"), [(1, 1, [1, 1, 1]), (4, 1, [1, 2, 2]), (4, 8, [1, 2, 8])]
)
def test_a_cpu_of_one_device_is_named_once_for_each_batch(monkeypatch, cores, devices, found):
    monkeypatch.setattr(parallel.environment, "cores", lambda: cores)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:devices])
    lanes = [parallel.lane_devices(batches) for batches in (0, 2, 9)]
    assert [len(x) for x in lanes] == found
    assert len({*lanes[2]}) == devices
    with parallel.described(jax.devices()[:1]):  # another machine's compiler has no threads
        assert len(parallel.lane_devices(9)) == 1


def test_results_stay_on_their_device_and_placed_copies_are_the_maps_own():
    lane_map = parallel.LaneMap(
        lambda shared, seed, x: x + shared, np.float32(1), arity=1,
        devices=jax.devices()[2:4], donate=(0,),
    )  # fmt: skip
    mine = jnp.zeros((4,), jnp.float32)
    lanes = [(lane_map.place(mine, i),) for i in range(2)]
    results = lane_map(0, lanes)
    assert [set(x.devices()) for x in results] == [{d} for d in jax.devices()[2:4]]
    np.testing.assert_array_equal(mine, np.zeros(4))  # donation took the copy


def test_maps_of_equal_keys_share_a_program_and_not_their_weights(monkeypatch):
    traced, cleared = [], []

    def made(shared, key):
        def function(shared, seed, x):
            traced.append(key)
            return shared * x

        lane_map = parallel.LaneMap(
            function, np.float32(shared), arity=1, devices=jax.devices()[:1], key=key
        )
        return float(lane_map.fetch(lane_map(0, [(lane_map.place(np.float32(3), 0),)])[0]))

    with parallel.shared_programs():
        assert [made(2, "a"), made(5, "a"), made(7, "b")] == [6.0, 15.0, 21.0]
        assert traced == ["a", "b"]
        assert [made(2, None), made(2, None)] == [6.0, 6.0]  # nothing is known of what they do
        assert traced == ["a", "b", None, None]
        with monkeypatch.context() as patch:  # others in this process would compile anew
            patch.setattr(jax, "clear_caches", lambda: cleared.append(True))
            parallel.forget_programs()
        assert cleared
        with parallel.shared_programs():  # a part of what is around it
            assert [made(4, "a"), made(6, "a")] == [12.0, 18.0]
        assert made(6, "a") == 18.0 and traced == ["a", "b", None, None, "a"]
    # Twin: outside, every map has its own.
    assert [made(2, "a"), made(5, "a")] == [6.0, 15.0] and traced[5:] == ["a", "a"]


def test_an_unknown_map_lists_the_known_ones():
    with pytest.raises(ValueError, match="'vmap'; allowed: shard_map, pmap"):
        parallel.LaneMap(lambda *a: a, 0, arity=1, devices=jax.devices()[:1], how="vmap")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_processes_share_the_work_out(monkeypatch, processes):
    items = list(range(10))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    shares = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        shares.append(parallel.process_share(items))
    assert sorted(sum(shares, [])) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert parallel.process_share([]) == []


def test_lane_devices_are_no_more_than_the_batches_and_at_least_one():
    assert [len(parallel.lane_devices(n)) for n in (0, 1, 3, 8, 100)] == [1, 1, 3, 8, 8]


@pytest.mark.parametrize("installed", [(), ("jax_cuda12_plugin",)])
@pytest.mark.parametrize("asked", ["", "cpu"])
def test_a_run_says_what_it_runs_on(monkeypatch, installed, asked):
    """And where a GPU's plugin is there and no GPU was found, unless the CPU was asked for."""
    monkeypatch.setattr(parallel.importlib.util, "find_spec", {n: n for n in installed}.get)
    monkeypatch.setenv("JAX_PLATFORMS", asked)
    said = parallel.devices_in_words()
    assert said.startswith("8 x cpu")
    assert ("JAX found no GPU" in said) == (bool(installed) and not asked)
