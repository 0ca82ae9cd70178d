"""Several processes of one run, over the loopback interface: the same bits, whatever happens."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import time
from types import SimpleNamespace

import pytest
from etils import epath
from helpers.command import ROOT, TIMEOUT, TINY, assert_same, reference, run, start

from configs import tiny
from prism_jax import parallel, pipeline
from prism_jax.config import resolve
from prism_jax.environment import provenance
from prism_jax.errors import UserError
from prism_jax.main import find_devices, main
from prism_jax.stages.coordination import DECIDE_BITS, Interrupted, StopSignal, Work

__all__ = ["reference"]  # a fixture

D4M = f"--config={ROOT / 'tests' / 'configs' / 'tiny_d4m.py'}"

CHOSEN = (
    *(D4M, "--stages=squeeze,recover", "--config.generate.candidates=2"),
    *("--config.generate.refine.steps=4", "--config.generate.refine.window=(1,3)"),
)
OFTEN = ("--config.recover.checkpoint_seconds=0.001", "--config.validate.checkpoint_seconds=0.001")


def start_all(
    count: int, *arguments: str, devices: int = 1, last: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """The same command in so many processes, with so many devices each; the last has more of it."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    joined = (f"--coordinator=127.0.0.1:{port}", f"--processes={count}")
    flags = f"--xla_force_host_platform_device_count={devices}"
    more = [()] * (count - 1) + [last]
    return [
        start(*arguments, *joined, f"--process={i}", *more[i], XLA_FLAGS=flags)
        for i in range(count)
    ]


