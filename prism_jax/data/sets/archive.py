"""Class folders inside a .tar or .zip file, compressed or not; nothing is unpacked to disk."""

from __future__ import annotations

import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator

from prism_jax.data.sets.base import Found, Stated
from prism_jax.data.sets.folder import class_root, in_order, is_image
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

_BROKEN = (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, KeyError, zlib.error)


def sniff(path: str) -> bool:
    """Whether it is a tar or zip file."""
    named = path.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))
    return named and os.path.isfile(path)


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """A file that holds class folders, or one folder or ``train`` around them."""
    del stated, real
    try:
        sizes, read_member = (_open_zip if zipfile.is_zipfile(path) else _open_tar)(path)
    except _BROKEN as error:
        raise UserError(
            f"{path} is not a whole tar or zip file ({error}); fetch it again"
        ) from error
    members = [m for m in sizes if is_image(m) and not _hidden(m)]
    root = class_root(members)
    files = [m.removeprefix(root) for m in members if m.startswith(root)]
    files = [f for f in files if "/" in f]
    folders = sorted({f.split("/")[0] for f in files})
    names, labels = in_order(folders, files)
    return Found(
        "archive",
        tuple(folders),
        False,
        "class folders",
        labels,
        name=lambda i: f"{path}/{root}{names[i]}",
        read=lambda i: read_member(root + names[i]),
        stamp=lambda i: f"{names[i]}\0{sizes[root + names[i]]}\n",
    )


Archive = tuple[dict[str, int], Callable[[str], bytes]]


def _open_zip(path: str) -> Archive:
    archive = zipfile.ZipFile(path)
    entries = {_plain(e.filename): e for e in archive.infolist() if not e.is_dir()}
    return {name: e.file_size for name, e in entries.items()}, lambda name: archive.read(
        entries[name]
    )


def _open_tar(path: str) -> Archive:
    """Links are followed inside the archive. A compressed one is read once, into memory."""
    try:
        archive, lock = tarfile.open(path, "r:"), threading.Lock()
    except tarfile.ReadError:
        with tarfile.open(path, "r:*") as tar:
            held = {name: tar.extractfile(m).read() for name, m in _members(tar)}
        return {name: len(data) for name, data in held.items()}, held.__getitem__
    places = dict(_members(archive))

    def read(name: str) -> bytes:
        with lock:
            return archive.extractfile(places[name]).read()

    return {name: m.size for name, m in places.items()}, read


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files by their names; a link is the file that it points to."""
    for member in tar:
        name = _plain(member.name)
        if member.isfile():
            yield name, member
        elif (member.islnk() or member.issym()) and is_image(name):
            folder = os.path.dirname(member.name) if member.issym() else ""
            target = os.path.normpath(os.path.join(folder, member.linkname))
            try:
                found = tar.getmember(target)
            except KeyError:
                raise UserError(
                    f"{tar.name}: {member.name} is a link to {member.linkname}, which is not in "
                    "the file; get a whole copy of the set"
                ) from None
            yield name, found


def _plain(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
