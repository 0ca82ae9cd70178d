from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from prism_jax.data import workdir
from prism_jax.errors import UserError


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file.json"
    workdir.write_json(path, {"a": 1})

    def die(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(path)), "replace", die)
    with pytest.raises(KeyboardInterrupt):
        workdir.write_json(path, {"a": 2})
    assert workdir.read_json(path) == {"a": 1}
    assert names(path.parent) == ["file.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe{}", b'{"a": }'])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record\.json is damaged .* move it away and run"):
        workdir.read_json(path)


def test_a_record_notices_every_flipped_bit(tmp_path):
    path = tmp_path / "record.json"
    fields = {"top1": 0.9375, "name": "é", "steps": (1, 2), "none": None}
    workdir.write_record(path, fields)
    assert workdir.read_record(path) == {**fields, "steps": [1, 2]}

    whole, unnoticed_by_json = path.read_bytes(), 0
    for at in range(len(whole)):
        for bit in (0, 3):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            try:
                json.loads(path.read_bytes())
                unnoticed_by_json += 1
            except ValueError:
                pass
            try:  # a flip in the white space between values changes nothing
                assert workdir.read_record(path) == {**fields, "steps": [1, 2]}
            except UserError as error:
                assert "is damaged" in str(error)
    assert unnoticed_by_json > 20  # the twin without a checksum reads other values


def test_to_json_refuses_nan():
    with pytest.raises(ValueError):
        workdir.to_json({"loss": float("nan")})


def test_differences_name_the_dotted_keys():
    found = {"recover": {"ipc": 1, "betas": [0.5, 0.9], "old": 1}, "seed": 0, "empty": {}}
    wanted = {"recover": {"ipc": 2, "betas": (0.5, 0.9), "new": None}, "seed": 0, "empty": {}}
    assert workdir.differences(found, wanted) == [
        "recover.ipc: 1 -> 2",
        "recover.new: (absent) -> null",
        "recover.old: 1 -> (absent)",
    ]
    assert workdir.differences(found, found) == []


def test_digest_is_of_values_not_of_their_order():
    assert workdir.digest({"a": 1, "b": (2, 3)}) == workdir.digest({"b": [2, 3], "a": 1})
    assert workdir.digest({"a": 1}) != workdir.digest({"a": 1.5})


def test_copies_are_no_links_and_leave_out_half_written_files(tmp_path):
    source, target = epath.Path(tmp_path / "source"), epath.Path(tmp_path / "new" / "target")
    workdir.write_bytes(source / "deep" / "file", b"content")
    (tmp_path / "source" / ".file.0a.tmp").write_bytes(b"half")
    workdir.copy_tree(source, target)
    assert names(tmp_path / "new") == ["target"]
    assert names(tmp_path / "new" / "target") == ["deep"]
    ours, theirs = (os.stat(p / "deep" / "file") for p in (source, target))
    assert ours.st_ino != theirs.st_ino and ours.st_nlink == 1
    (source / "deep" / "file").write_bytes(b"other")
    assert (target / "deep" / "file").read_bytes() == b"content"


def test_set_aside_and_remove(tmp_path):
    for content in (b"1", b"2"):
        workdir.write_bytes(tmp_path / "file", content)
        workdir.set_aside(tmp_path / "file")
    assert names(tmp_path) == ["file.set-aside-1", "file.set-aside-2"]
    workdir.write_bytes(tmp_path / "folder" / "deep" / "file", b"")
    workdir.remove(tmp_path / "folder")
    assert names(tmp_path) == ["file.set-aside-1", "file.set-aside-2"]