def end_all(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each."""
    try:
        ended = [p.communicate(timeout=TIMEOUT) for p in processes]
        return [(p.returncode, *said) for p, said in zip(processes, ended, strict=True)]
    finally:
        for process in processes:
            process.kill()


def wait_for(root, pattern: str, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(root.glob(pattern)):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.005)


def assert_done(ended) -> None:
    for status, out, err in ended:
        assert status == 0, f"{out}\n{err}"


def test_two_processes_generate_what_one_does(tmp_path):
    """Latents, anchors and units are dealt; the generator is one process' work."""
    flags = (D4M, "--stages=squeeze,recover")
    alone = run(*flags, f"--workdir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    ended = end_all(start_all(2, *flags, f"--workdir={tmp_path / 'run'}"))
    assert_done(ended)
    assert_same(tmp_path / "run", tmp_path / "alone")
    assert all(f"[process 1 of 2] {name}: 2/2" in ended[1][1] for name in ("latents", "recover"))


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Candidates, and what is made of the chosen, by one process on one device."""
    root = tmp_path_factory.mktemp("chosen") / "run"
    done = run(*CHOSEN, f"--workdir={root}")
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("count", "devices"), [(1, 2), (1, 8), (2, 1), (4, 1), (2, 8), (4, 2)])
def test_any_number_of_processes_and_devices_generates_the_same(tmp_path, chosen, count, devices):
    ended = end_all(start_all(count, *CHOSEN, f"--workdir={tmp_path / 'run'}", devices=devices))
    assert_done(ended)
    assert_same(tmp_path / "run", chosen)
    for path in (chosen / "generate").rglob("*.safetensors"):
        ours = tmp_path / "run" / path.relative_to(chosen)
        assert ours.read_bytes() == path.read_bytes(), path


def kill_on(count: int, moment: str, root: pathlib.Path, *command: str) -> None:
    """Start so many processes and kill all of them once a file is there."""
    processes = start_all(count, *command)
    wait_for(root, moment, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert {status for status, *_ in end_all(processes)} == {-signal.SIGKILL}
    assert not (root / "summary.json").exists()


def test_killed_on_three_hosts_continues_on_two_and_ends_on_one(tmp_path, reference):
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    kill_on(3, "recover/checkpoints/*/[3-9]", root, *command)
    kill_on(2, "validate/*/0/checkpoints/[3-9]", root, *command)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert_same(root, reference)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 8])
def test_killed_on_four_hosts_continues_on_any_number(tmp_path, reference, count):
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    kill_on(4, "recover/checkpoints/*/[3-9]", root, *command)
    assert_done(end_all(start_all(count, *command)))
    assert_same(root, reference)


def assert_both_worked_and_one_reported(*runs) -> None:
    first, second = ("".join(run[i][1] for run in runs) for i in range(2))
    assert "[process 1 of 2] recover: " in second and "[process" not in first
    assert "report.html" in first and "report.html" not in second


def test_where_one_is_stopped_all_stop_and_save(tmp_path, reference):
    """And two processes, of two devices each, make what one of one device makes."""
    root, command = tmp_path / "run", (TINY, f"--workdir={tmp_path / 'run'}", *OFTEN)
    processes = start_all(2, *command, devices=2)
    wait_for(root, "recover/checkpoints/*/[3-9]", processes)
    processes[1].send_signal(signal.SIGTERM)
    stopped = end_all(processes)
    assert [status for status, *_ in stopped] == [143, 143]
    assert "stopped by process 1 of 2: SIGTERM" in stopped[0][2]
    assert not (root / ".lock").exists() and not (root / "summary.json").exists()
    ended = end_all(start_all(2, *command, devices=2))
    assert_done(ended)
    assert_same(root, reference)
    assert_both_worked_and_one_reported(stopped, ended)


@pytest.mark.slow
def test_two_processes_that_nobody_stops_make_what_one_makes(tmp_path, reference):
    ended = end_all(start_all(2, TINY, f"--workdir={tmp_path / 'run'}", devices=2))
    assert_done(ended)
    assert_same(tmp_path / "run", reference)
    assert_both_worked_and_one_reported(ended)


@pytest.mark.slow
def test_more_processes_than_work(tmp_path, reference):
    """Three teachers and two units on four processes of two devices."""
    assert_done(end_all(start_all(4, TINY, f"--workdir={tmp_path / 'run'}", devices=2)))
    assert_same(tmp_path / "run", reference)


@pytest.mark.slow
def test_uneven_work(tmp_path):
    """Three units and one: four in all, dealt to two processes, of which two were done before."""
    root = tmp_path / "run"
    command = (TINY, f"--workdir={root}", "--config.recover.ipc=4", "--stages=squeeze,recover")
    alone = run(TINY, f"--workdir={tmp_path / 'alone'}", *command[2:])
    assert alone.returncode == 0, alone.stderr
    assert_done(end_all(start_all(2, *command)))
    assert_same(root, tmp_path / "alone")
    for unit in ("g00001_b00000", "g00003_b00000"):  # process 1 has them again; process 0 has none
        (root / "recover" / "units" / f"{unit}.json").unlink(missing_ok=True)
    (root / "recover" / "manifest.json").unlink()
    assert_done(end_all(start_all(2, *command)))
    assert_same(root, tmp_path / "alone")


@pytest.mark.parametrize(
    ("environ", "manager"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "SLURM"),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        # An interactive shell inside an allocation of four tasks is one process.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU pod"),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_a_cluster_is_joined_only_where_there_is_one(environ, manager):
    assert parallel.cluster(environ) == manager


@pytest.mark.parametrize(("failed", "status"), [(1, 1), (2, 2), (None, 143)])
def test_who_stops_for_another_s_error_ends_otherwise(monkeypatch, failed, status):
    """A job that is started again wherever it was asked to stop would meet the error for ever."""
    said = [
        ("a", json.dumps(["process 2 of 3: SIGTERM", None])),
        ("b", json.dumps(["process 1 of 3: the loss is nan", failed])),
    ]
    store = SimpleNamespace(key_value_dir_get=lambda prefix: said)
    monkeypatch.setattr(parallel, "_store", lambda: store)
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 3)
    with pytest.raises(Interrupted) as stopped:
        StopSignal().check()
    assert stopped.value.status == status
    assert str(stopped.value) == said[bool(failed)][1].split('"')[1]


def test_a_process_that_reads_other_images_says_so(monkeypatch, tmp_path):
    """Their students would be waited for for ever: each would take the other's for unfinished."""
    told = {}
    monkeypatch.setattr(parallel, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "name", lambda: "process 1 of 2")
    monkeypatch.setattr(parallel, "tell", told.__setitem__)
    monkeypatch.setattr(parallel, "told", told.get)
    work = Work(epath.Path(tmp_path), None, StopSignal(), {})
    monkeypatch.setattr(parallel, "is_main", lambda: True)
    otherwise = "{mine} is not {told}: copy it again"
    work.agree("real images", lambda: "a", otherwise)
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    work.agree("real images", lambda: "a", otherwise)
    with pytest.raises(UserError, match="process 1 of 2 on .* has other real images") as raised:
        work.agree("real images", lambda: "b", otherwise)
    assert str(raised.value).endswith("process 0: b is not a: copy it again")


def test_what_decides_bits_of_a_machine_is_compared():
    """Another NPROC, kind of GPU or version on one of the hosts; not the number of its devices."""
    here = provenance([])
    told = pipeline._machine(here)
    assert told.startswith(f"cpu, NPROC={os.environ['NPROC']}, float32 as float32, prism_jax ")
    for where, key, value, same in (
        ("machine", "nproc", 0, False),
        ("versions", "jax", "0.1", False),
        ("versions", "jaxlib", "0.1", False),
        ("machine", "devices", 2, True),
    ):
        other = {**here, where: {**here[where], key: value}}
        assert (pipeline._machine(other) == told) == same
    gpus = [{**here["machine"], "platform": "gpu", "device_kind": f"NVIDIA {k}"} for k in "AB"]
    a, b = (pipeline._machine({**here, "machine": machine}) for machine in gpus)
    assert a != b and a.startswith("NVIDIA A, ") and "NPROC" not in a
    younger = {**here, "machine": {**gpus[0], "runtime": "cuda 13.1"}}
    assert pipeline._machine(younger) == a.replace("NVIDIA A, cpu, ", "NVIDIA A, cuda 13.1, ")


def test_what_goes_on_elsewhere_says_what_is_other(tmp_path, capsys):
    """Each of what decides bits; of an older version, what it did not write is not compared."""
    begun = provenance([])
    config = resolve(tiny.get_config())
    others = {"nproc": 3, "runtime": "cuda 13.1", "jaxlib": "0.1"}
    assert others.keys() <= DECIDE_BITS.keys()

    def goes_on(now) -> str:
        work = Work(epath.Path(tmp_path), config, StopSignal(), now)
        work.acquire()
        work.lock.release()
        return capsys.readouterr().out

    assert goes_on(begun) == goes_on(begun) == ""
    for key, value in others.items():
        where = "machine" if key in begun["machine"] else "versions"
        said = goes_on({**begun, where: {**begun[where], key: value}})
        assert said.count("warning: this workdir was begun with") == 1
        assert f"{begun[where][key]} and goes on with" in said and str(value) in said
        goes_on(begun)
    goes_on({**begun, "versions": {}})
    assert goes_on(begun) == ""


ALONE = {
    "SLURM, one a node": ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "4"}, True),
    "SLURM, one a GPU": ({"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_NUM_NODES": "4"}, False),
    "sbatch's own numbers": ({"SLURM_NTASKS": "4", "SLURM_NNODES": "4"}, True),
    "Open MPI, one a node": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    "Open MPI, one a GPU": ({"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, False),
    "SLURM, one a GPU that it alone sees": (
        {"SLURM_STEP_NUM_TASKS": "32", "SLURM_STEP_NUM_NODES": "4", "CUDA_VISIBLE_DEVICES": "5"},
        True,
    ),
    "SLURM, one a GPU, all seen": (
        {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "CUDA_VISIBLE_DEVICES": "0,1"},
        False,
    ),
    "nobody": ({}, False),
}


@pytest.mark.parametrize("who", ALONE)
def test_a_process_has_all_devices_that_it_alone_sees(who):
    environ, alone = ALONE[who]
    assert parallel.has_what_it_sees(environ) == alone


@pytest.mark.parametrize(("nodes", "seen"), [("2", "all"), ("1", "1")])
def test_slurms_process_of_a_node_sees_all_gpus(monkeypatch, nodes, seen):
    """By JAX's own reading of the environment: it gives a task the device of its number."""
    import jax
    from jax._src import distributed, xla_bridge

    port = "31999"
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "localhost", "NTASKS": "2", "PROCID": "1",
             "LOCALID": "1", "STEP_NUM_TASKS": "2", "STEP_NUM_NODES": nodes}  # fmt: skip
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"localhost:{port}")
    state, asked = distributed.State(), {}

    def initialize(**given):
        asked.update(given)
        given = {k: v for k, v in given.items() if not k.endswith("_seconds")}
        with pytest.raises(RuntimeError, match="as far as the devices"):
            state.initialize(**given)

    def stop(*given, **named):
        raise RuntimeError("as far as the devices")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name in ("get_distributed_runtime_client", "get_distributed_runtime_service"):
        monkeypatch.setattr(distributed._jax, name, stop)
    before = xla_bridge.CUDA_VISIBLE_DEVICES.value
    try:
        parallel.start_processes("auto")
        assert asked and xla_bridge.CUDA_VISIBLE_DEVICES.value == seen
    finally:
        for name in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
            jax.config.update(name, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "maybe"}, "allowed: auto, on, off"),
        ({"mode": "auto", "processes": 2, "process": 0}, "go together"),
        ({"mode": "auto", "coordinator": "a:1", "processes": 2, "process": 2}, "not one of 0 to 1"),
        ({"mode": "auto", "coordinator": "a", "processes": 2, "process": 0}, "names no port"),
        ({"mode": "off", "coordinator": "a:1", "processes": 2, "process": 0}, "names others"),
    ],
)
def test_what_cannot_be_joined_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        parallel.start_processes(given.pop("mode"), **given)


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, 1), (ValueError, 2)])
def test_processes_that_do_not_come_are_worth_another_try(monkeypatch, capsys, error, status):
    """Who starts jobs again gives up on status 2; that a node is late is no wrong setting."""

    def initialize(**given):
        assert given["initialization_timeout"] == parallel.START_SECONDS
        raise error("DEADLINE_EXCEEDED: 1 of 2")

    monkeypatch.setattr(parallel.jax.distributed, "initialize", initialize)
    joined = ("--coordinator=127.0.0.1:1", "--processes=2", "--process=0")
    assert main([TINY, *joined]) == status
    assert "could not be joined (DEADLINE_EXCEEDED: 1 of 2)" in capsys.readouterr().err


