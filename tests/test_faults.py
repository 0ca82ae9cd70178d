"""What goes wrong around a run: disks, memory, numbers, damaged files, other people's checkpoints.

Every fault is really made. Either the run goes on to the same bits, or it ends with a message that
names the thing and the remedy, keeps what was finished, and the remedy leads to the same bits.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.command import TINY, assert_same, call, finished, reference, results, snapshot

from prism_jax import parallel, training
from prism_jax.data import weights, workdir
from prism_jax.data.checkpoints import Checkpoints

__all__ = ["finished", "reference"]  # fixtures

STUDENT = "validate/outside/0"


def slow(*cases):
    """Cases like another one that is fast."""
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def ok(root, *arguments: str) -> str:
    status, out, err = call(TINY, f"--workdir={root}", *arguments)
    assert status == 0, err
    return out


def fails(root, *arguments: str) -> str:
    """The run ends with one message for people and status 2."""
    status, _, err = call(TINY, f"--workdir={root}", *arguments)
    assert status == 2 and err.startswith("error: ") and "Traceback" not in err, (status, err)
    assert not (root / ".lock").exists()
    return err


# --- disks ----------------------------------------------------------------------------------


@contextlib.contextmanager
def files_up_to(size: int):
    """No file of this process can grow beyond so many bytes: the kernel refuses, as a full disk
    does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What is missing, the room there is, and the file that does not fit.
FULL = {
    "a teacher's checkpoint": ("squeeze/second", 20_000, "squeeze/second/checkpoints"),
    "a label shard": ("relabel", 60_000, "shard"),
    "a student's checkpoint": (STUDENT, 9_000, f"{STUDENT}/checkpoints"),
    "a figure": ("analyse", 9_000, "analyse/"),
}


@pytest.mark.parametrize("what", [*list(FULL)[:2], *slow(*list(FULL)[2:])])
def test_a_full_disk(finished, reference, what):
    missing, room, named = FULL[what]
    shutil.rmtree(finished / missing)
    with files_up_to(room):
        err = fails(finished)
    assert named in err and "File too large" in err and "run the same command again" in err
    ok(finished)
    assert_same(finished, reference)


@pytest.fixture
def read_only(finished):
    """A finished run that nobody can write to, with one piece missing."""
    if os.geteuid():
        for path in (finished, *finished.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        yield finished
        for path in (finished, *finished.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        return
    mounts = (["--bind", finished, finished], ["-o", "remount,ro,bind", finished])
    done = [subprocess.run(["mount", *m], capture_output=True, text=True) for m in mounts[:1]]
    if done[0].returncode:
        pytest.skip(f"root may write anywhere, and cannot mount here: {done[0].stderr.strip()}")
    try:
        subprocess.run(["mount", *mounts[1]], check=True)
        yield finished
    finally:
        subprocess.run(["umount", finished], check=True)


def test_a_read_only_workdir(read_only, reference):
    """A finished run is only read; one that must write says that it cannot."""
    before = snapshot(read_only)
    assert "top-1 on real test images" in ok(read_only)
    for change in ("--config.validate.seeds=(1,)", "--config.relabel.crop_min=0.5"):
        err = fails(read_only, change)
        assert str(read_only) in err and ("Read-only" in err or "Permission" in err)
        assert "with another --workdir" in err
    assert snapshot(read_only) == before


@pytest.mark.parametrize(
    "name", ["größe 数据 [0:2]*?%s{x}#'\"", *slow("with spaces", "-dash=equals")]
)
def test_any_name_of_a_workdir(tmp_path, reference, name):
    root = shutil.copytree(reference, tmp_path / name / "run")
    for part in ("squeeze/second", "recover", "relabel", STUDENT, "analyse"):
        shutil.rmtree(root / part)
    ok(root)
    assert_same(root, reference)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]
    ours, theirs = (workdir.read_json(p / "summary.json")["relabel"] for p in (root, reference))
    assert ours["bytes"] == theirs["bytes"]  # shards are found
    assert (root / "report.html").read_text().count("data:image/png") == 3


# --- memory ---------------------------------------------------------------------------------


def exhaust(*_, **__):
    """Ask the device for more memory than there can be; what XLA raises is the real thing."""
    jnp.zeros((1 << 46,), jnp.uint8).block_until_ready()


MEMORY = {
    "recover": (parallel.LaneMap, "__call__", "recover.batch_size (now 2 images)", True),
    "relabel": (parallel.LaneMap, "__call__", "relabel.batch_size and validate.batch", False),
    STUDENT: (training.Trainer, "step", "Raise validate.accumulate (now 2)", False),
    "squeeze/second": (training.Trainer, "step", "squeeze.batch_size (now 96 images)", True),
}


@pytest.mark.parametrize("stage", ["recover", STUDENT, *slow("relabel", "squeeze/second")])
def test_too_little_memory_names_the_setting(finished, reference, monkeypatch, stage):
    owner, name, named, elsewhere = MEMORY[stage]
    kept = finished / "recover/units/g00000_b00000.json"
    if stage == "recover":
        (finished / "recover/units/g00001_b00001.json").unlink()
        (finished / "recover/manifest.json").unlink()
    else:
        shutil.rmtree(finished / stage)
    before = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, exhaust)
        err = fails(finished)
    assert "not enough memory (RESOURCE_EXHAUSTED" in err and named in err
    assert (f"--workdir=<new> --from={finished}" in err) == elsewhere
    assert kept.read_bytes() == before
    ok(finished)
    assert_same(finished, reference)