def test_a_folder_that_is_removed_vanishes_at_once(tmp_path, monkeypatch):
    """Deleted file by file, a folder killed halfway would pass for another's finished work."""
    workdir.write_bytes(tmp_path / "folder" / "shard", b"")

    def die(self, *arguments, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        workdir.remove(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_what_a_link_leads_to_is_deleted_and_the_link_stays(tmp_path):
    """As of a stage on a larger disk; a link inside is a name, and what it leads to another's."""
    for name in ("large/deep/shard", "large/fingerprint.json", "others/image"):
        workdir.write_bytes(tmp_path / name, b"")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "relabel").symlink_to(tmp_path / "large")
    (tmp_path / "large" / "real").symlink_to(tmp_path / "others")
    workdir.remove(tmp_path / "run" / "relabel")
    assert names(tmp_path / "run") == ["relabel"] and names(tmp_path / "large") == []
    assert names(tmp_path / "others") == ["image"]
    workdir.write_fingerprint(epath.Path(tmp_path / "run" / "relabel"), {})
    assert names(tmp_path / "large") == ["fingerprint.json"]


def test_a_sweep_follows_no_link(tmp_path):
    workdir.write_bytes(tmp_path / "others" / ".half.12ab.tmp", b"")
    (tmp_path / "run" / "deep").mkdir(parents=True)
    for name in ("relabel", ".relabel.12ab.tmp", "deep/.gone.12ab.tmp"):
        (tmp_path / "run" / name).symlink_to(tmp_path / ("nowhere" if "gone" in name else "others"))
    workdir.sweep(tmp_path / "run")
    assert names(tmp_path / "run") == ["deep", "relabel"] and names(tmp_path / "run" / "deep") == []
    assert names(tmp_path / "others") == [".half.12ab.tmp"]


# --- the lock -------------------------------------------------------------------------------


@pytest.fixture
def sleeper():
    """Another living process."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def hold(root, pid, host=None, silent=0.0, **more):
    root.mkdir(exist_ok=True)
    host = host or socket.gethostname()
    holder = {"host": host, "pid": pid, "alive": time.time() - silent, **more}
    (root / ".lock").write_text(json.dumps(holder))


def test_the_lock_is_given_back(tmp_path):
    lock = workdir.Lock(epath.Path(tmp_path / "run"))
    lock.release()  # harmless
    assert not (tmp_path / "run").exists()  # and nothing is written before it is needed
    lock.acquire()
    lock.acquire()
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert names(tmp_path / "run") == []


def test_a_lock_of_a_living_process_is_respected(tmp_path, sleeper):
    hold(tmp_path, sleeper.pid)
    with pytest.raises(UserError, match=f"in use by process {sleeper.pid} on "):
        workdir.Lock(epath.Path(tmp_path)).acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == sleeper.pid


ELSEWHERE = {
    "another host": {"host": "elsewhere"},
    "another container with this host's name": {"numbering": "another"},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_a_lock_of_another_host_is_respected(tmp_path, monkeypatch, capsys, where):
    """It is watched: the next sign of life is that of a run that lives, whatever the clocks say."""
    hold(tmp_path, os.getpid(), **ELSEWHERE[where])
    again = [lambda: hold(tmp_path, os.getpid(), silent=-1.0, **ELSEWHERE[where]), lambda: None]
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: again.pop()())
    with pytest.raises(UserError, match=rf"process {os.getpid()} on .*delete .*\.lock"):
        workdir.Lock(epath.Path(tmp_path)).acquire()
    assert again == [] and "waiting for another" in capsys.readouterr().out


@pytest.mark.parametrize("silent", [590, 700])
def test_a_host_that_is_silent_for_ten_minutes_has_lost_its_lock(tmp_path, monkeypatch, silent):
    """What lacks to ten minutes is waited for: a job that starts elsewhere goes on by itself."""
    hold(tmp_path, 1, host="elsewhere", silent=silent)
    now, waited = time.time(), []
    monkeypatch.setattr(workdir.time, "time", lambda: now + 0.5 + sum(waited))
    monkeypatch.setattr(workdir.time, "sleep", waited.append)
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()
    assert sum(waited) == (10 if silent < 600 else 0)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()


def test_a_holder_that_gives_the_lock_back_is_followed(tmp_path, monkeypatch):
    hold(tmp_path, 1, host="elsewhere")
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: (tmp_path / ".lock").unlink())
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()
    assert lock.held
    lock.release()


def test_who_waits_for_a_lock_can_be_stopped(tmp_path, monkeypatch):
    hold(tmp_path, 1, host="elsewhere")
    monkeypatch.setattr(workdir.time, "sleep", lambda seconds: pytest.fail("it slept"))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workdir.Lock(epath.Path(tmp_path), stop).acquire()


def test_an_outage_ends_no_sign_of_life(tmp_path, monkeypatch):
    """Libraries of buckets have errors of their own, which are no OSError."""
    monkeypatch.setattr(workdir.Lock, "BEAT", 0.02)
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()
    before, write, outages = (tmp_path / ".lock").read_text(), workdir.write_record, []

    def broken(path, record):
        if len(outages) < 3:
            outages.append(path)
            raise RuntimeError("server disconnected")
        write(path, record)

    monkeypatch.setattr(workdir, "write_record", broken)
    deadline = time.monotonic() + 10
    while (tmp_path / ".lock").read_text() == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(outages) == 3
    lock.release()


def test_a_held_lock_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir.Lock, "BEAT", 0.05)
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()

    def alive():
        return json.loads((tmp_path / ".lock").read_text())["alive"]

    first, deadline = alive(), time.monotonic() + 10
    while alive() == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / ".lock").unlink()  # by mistake: it is written again
    while not (tmp_path / ".lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    time.sleep(0.2)
    assert names(tmp_path) == []


def test_a_run_whose_lock_was_taken_over_ends_at_once(tmp_path):
    script = (
        "import sys, time; from etils import epath; from prism_jax.data import workdir\n"
        "workdir.Lock.BEAT = 0.1; lock = workdir.Lock(epath.Path(sys.argv[1])); lock.acquire()\n"
        "print('got', flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "got\n"
            hold(tmp_path, 1, host="elsewhere")
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()


def test_a_dead_lock_is_taken_over_and_what_it_left_is_swept(tmp_path, sleeper):
    sleeper.kill()
    sleeper.wait()
    hold(tmp_path, sleeper.pid)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".00000.png.12ab.tmp").write_bytes(b"half")
    (tmp_path / "deep" / ".kept").write_bytes(b"")
    (tmp_path / ".squeeze.12ab.tmp" / "inside").mkdir(parents=True)
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path) == [".lock", "deep"] and names(tmp_path / "deep") == [".kept"]
    lock.release()


@pytest.mark.parametrize("at", ["judgement", "removal"])
def test_a_lock_that_another_run_took_over_meanwhile_is_respected(
    tmp_path, monkeypatch, sleeper, at
):
    """Two that find the same dead lock: the slower one held up while the faster takes it over."""
    hold(tmp_path, 2**22 + 1)  # no process has such a number
    judge, rename = workdir.Lock._is_gone, os.rename

    def taken_over():
        if json.loads((tmp_path / ".lock").read_text())["pid"] != sleeper.pid:
            hold(tmp_path, sleeper.pid, token="the faster one's")
            (tmp_path / ".half.12ab.tmp").write_bytes(b"the faster one writes")

    def judged(holder):
        gone = judge(holder)
        if at == "judgement":
            taken_over()
        return gone

    def renamed(source, target):
        if at == "removal":
            taken_over()
        rename(source, target)

    monkeypatch.setattr(workdir.Lock, "_is_gone", staticmethod(judged))
    monkeypatch.setattr(os, "rename", renamed)
    lock = workdir.Lock(epath.Path(tmp_path))
    with pytest.raises(UserError, match=f"in use by process {sleeper.pid} on "):
        lock.acquire()
    assert not lock.held
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "the faster one's"
    assert names(tmp_path) == [".half.12ab.tmp", ".lock"]


@pytest.mark.parametrize("code", ["ENOTSUP", "ENOSYS", "EPERM"])
def test_a_file_system_without_links_has_locks(tmp_path, monkeypatch, sleeper, code):
    """As buckets and shares are mounted: gcsfuse, Drive, CIFS."""
    asked = []

    def refuse(source, target):
        asked.append(target)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "link", refuse)
    hold(tmp_path, 2**22 + 1)
    lock, other = (workdir.Lock(epath.Path(tmp_path)) for _ in range(2))
    lock.acquire()
    assert workdir.read_record(tmp_path / ".lock")["pid"] == os.getpid() and asked
    assert not other._create()  # of two at once the second makes none
    lock.release()
    assert names(tmp_path) == []
    hold(tmp_path, sleeper.pid)
    with pytest.raises(UserError, match=f"in use by process {sleeper.pid} on "):
        other.acquire()
    assert names(tmp_path) == [".lock"]


def test_only_ones_own_lock_is_given_back(tmp_path, sleeper):
    lock = workdir.Lock(epath.Path(tmp_path))
    lock.acquire()
    hold(tmp_path, sleeper.pid)  # this machine slept
    lock.release()
    assert not lock.held
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == sleeper.pid


def test_of_many_processes_one_gets_the_lock(tmp_path):
    code = (
        "import sys, time; from etils import epath; from prism_jax.data import workdir\n"
        "lock = workdir.Lock(epath.Path(sys.argv[1])); print('ready', flush=True); input()\n"
        "try: lock.acquire(); print('got', flush=True); time.sleep(600)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
    )
    root = os.path.dirname(os.path.dirname(workdir.__file__))
    env = {**os.environ, "PYTHONPATH": os.path.dirname(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        assert [p.stdout.readline() for p in processes] == ["ready\n"] * 3
        for p in processes:
            p.stdin.write("\n")
            p.stdin.flush()
        said = sorted(p.stdout.readline() for p in processes)
    finally:
        for p in processes:
            p.kill()
            p.communicate()
    assert said == ["UserError\n", "UserError\n", "got\n"]