def test_a_slice_that_was_not_joined_is_told(monkeypatch):
    """The hosts of a TPU slice see one another's chips, but share nothing unless they join."""
    monkeypatch.setattr(parallel.jax, "process_count", lambda: 4)
    monkeypatch.setattr(parallel, "_store", lambda: None)
    with pytest.raises(UserError, match="one of 4 processes .* --distributed=on"):
        parallel.find_devices()
    with pytest.raises(UserError, match="a plan is one process' work: .* with --target"):
        find_devices(SimpleNamespace(plan=True))


def test_a_process_without_devices_is_told_to_the_others(monkeypatch):
    """They wait for what it has, and JAX says only that this did not come."""

    def fail():
        raise RuntimeError("GetKeyValue() timed out with key: cpu:local_topology/cpu/1")

    monkeypatch.setattr(parallel.jax, "local_devices", fail)
    with pytest.raises(UserError, match="another process of this run found no devices"):
        parallel.find_devices()


def test_an_error_before_the_first_stage_is_told_to_the_others(monkeypatch, capsys):
    said = []
    monkeypatch.setattr(parallel, "say_stopped", lambda why, status: said.append((why, status)))
    assert main([TINY, "--config.recover.ipc=0"]) == 2
    assert len(said) == 1 and "recover.ipc is 0" in said[0][0] and said[0][1] == 2