# --- numbers --------------------------------------------------------------------------------


def rewrite_weights(folder, change) -> None:
    """A teacher whose weights are others, and whose record says so."""
    path = folder / weights.WEIGHTS
    variables = weights.unpack_variables(path.read_bytes())
    data = weights.pack(change(variables))
    path.write_bytes(data)
    record = workdir.read_record(folder / weights.RECORD)
    workdir.write_record(folder / weights.RECORD, {**record, "sha256": weights.sha256(data)})


def one_unit_left(root) -> None:
    (root / "recover/units/g00001_b00001.json").unlink()
    (root / "recover/manifest.json").unlink()


@pytest.mark.parametrize("value", [np.nan, *slow(np.inf)])
def test_a_loss_that_is_not_finite_stops_the_unit_and_is_named(finished, value):
    one_unit_left(finished)

    def poison(variables):
        variables["params"]["classifier"]["bias"][:] = value
        return variables

    rewrite_weights(finished / "squeeze/first", poison)
    err = fails(finished)
    assert "unit g00001_b00001: the cross entropy of teacher first is" in err
    assert "at step 0" in err and f"--from={finished}" in err
    assert (finished / "recover/units/g00000_b00000.json").exists()


@pytest.mark.parametrize("seconds", [60.0, 1e-6], ids=["at_the_epoch", "at_a_checkpoint"])
def test_a_training_that_diverges_is_named(tmp_path, seconds):
    """Where an epoch ends, or within one where a checkpoint is due: it is not written."""
    err = fails(
        tmp_path / "run", "--config.squeeze.learning_rate=1e30", "--stages=squeeze",
        f"--config.validate.checkpoint_seconds={seconds}",
    )  # fmt: skip
    assert "squeeze first: the training loss is " in err and "lower the learning rate" in err


def test_a_teacher_whose_running_variance_is_zero(finished):
    """Dead channels: their running variance is zero, and the gradient stays finite."""
    one_unit_left(finished)

    def deaden(variables):
        for leaf in variables["params"]["features.0"].values():
            leaf[:] = 0
        for statistics in jax.tree.leaves(variables["batch_stats"]):
            statistics[:] = 0
        return variables

    rewrite_weights(finished / "squeeze/second", deaden)
    ok(finished, "--stages=recover")
    record = workdir.read_record(finished / "recover/units/g00001_b00001.json")
    for end in ("start", "end"):
        assert np.isfinite(list(record["terms"][end]["bn"].values())).all()


# --- a checkpoint of other work ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"data": {"image_size": 16}}, "data.image_size: 16 -> 8"),
        pytest.param(
            {"teachers": {"first": "0", "third": "1"}},
            'teachers.third: "1" -> (absent)',
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"recover": {"bits_version": 1}}, "recover.bits_version: 1 -> ", marks=pytest.mark.slow
        ),
    ],
)
def test_a_checkpoint_of_another_version_pool_or_size_is_refused(finished, reference, change, line):
    unit = "g00001_b00001"
    (finished / f"recover/units/{unit}.json").unlink()
    (finished / "recover/manifest.json").unlink()
    of = workdir.read_fingerprint(finished / "recover")
    of = {**of, **{key: {**of[key], **fields} for key, fields in change.items()}}
    folder = finished / "recover/checkpoints" / unit
    checkpoints = Checkpoints(folder, of={"unit": unit, **of})
    checkpoints.save(6, {"images": np.zeros((2, 16, 16, 1), np.float32)})
    checkpoints.close()
    err = fails(finished)
    assert f"the checkpoint {folder / '6'} belongs to other work" in err and line in err
    assert f"move {folder} away" in err
    shutil.rmtree(folder)
    ok(finished)
    assert_same(finished, reference)


# --- damaged files of every kind ---------------------------------------------------------------

# One file of every kind, and what must be missing so that it is read.
KINDS = {
    "config.json": ["analyse"],
    "squeeze/first/fingerprint.json": [],
    "squeeze/first/weights.safetensors": ["relabel"],
    "squeeze/first/record.json": [],
    "squeeze/second/checkpoints/*/default/state.msgpack": ["squeeze/second/record.json"],
    "squeeze/second/checkpoints/*/_CHECKPOINT_METADATA": ["squeeze/second/record.json"],
    "recover/fingerprint.json": [],
    "recover/images/00002/00001.png": ["analyse"],
    "recover/units/g00001_b00000.json": ["recover/manifest.json"],
    "recover/manifest.json": [],
    "recover/metrics.jsonl": ["analyse"],
    "relabel/fingerprint.json": [],
    "relabel/labels-00000.array_record": [STUDENT],
    "relabel/manifest.json": [STUDENT],
    "relabel/timing.json": ["summary.json"],
    f"{STUDENT}/fingerprint.json": [],
    f"{STUDENT}/record.json": [],
    f"{STUDENT}/metrics.jsonl": ["analyse"],
    f"{STUDENT}/checkpoints/*/default/state.msgpack": [f"{STUDENT}/record.json"],
    "analyse/fingerprint.json": [],
    "analyse/diversity.json": [],
    "summary.json": [],
    ".lock": ["analyse"],
}
# What is read from each, beside the file itself, once it is moved away as the message says.
REMEDIES = ("move", "Move", "Delete", "delete", "Run the same command again")


