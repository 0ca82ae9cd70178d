"""A stand-in for an object store, under ``gs://``: what a bucket can do, and nothing else.

Objects are whole byte strings under names with slashes. An upload becomes visible when it is
closed, all at once. There are no folders, no renames, no appends, no links. Orbax takes the path
for the real thing, and commits checkpoints as it does there.

Kept in a folder, one file per object, so that processes share it and a killed one leaves what it
had uploaded. ``python tests/helpers/object_store.py FOLDER EVENT N FLAGS...`` is the real command
(see ``dying``) on such a store.
"""

from __future__ import annotations

import fnmatch
import io
import os
import pathlib
import secrets
import sys
from urllib.parse import quote, unquote

from etils.epath import backend, gpath, stat_utils


class Unsupported(RuntimeError):
    """The program asked for what object stores do not have."""


class _Upload(io.BytesIO):
    def __init__(self, store: ObjectStore, name: str):
        super().__init__()
        self._store, self._name = store, name

    def __exit__(self, kind, *more):
        if kind is not None:  # an upload that is broken off leaves nothing
            super().close()
            return None
        return super().__exit__(kind, *more)

    def close(self) -> None:
        if not self.closed:
            self._store.put(self._name, self.getvalue())
        super().close()


class ObjectStore(backend.Backend):
    """The backend of ``etils.epath`` for one bucket of objects."""

    def __init__(self, folder: pathlib.Path):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.calls: dict[str, int] = {}

    # --- objects ---

    def put(self, name: str, data: bytes) -> None:
        hidden = self._folder / f".{secrets.token_hex(8)}"
        hidden.write_bytes(data)
        hidden.replace(self._file(name))

    def _file(self, name: str) -> pathlib.Path:
        return self._folder / quote(_plain(name), safe="")

    def _names(self) -> list[str]:
        return [unquote(n) for n in os.listdir(self._folder) if not n.startswith(".")]

    def _under(self, path) -> list[str]:
        prefix = _plain(path) + "/"
        return [name for name in self._names() if name.startswith(prefix)]

    def _count(self, call: str) -> None:
        self.calls[call] = self.calls.get(call, 0) + 1

    # --- what epath asks for ---

    def open(self, path, mode):
        self._count(f"open {mode}")
        if "a" in mode or "+" in mode:
            raise Unsupported(f"append to {path}")
        if "w" in mode:
            upload = _Upload(self, os.fspath(path))
            return upload if "b" in mode else _Text(upload)
        data = io.BytesIO(self._read(path))
        return data if "b" in mode else io.TextIOWrapper(data, "utf-8")

    def _read(self, path) -> bytes:
        try:
            return self._file(path).read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", os.fspath(path)) from None

    def exists(self, path) -> bool:
        self._count("exists")
        return self._file(path).exists() or bool(self._under(path))

    def isdir(self, path) -> bool:
        return bool(self._under(path))

    def listdir(self, path):
        self._count("list")
        found = self._under(path)
        if not found:
            raise FileNotFoundError(2, "no such object", os.fspath(path))
        start = len(_plain(path)) + 1
        return sorted({name[start:].split("/")[0] for name in found})

    def glob(self, path):
        pattern = _plain(path)
        depth = pattern.count("/")
        names = {"/".join(n.split("/")[: depth + 1]) for n in self._names()}
        return sorted(f"gs://{n}" for n in names if fnmatch.fnmatchcase(n, pattern))

    def walk(self, top, *, top_down=True, on_error=None):
        raise Unsupported("walk")

    def makedirs(self, path, *, exist_ok=False, mode=None) -> None:
        del path, exist_ok, mode  # there are no folders

    mkdir = makedirs

    def rmtree(self, path) -> None:
        found = self._under(path)
        if not found:
            raise FileNotFoundError(2, "no such object", os.fspath(path))
        for name in sorted(found):
            self.remove(name)

    def remove(self, path) -> None:
        self._count("remove")
        try:
            self._file(path).unlink()
        except FileNotFoundError:
            raise FileNotFoundError(2, "no such object", os.fspath(path)) from None

    def rename(self, path, dst) -> None:
        raise Unsupported(f"rename {path} to {dst}")

    replace = rename

    def copy(self, path, dst, overwrite) -> None:
        if not str(os.fspath(path)).startswith("gs://"):
            raise Unsupported(f"copy a local file to {dst}")
        if not overwrite and self._file(dst).exists():
            raise FileExistsError(dst)
        self.put(os.fspath(dst), self._read(path))

    def stat(self, path):
        is_folder = not self._file(path).exists()
        if is_folder and not self._under(path):
            raise FileNotFoundError(2, "no such object", os.fspath(path))
        length, mtime = 0, 0
        if not is_folder:
            found = self._file(path).stat()
            length, mtime = found.st_size, int(found.st_mtime)
        return stat_utils.StatResult(
            is_directory=is_folder, length=length, mtime=mtime, owner=None, group=None, mode=None
        )


class _Text(io.TextIOWrapper):
    def __init__(self, upload: _Upload):
        super().__init__(upload, "utf-8")


def _plain(path) -> str:
    return os.fspath(path).removeprefix("gs://").strip("/")


def mount(folder: pathlib.Path) -> ObjectStore:
    """Let ``gs://`` be a store in a folder, in this process."""
    from orbax.checkpoint._src.path import gcs_utils

    store = ObjectStore(folder)
    gpath._PREFIX_TO_BACKEND["gs"] = store
    # Orbax would ask Google's own library whether the bucket has real folders.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
    return store


def download(folder: pathlib.Path, prefix: str, to: pathlib.Path) -> pathlib.Path:
    """The objects under a prefix as files."""
    for file in pathlib.Path(folder).iterdir():
        name = unquote(file.name)
        if name.startswith(f"{prefix}/"):
            target = to / name[len(prefix) + 1 :]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return to


if __name__ == "__main__":
    sys.path[:0] = [os.getcwd(), os.path.join(os.getcwd(), "tests")]
    from helpers import dying

    mount(pathlib.Path(sys.argv[1]))
    sys.exit(dying.main(sys.argv[2:]))
