"""Class folders inside a .tar or .zip file, compressed or not; nothing is unpacked to disk."""

from __future__ import annotations

import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable

from prism_jax.data.sets.base import Found, Stated
from prism_jax.data.sets.folder import below, class_root, in_order, is_image
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
    files = below(root, members)
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
    sizes = {name: entry.file_size for name, entry in entries.items()}
    return sizes, _whole(lambda name: archive.read(entries[name]))


def _open_tar(path: str) -> Archive:
    """Links are followed inside the archive. A compressed one is read once, into memory."""
    try:
        archive, lock = tarfile.open(path, "r:"), threading.Lock()
    except tarfile.ReadError:
        with tarfile.open(path, "r:*") as tar:
            held = {name: tar.extractfile(m).read() for name, m in _files(tar).items()}
        return {name: len(data) for name, data in held.items()}, held.__getitem__
    files = _files(archive)
    with open(path, "rb") as file:  # tarfile takes an unreadable header for the end
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"cut short or damaged at byte {archive.offset}")

    def read(name: str) -> bytes:
        with lock:
            return archive.extractfile(files[name]).read()

    return {name: m.size for name, m in files.items()}, _whole(read)


def _whole(read: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """The same, raising OSError for a member that is damaged or encrypted."""

    def checked(name: str) -> bytes:
        try:
            return read(name)
        except (*_BROKEN, RuntimeError) as error:
            raise OSError(str(error)) from error

    return checked


def _files(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """The files by their names; a link is the file that it leads to.

    Raises:
      UserError: an image is a link that leads out of the archive, or to itself.
    """
    members = {_plain(member.name): member for member in tar.getmembers()}
    found = {}
    for name, member in members.items():
        at, seen = name, set()
        while (member := members.get(at)) is not None and at not in seen:
            if not (member.islnk() or member.issym()):
                break
            seen.add(at)
            folder = os.path.dirname(at) if member.issym() else ""
            at = os.path.normpath(os.path.join(folder, _plain(member.linkname)))
        if member is not None and member.isfile():
            found[name] = member
        elif is_image(name) and seen:
            raise UserError(
                f"{tar.name}: {name} is a link to {members[name].linkname}, which is not in the "
                "file; get a whole copy of the set"
            )
    return found


def _plain(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