def damages(size: int, seed: int) -> dict[str, object]:
    """Cut, empty, and twenty flipped bits: five of the header, fifteen anywhere."""
    random = np.random.default_rng(seed)
    spots = [*random.integers(min(size, 64), size=5), *random.integers(size, size=15)]
    flips = {f"bit {at}": (int(at), int(random.integers(8))) for at in spots}
    return {"cut": size // 2, "empty": 0, **flips}


def damage(path: pathlib.Path, how) -> None:
    data = bytearray(path.read_bytes())
    if isinstance(how, tuple):
        data[how[0]] ^= 1 << how[1]
    else:
        data = data[:how]
    path.write_bytes(data)


def prepared(kind: str, root: pathlib.Path) -> pathlib.Path:
    """Make a finished run need the file of a kind, and return the file."""
    if kind == ".lock":
        holder = {"host": "elsewhere", "pid": 1, "alive": 4e9}
        workdir.write_record(root / kind, holder)
    for missing in KINDS[kind]:
        path = root / missing
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return max(root.glob(kind), key=lambda p: int(p.parts[-3]) if "default" in p.parts else 0)


def clear_away(root: pathlib.Path, path: pathlib.Path, err: str) -> None:
    """Do what the message says."""
    if f"elete {path}" in err:
        path.unlink()
    elif f"elete {path.parent}" in err:
        shutil.rmtree(path.parent)
    elif path.exists():
        path.rename(root.parent / "moved away")


def check_damage(kind: str, reference: pathlib.Path, root: pathlib.Path, how) -> str:
    """Damage a file and run; returns what came of it."""
    shutil.copytree(reference, root)
    path = prepared(kind, root)
    damage(path, how)
    status, out, err = call(TINY, f"--workdir={root}")
    outcome = "redone" if "is set aside" in out or "made again" in out else "no harm"
    if f"{path} is cut short" in out:
        outcome = "said"
    if status:
        assert status == 2 and "Traceback" not in err, (kind, how, err)
        assert str(path) in err or str(path.parent) in err, (kind, how, err)
        assert any(word in err for word in REMEDIES), (kind, how, err)
        outcome = "set aside" if "is set aside" in err else "refused"
        for _ in range(3):
            clear_away(root, path, err)
            status, _, err = call(TINY, f"--workdir={root}")
            if status == 0:
                break
        assert status == 0, (kind, how, err)
    ours, theirs = results(root), results(reference)
    differ = {k for k in theirs if ours.get(k) != theirs[k]}
    if outcome in ("said", "refused") and kind.endswith("metrics.jsonl"):
        differ -= {kind}  # lines that are lost are not redone: nothing but curves is made of them
    assert differ == set(), (kind, how)
    return outcome


# Kinds whose damage no other fast test makes (test_pipeline has images, shards, weights, records).
FAST = {
    "config.json": ("cut", "refused"),
    "squeeze/second/checkpoints/*/default/state.msgpack": ("empty", "redone"),
    "recover/fingerprint.json": ("cut", "refused"),
    "recover/metrics.jsonl": ("cut", "said"),
    "relabel/manifest.json": ("empty", "refused"),
    "relabel/timing.json": ("cut", "refused"),
    f"{STUDENT}/metrics.jsonl": ("empty", "said"),
    "analyse/diversity.json": ("cut", "refused"),
    "summary.json": ("cut", "refused"),
    ".lock": ("empty", "refused"),
}


@pytest.mark.parametrize("kind", FAST)
def test_a_file_cut_short_or_empty_is_never_read_as_data(tmp_path, reference, kind):
    size = prepared(kind, shutil.copytree(reference, tmp_path / "look")).stat().st_size
    how, outcome = FAST[kind]
    assert check_damage(kind, reference, tmp_path / "run", damages(size, 0)[how]) == outcome


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_of_a_file_is_read_as_data(tmp_path, reference, kind):
    """Cut, empty, and a bit flipped at twenty places."""
    size = prepared(kind, shutil.copytree(reference, tmp_path / "look")).stat().st_size
    found: dict[str, str] = {}
    for name, how in damages(size, len(kind)).items():
        place = tmp_path / name.replace(" ", "-")
        found[name] = check_damage(kind, reference, place / "run", how)
        shutil.rmtree(place)
    print(kind, json.dumps(found))
