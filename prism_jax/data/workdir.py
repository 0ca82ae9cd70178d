"""The working directory: the only door to a run's files.

Everything is written whole, so that *present means done*: in a file system under a temporary
name and then renamed, in an object store (gs://) as one upload. An object store has no rename and
no folders; what is renamed here as a whole is there copied so that ``fingerprint.json``, without
which nothing in a folder counts, comes last, and deleted so that it goes first. Paths are
``etils.epath`` paths; nothing outside this module knows how a file becomes visible.

    <workdir>/config.json                    what ran
    <workdir>/squeeze/<teacher>/             weights.safetensors record.json fingerprint.json
    <workdir>/recover/                       images/ units/ checkpoints/ manifest.json
    <workdir>/relabel/                       label shards and their manifest
    <workdir>/validate/<student>/<seed>/     checkpoints/ metrics.jsonl record.json
    <workdir>/controls/<name>/               images/ relabel/ validate/, same layout
    <workdir>/analyse/                       figures and diversity.json
"""

from __future__ import annotations

import atexit
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from prism_jax import progress
from prism_jax.errors import UserError

FINGERPRINT = "fingerprint.json"
SUMMARY = "summary.json"
CHECKSUM = "checksum"


def is_store(path: epath.PathLike) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The full path. Of gs:// it is the path itself, which ``epath`` would put in this folder."""
    path = epath.Path(path)
    return path if is_store(path) else path.absolute()


def write_bytes(path: epath.PathLike, data: bytes) -> None:
    """Write a file whole: readers see the old content or the new one, never a part."""
    path = epath.Path(path)
    if is_store(path):
        with naming(path):
            path.write_bytes(data)
        _forget(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with naming(path):
            temporary.write_bytes(data)
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: epath.PathLike) -> Iterator[None]:
    """Name the file in the error of a write that did not fit, which says no name itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(path)
        raise


def to_json(value: Any) -> str:
    """Serialise a JSON value the way every file of a workdir is: indented, no NaN."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def write_json(path: epath.PathLike, value: Any) -> None:
    """Write a JSON value whole."""
    write_bytes(path, to_json(value).encode())


def read_json(path: epath.PathLike) -> Any:
    """Read a JSON file, without its checksum where it has one.

    Raises:
      UserError: the file is not JSON, or its checksum is not that of its content; it is named,
        and never taken for data.
    """
    value = _parse(epath.Path(path))
    if isinstance(value, dict) and CHECKSUM in value:
        return read_record(path)
    return value


def _parse(path: epath.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); move it away and run the same command again to redo it."
        ) from error


def write_record(path: epath.PathLike, fields: dict[str, Any]) -> None:
    """Write JSON that carries its own checksum: what makes work done, and all that is read back."""
    write_json(path, with_checksum(fields))


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields and the digest of them."""
    return {**fields, CHECKSUM: digest(fields)}


def read_record(path: epath.PathLike) -> dict[str, Any]:
    """Read a record, without its checksum.

    Raises:
      UserError: the file is not what was written; it is named, and never taken for data.
    """
    fields = _parse(epath.Path(path))
    checksum = fields.pop(CHECKSUM, None) if isinstance(fields, dict) else None
    if checksum is None or checksum != digest(fields):
        raise UserError(
            f"{path} is damaged (its checksum is not that of its content); move it away and run "
            f"the same command again to redo it."
        )
    return fields


def read_run(root: epath.PathLike) -> dict[str, Any]:
    """What ran in a working directory: its config.json, {"experiment", "provenance"}.

    Raises:
      UserError: the folder is none.
    """
    path = epath.Path(root) / "config.json"
    found = read_json(path) if path.exists() else None
    if not isinstance(found, dict) or not {"experiment", "provenance"} <= found.keys():
        lacks = "no config.json" if found is None else "its config.json is of something else"
        raise UserError(f"{root} is no working directory of a run ({lacks})")
    return found


def remove(folder: epath.PathLike) -> None:
    """Delete a folder: it vanishes at once, so that no part of it is taken for the whole.

    A link to a folder stays and leads to an empty one: what is made again lies behind it, on the
    larger disk where somebody wants it.
    """
    folder = epath.Path(folder)
    if is_store(folder):
        (folder / FINGERPRINT).unlink(missing_ok=True)
        folder.rmtree()
        return
    if os.path.islink(folder):
        (folder / FINGERPRINT).unlink(missing_ok=True)
        for path in map(folder.joinpath, os.listdir(folder)):
            path.unlink() if os.path.islink(path) or not path.is_dir() else path.rmtree()
        return
    doomed = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    folder.rename(doomed)
    doomed.rmtree()


def size(path: epath.PathLike) -> int:
    """Bytes of a file. ``epath`` asks for its owner's name too, which a container may not know."""
    return epath.Path(path).stat().length if is_store(path) else os.stat(path).st_size


