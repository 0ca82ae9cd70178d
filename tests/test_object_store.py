"""A run on an object store: whole uploads, no renames, no folders; the same results as on a disk.

The store is a stand-in that refuses what a bucket cannot do (``helpers/object_store.py``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath
from etils.epath import gpath
from helpers.command import TINY, assert_same, call, finished, reference, results, run
from helpers.object_store import Unsupported, download, mount

from prism_jax.data import metrics, workdir
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.errors import UserError
from prism_jax.main import main

__all__ = ["finished", "reference"]  # fixtures

ROOT = "gs://bucket/runs/größe 1"
NAME = ROOT.removeprefix("gs://")


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", None)  # put back after the test
    monkeypatch.setattr(workdir.Lock, "SETTLE", 0.01)
    return mount(tmp_path / "store")


def put_tree(root, prefix: str = ROOT) -> None:
    """Upload a folder."""
    for path in root.rglob("*"):
        if path.is_file():
            epath.Path(f"{prefix}/{path.relative_to(root)}").write_bytes(path.read_bytes())


def test_the_stand_in_has_no_more_than_a_bucket_has(store):
    path = epath.Path("gs://bucket/a/b")
    with pytest.raises(Unsupported, match="rename"):
        path.write_bytes(b"1")
        path.rename("gs://bucket/c")
    with pytest.raises(Unsupported, match="append"):
        path.open("a")
    with pytest.raises(RuntimeError, match="broken off"):
        with path.open("wb") as file:
            file.write(b"half")
            assert path.read_bytes() == b"1"  # not visible before it is closed
            raise RuntimeError("broken off")
    assert path.read_bytes() == b"1" and path.parent.is_dir() and not path.is_dir()
    assert [p.name for p in path.parent.iterdir()] == ["b"]
    path.unlink()
    assert not path.parent.exists()  # there was never a folder


def test_the_tiny_experiment_from_beginning_to_end(store, tmp_path, reference):
    status, out, err = call(TINY, f"--workdir={ROOT}")
    assert status == 0, err
    assert f"{ROOT}/report.html" in out
    here = download(tmp_path / "store", NAME, tmp_path / "here")
    ours, theirs = results(here), results(reference)
    assert ours.keys() == theirs.keys() and {k for k in ours if ours[k] != theirs[k]} == set()
    left = {p.name for p in here.rglob("*") if p.name.endswith(".tmp") or p.name == ".lock"}
    assert left == set()
    # A finished run is only read.
    before = dict(store.calls)
    assert call(TINY, f"--workdir={ROOT}")[0] == 0
    assert {k: store.calls[k] for k in before if "w" in k or k == "remove"} == {
        k: n for k, n in before.items() if "w" in k or k == "remove"
    }


@pytest.mark.slow
def test_a_run_adopts_goes_on_and_makes_again(store, tmp_path, reference):
    """From a disk to a store, from a store to a store; a part redone, labels of other settings."""
    status, out, err = call(TINY, f"--workdir={ROOT}", f"--from={reference}")
    assert status == 0 and "adopted recover from" in out and "recover: " not in out, err
    other = "gs://bucket/other"
    change = "--config.relabel.crop_min=0.5"
    status, out, err = call(TINY, f"--workdir={other}", f"--from={ROOT}", change)
    assert status == 0 and "adopted recover from" in out and "relabel synthetic: 6/6" in out, err
    status, out, err = call(TINY, f"--workdir={other}")
    assert status == 0 and "was made from other settings; it is made again" in out, err
    here = download(tmp_path / "store", "bucket/other", tmp_path / "here")
    ours, theirs = results(here), results(reference)
    assert {k for k in theirs if ours.get(k) != theirs[k]} == set()


def test_damage_is_set_aside_there_too(store, tmp_path, reference):
    put_tree(reference)
    for name in ("relabel/labels-00000.array_record", "recover/images/00002/00001.png"):
        path = epath.Path(f"{ROOT}/{name}")
        path.write_bytes(path.read_bytes()[:50])
    epath.Path(f"{ROOT}/validate/outside/0").rmtree()
    said = ""
    for _ in range(3):
        status, out, err = call(TINY, f"--workdir={ROOT}")
        said += err
        if status == 0:
            break
    assert status == 0 and "00001.png is damaged" in said, said
    assert "labels-00000.array_record is damaged" in said
    here = download(tmp_path / "store", NAME, tmp_path / "here")
    asides = [p for p in here.rglob("*.set-aside-1")]
    assert len(asides) == 2
    for path in asides:
        path.unlink()
    assert_same(here, reference)


def test_the_lock_is_an_object_with_host_process_and_sign_of_life(store, monkeypatch):
    lock = workdir.Lock(epath.Path(ROOT))
    lock.acquire()
    found = json.loads(epath.Path(f"{ROOT}/.lock").read_bytes())
    assert set(found) == {"host", "pid", "numbering", "token", "alive", "checksum"}
    lock.release()
    assert not epath.Path(ROOT).exists()
    for silent, gone in ((0, False), (700, True)):
        holder = {"host": "elsewhere", "pid": 7, "alive": time.time() - silent}
        workdir.write_record(f"{ROOT}/.lock", holder)
        other = workdir.Lock(epath.Path(ROOT))
        if gone:
            other.acquire()
            other.release()
            continue
        signs = iter([{**holder, "alive": 1e12}])
        with monkeypatch.context() as patched:
            patched.setattr(
                workdir.time, "sleep",
                lambda seconds, s=signs: workdir.write_record(f"{ROOT}/.lock", next(s)),
            )  # fmt: skip
            with pytest.raises(UserError, match="process 7 on elsewhere"):
                other.acquire()


def test_of_two_that_take_the_lock_at_once_the_last_has_it(store, monkeypatch):
    """Another run's upload comes between ours and the question who holds it."""
    lock = workdir.Lock(epath.Path(ROOT))

    def another(seconds):
        theirs = {"host": "elsewhere", "pid": 7, "alive": time.time()}
        workdir.write_record(f"{ROOT}/.lock", theirs)

    monkeypatch.setattr(workdir.time, "sleep", another)
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        lock.acquire()
    assert not lock.held