@pytest.mark.slow
def test_where_one_cannot_begin_all_end(tmp_path):
    wrong = ("--config.dataset.path=nowhere", "--config.dataset.source=folder")
    ended = end_all(start_all(2, TINY, f"--workdir={tmp_path / 'run'}", last=wrong))
    assert [status for status, _, _ in ended] == [2, 2]  # or a launcher would try again
    assert "process 1 of 2: " in ended[0][2]


def test_another_working_directory_is_told_and_not_waited_for(monkeypatch, tmp_path):
    """A default --workdir is on each host's own disk: what one makes, the others never see."""
    told = {}
    monkeypatch.setattr(parallel, "tell", told.__setitem__)
    monkeypatch.setattr(parallel, "told", told.get)
    monkeypatch.setattr(parallel, "process_share", list)
    monkeypatch.setattr(Work, "SECONDS_UNTIL_SEEN", 0.5)
    config = resolve(tiny.get_config())
    places = [epath.Path(tmp_path / name) for name in ("one", "other")]
    main_work = Work(places[0], config, StopSignal(), {})
    try:
        assert main_work.deal("stage", "ab", lambda: "ab") == ["a", "b"]
        monkeypatch.setattr(parallel, "is_main", lambda: False)
        assert Work(places[0], config, StopSignal(), {}).deal("stage", "ab", list) == ["a", "b"]
        with pytest.raises(UserError, match="does not see the lock of process 0 in .*other"):
            Work(places[1], config, StopSignal(), {}).deal("stage", "ab", list)
    finally:
        main_work.lock.release()


def test_ctrl_c_and_the_script_s_sigterm_are_one_request(monkeypatch):
    """The terminal asks a process and the script that started it, which asks again."""
    ended = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    stop = StopSignal()
    stop._request(signal.SIGINT, None)
    stop._request(signal.SIGTERM, None)
    assert not ended and stop.requested
    with pytest.raises(Interrupted) as stopped:
        stop.check()
    assert stopped.value.status == 130
    stop._request(signal.SIGINT, None)
    assert ended == [signal.SIGINT]