def set_aside(path: epath.PathLike) -> epath.Path:
    """Rename a damaged or outdated file or folder so that nothing reads it again."""
    path = epath.Path(path)
    count = 1
    while (target := path.parent / f"{path.name}.set-aside-{count}").exists():
        count += 1
    if not is_store(path):
        path.rename(target)
    elif path.is_dir():
        copy_tree(path, target)
        remove(path)
    else:
        path.copy(target)
        path.unlink()
    return target


def names(folder: epath.Path) -> set[str]:
    """What is in a folder, asked for once: a question for every file takes long over a network."""
    try:
        return {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return set()


def matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """A folder's files of a kind, by name. ``glob`` would take signs of the folder's own path."""
    return [folder / name for name in sorted(names(folder)) if fnmatch.fnmatchcase(name, pattern)]


def begun(folder: epath.Path) -> bool:
    """Whether there is a folder that a run may go on with."""
    return ((folder / FINGERPRINT) if is_store(folder) else folder).exists()


def copy_tree(source: epath.Path, target: epath.Path) -> None:
    """Copy a folder so that it appears whole under its final name."""
    if is_store(target):
        _copy(source, target, leave=FINGERPRINT)
        if (source / FINGERPRINT).exists():
            _copy(source / FINGERPRINT, target / FINGERPRINT)
        return
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    _copy(source, temporary)
    temporary.rename(target)


def _copy(source: epath.Path, target: epath.Path, leave: str | None = None) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            if not child.name.startswith(".") and child.name != leave:
                _copy(child, target / child.name)
    elif is_store(source) == is_store(target):
        source.copy(target)
    else:
        target.write_bytes(source.read_bytes())


@functools.cache
def _downloads() -> tuple[epath.Path, threading.Lock]:
    folder = tempfile.mkdtemp(prefix="prism_jax-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return epath.Path(folder), threading.Lock()


def local(path: epath.PathLike) -> epath.Path:
    """A file under a name that any library can open: of an object store, a copy for this process.

    The copy is made once for each time that the object is written.
    """
    path = epath.Path(path)
    if not is_store(path):
        return path
    folder, lock = _downloads()
    found = path.stat()
    copy = folder / f"{digest(os.fspath(path))}-{digest([found.length, found.mtime])}"
    with lock:
        if not copy.exists():
            write_bytes(copy, path.read_bytes())
    return copy


def _forget(path: epath.Path) -> None:
    """Remove the copies of an object that was written anew; whoever has one open keeps it."""
    if not _downloads.cache_info().currsize:
        return
    folder, lock = _downloads()
    with lock:
        for copy in matching(folder, f"{digest(os.fspath(path))}-*"):
            copy.unlink()


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a JSON value."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level of dotted keys."""
    flat = {}
    for key, value in fields.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def write_fingerprint(folder: epath.Path, fields: dict[str, Any]) -> None:
    """Record what a stage folder was made from."""
    write_record(folder / FINGERPRINT, fields)


def read_fingerprint(folder: epath.Path) -> dict[str, Any] | None:
    """What a stage folder was made from, or None where nothing was begun."""
    path = epath.Path(folder) / FINGERPRINT
    return read_json(path) if path.exists() else None


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The dotted keys in which two fingerprints differ, as "key: found -> wanted" lines."""
    found, wanted = flatten(found), flatten(json.loads(json.dumps(wanted)))
    missing = object()
    lines = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key, missing), wanted.get(key, missing)
        if old != new:
            old = "(absent)" if old is missing else json.dumps(old)
            new = "(absent)" if new is missing else json.dumps(new)
            lines.append(f"{key}: {old} -> {new}")
    return lines


def fits(folder: epath.Path, fields: dict[str, Any]) -> bool:
    """Whether what a folder holds was made from these fields."""
    found = read_fingerprint(folder)
    return found is not None and not differences(found, fields)


def offers(theirs: epath.Path, ours: epath.Path, fields: dict[str, Any], done: str) -> bool:
    """Whether a folder elsewhere is finished and was made from these fields, and here is none."""
    return not begun(ours) and (theirs / done).exists() and fits(theirs, fields)


def sweep(root: epath.PathLike) -> None:
    """Delete the half-written files and folders that a killed run left behind.

    What a link leads to is left alone: it may be another's.
    """
    if is_store(root):
        return
    for path in epath.Path(root).iterdir():
        left_behind = path.name.startswith(".") and path.name.endswith(".tmp")
        if path.is_dir() and not os.path.islink(path):
            path.rmtree() if left_behind else sweep(path)
        elif left_behind:
            path.unlink(missing_ok=True)


class Lock:
    """At most one run writes a workdir: a file that names the host and process that does.

    While it is held, a thread writes a sign of life into it every ``BEAT`` seconds. A lock is
    taken over when its process is known to be gone (same host), or when there has been no sign
    of life for ``SILENCE`` seconds (another host or container, whose processes cannot be seen):
    that is waited for, so that a job that starts again elsewhere goes on by itself.
    """

    BEAT = 30.0
    SILENCE = 600.0
    SETTLE = 2.0
    LOOK = 5.0

    def __init__(self, root: epath.Path, check: Callable[[], None] = lambda: None):
        """``check`` raises where whoever waits for the lock is to stop."""
        self._path, self._check = epath.Path(root) / ".lock", check
        self._beating: threading.Thread | None = None
        self._released = threading.Event()

    @property
    def held(self) -> bool:
        return self._beating is not None

    @property
    def token(self) -> str:
        """What tells this process' lock from any other."""
        return _TOKEN

    def is_of(self, token: str) -> bool:
        """Whether the lock that is there is that of the process with a token."""
        return (self._holder() or {}).get("token") == token

    def acquire(self) -> None:
        """Take the lock, or take over one whose process is gone and tidy up after it.

        Raises:
          UserError: another living process holds it.
        """
        taken_over = False
        while not self.held:
            holder = self._holder()
            if holder is None:
                if self._create():
                    self._released.clear()
                    self._beating = threading.Thread(target=self._beat, daemon=True)
                    self._beating.start()
                continue
            if not self._is_gone(holder) and (_near(holder) or self._lives(holder)):
                raise UserError(
                    f"{self._path.parent} is in use by process {holder['pid']} on "
                    f"{holder['host']}, whose last sign of life is {_age(holder):.0f} s old. Wait "
                    f"for it (a process that is gone is known by its silence after "
                    f"{self.SILENCE / 60:.0f} minutes), use another --workdir, or, if you know "
                    f"that it is gone, delete {self._path}."
                )
            taken_over |= self._take_away(holder)
        if taken_over:  # not before it is held: another run may write there by now
            sweep(self._path.parent)

    def _take_away(self, holder: dict[str, Any]) -> bool:
        """Remove the lock of a holder that is gone; returns whether it was still that one's.

        Another run may have taken it over since: a lock is looked at when nobody else can remove
        it any more, and put back where it is another's.
        """
        if self._holder() != holder:
            return False
        if is_store(self._path):  # it has no rename
            self._path.unlink(missing_ok=True)
            return True
        away = self._path.parent / f".lock.{secrets.token_hex(4)}.away"  # which no sweep deletes
        try:
            os.rename(self._path, away)
        except FileNotFoundError:
            return False
        try:
            if (same := read_json(away)) != holder:
                self._place(away.read_bytes())
            return same == holder
        finally:
            away.unlink()

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Watch a holder that cannot be seen until it shows life, or is silent for long."""
        progress.say(
            f"{self._path.parent} is held by process {holder['pid']} on {holder['host']}, whose "
            f"last sign of life is {_age(holder):.0f} s old: waiting for another, or for "
            f"{self.SILENCE / 60:.0f} minutes without one"
        )
        while not self._is_gone(holder):
            self._check()
            time.sleep(self.LOOK)
            if (now := self._holder()) != holder:
                return now is not None
        return False

    def _create(self) -> bool:
        """Make the file, whole and only if there is none; returns whether there was none."""
        if is_store(self._path):  # it has no links: of several who write, the last one holds it
            if self._path.exists():
                return False
            write_record(self._path, _me())
            time.sleep(self.SETTLE)
            return _is_me(self._holder() or {})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._place(to_json(with_checksum(_me())).encode())

    def _place(self, data: bytes) -> bool:
        """Write the file, whole and only if there is none; returns whether there was none."""
        temporary = self._path.parent / f".lock.{secrets.token_hex(4)}.tmp"
        temporary.write_bytes(data)
        try:
            os.link(temporary, self._path)
        except (FileExistsError, FileNotFoundError):  # the latter: swept by the one that is faster
            return False
        except OSError:  # a file system without links, as buckets and shares are mounted
            return self._place_at_once(data)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _place_at_once(self, data: bytes) -> bool:
        """The same where a file cannot have two names: for a moment it is there and empty."""
        try:
            file = open(self._path, "xb", buffering=0)
        except FileExistsError:
            return False
        with file:
            file.write(data)
        return True

    def _beat(self) -> None:
        while not self._released.wait(self.BEAT):
            try:
                holder = self._holder()
                if holder is not None and not _is_me(holder):
                    # This machine slept, and another run took over: save nothing over its work.
                    print(f"error: {self._path} was taken over by another run", file=sys.stderr)
                    os.kill(os.getpid(), signal.SIGKILL)
                write_record(self._path, _me())
            except Exception:  # a full disk, a network's pause, of which each library has its own
                continue  # the next beat may pass

    def _holder(self) -> dict[str, Any] | None:
        try:
            return read_json(self._path)
        except FileNotFoundError:
            return None

    def release(self) -> None:
        """Give the lock back; harmless when it is not held, or was taken over."""
        if self._beating is not None:
            self._released.set()
            self._beating.join()  # its last write comes before the removal
            self._beating = None
            with contextlib.suppress(UserError):  # what cannot be read is not known to be ours
                if _is_me(self._holder() or {}):
                    self._path.unlink(missing_ok=True)

    @classmethod
    def _is_gone(cls, holder: dict[str, Any]) -> bool:
        if not _near(holder):
            return _age(holder) > cls.SILENCE
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return holder["pid"] == os.getpid()


_TOKEN = secrets.token_hex(8)  # of this process: another container may have the same numbers


@functools.cache
def _numbering() -> str:
    """What tells whose process numbers are ours: this start of the system and its namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "numbering": _numbering(),
        "token": _TOKEN,
        "alive": time.time(),
    }


def _near(holder: dict[str, Any]) -> bool:
    """Whether a holder's process number is one of this machine's and container's."""
    return (holder.get("host"), holder.get("numbering", _numbering())) == (
        socket.gethostname(),
        _numbering(),
    )


def _is_me(holder: dict[str, Any]) -> bool:
    return (holder.get("pid"), holder.get("token")) == (os.getpid(), _TOKEN)


def _age(holder: dict[str, Any]) -> float:
    """Seconds since a holder's last sign of life, by this machine's clock."""
    return max(0.0, time.time() - holder.get("alive", 0.0))