def test_lines_of_metrics_are_uploaded_together_and_before_a_checkpoint(store):
    path = epath.Path(f"{ROOT}/metrics.jsonl")
    with metrics.MetricsWriter(path) as writer:
        writer.write(0, loss=1.0)
        for step in range(1, 50):
            writer.write(step, loss=1.0)
        assert len(metrics.read_lines(path)) == 1
        writer.flush()
        assert len(metrics.read_lines(path)) == 50
        writer.write(50, loss=1.0)
    assert [line["step"] for line in metrics.read_lines(path)] == list(range(51))
    assert store.calls["open wb"] == 3
    with metrics.MetricsWriter(path) as writer:  # a resumed run goes on with the same file
        writer.write(51, loss=1.0)
    assert len(metrics.read_lines(path)) == 52


def test_checkpoints_are_where_they_should_be_and_a_damaged_one_is_set_aside(store, tmp_path):
    """The twin: made absolute, a path of a store is a folder on this disk."""
    assert workdir.absolute(ROOT) == epath.Path(ROOT)
    assert not workdir.is_store(epath.Path(ROOT).absolute())
    state = {"images": np.arange(6, dtype=np.float32)}
    for step in (3, 6, 9):
        checkpoints = Checkpoints(f"{ROOT}/unit")
        checkpoints.save(step, state)
        checkpoints.close()
    (newest,) = (p for p in (tmp_path / "store").iterdir() if "9%2Fdefault%2Fstate" in p.name)
    newest.write_bytes(newest.read_bytes()[:50])
    checkpoints = Checkpoints(f"{ROOT}/unit")
    assert checkpoints.restore(state)[0] == 6
    assert (epath.Path(f"{ROOT}/unit") / "9.set-aside-1").exists()
    checkpoints.delete()
    assert not epath.Path(ROOT).exists()


def test_a_shard_is_copied_once(store):
    path = epath.Path(f"{ROOT}/shard")
    path.write_bytes(b"content")
    copies = {workdir.local(path) for _ in range(3)}
    assert len(copies) == 1 and copies.pop().read_bytes() == b"content"
    assert store.calls["open rb"] == 1
    assert workdir.local(__file__) == epath.Path(__file__)  # what is local is not copied
    workdir.write_bytes(path, b"changed")  # as long, and as old as the clock can tell
    assert workdir.local(path).read_bytes() == b"changed"


def test_a_folder_that_is_copied_counts_only_when_all_of_it_is_there(store, tmp_path, monkeypatch):
    for name in ("a", workdir.FINGERPRINT, "z"):
        workdir.write_bytes(tmp_path / "from" / name, b"{}")
    order = []
    put = store.put
    monkeypatch.setattr(store, "put", lambda name, data: (order.append(name), put(name, data)))
    target = epath.Path(f"{ROOT}/to")
    workdir.copy_tree(epath.Path(tmp_path / "from"), target)
    assert order[-1].endswith(workdir.FINGERPRINT) and len(order) == 3
    assert workdir.begun(target)
    removed = []
    remove = store.remove
    monkeypatch.setattr(store, "remove", lambda name: (removed.append(str(name)), remove(name)))
    workdir.remove(target)
    assert removed[0].endswith(workdir.FINGERPRINT) and not target.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("event", "number"),
    [("during an asynchronous save", 2), ("in a chunk", 9), ("before a record", 12),
     ("in a training step", 20), ("between shards", 2)],
)  # fmt: skip
def test_killed_on_a_store_it_continues(tmp_path, reference, event, number):
    often = ("--config.recover.checkpoint_seconds=0.001",)
    command = ("tests/helpers/object_store.py", str(tmp_path / "store"))
    killed = run(event, str(number), TINY, f"--workdir={ROOT}", *often, command=command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(event, "1000000", TINY, f"--workdir={ROOT}", *often, command=command)
    assert done.returncode == 0, done.stderr
    here = download(tmp_path / "store", NAME, tmp_path / "here")
    assert results(here) == results(reference)
    shutil.rmtree(here)


def test_what_others_write_to_a_bucket_is_seen():
    """fsspec, by which gs:// is read, keeps listings for ever unless it is told not to."""
    script = (
        "from prism_jax import environment; {}\n"
        "from fsspec.spec import AbstractFileSystem\n"
        "class Bucket(AbstractFileSystem): protocol = 'gs', 'gcs'\n"
        "bucket = Bucket(); bucket.dircache['gs://b/recover'] = ['g00000']\n"
        "print('gs://b/recover' in bucket.dircache)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FSSPEC")}
    for prepared, kept in (("environment.prepare_environment({}, [])", False), ("", True)):
        done = subprocess.run(
            [sys.executable, "-c", script.format(prepared)],
            env=plain, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout.split() == [str(kept)], done.stderr


def test_a_bucket_without_its_library_is_one_message(capsys, monkeypatch):
    there = type(epath.Path(ROOT)).exists

    def missing(self):
        if "://" in str(self):
            raise ImportError("Please install gcsfs to access Google Storage")
        return there(self)

    monkeypatch.setattr(type(epath.Path(ROOT)), "exists", missing)
    assert main([TINY, f"--workdir={ROOT}"]) == 2
    assert "pip install 'prism-jax[gcs]'" in capsys.readouterr().err
    assert main([TINY, "--workdir=runs/none", f"--from={ROOT}"]) == 2
    assert f"--from={ROOT} is in a bucket" in capsys.readouterr().err
    assert main([TINY, "--workdir=s3://bucket/run"]) == 2
    assert "name a bucket at gs://" in capsys.readouterr().err
