"""The files of a tar by their names, with its links followed inside it."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from prism_jax.data.sources import kinds
from prism_jax.errors import UserError

Place = tuple[int, int]  # offset and length of a file

_HOPS = 40  # links in a row, as many as Linux follows
_MOST = 10_000_000  # files that links may make of an archive
_MAGIC, _MAGIC_AT = b"ustar", 257  # of a member's header
_PIECE = 1 << 20  # whole blocks
_OTHERS = {
    b"\x1f\x8b": "it is compressed with gzip",
    b"BZh": "it is compressed with bzip2",
    b"\xfd7zXZ\0": "it is compressed with xz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd",
    b"PK": "it is a zip file",
    b"7z\xbc\xaf": "it is a 7-Zip file",
    b"Rar!": "it is a RAR file",
}


class Tar(NamedTuple):
    """What a tar holds: files, and names under which nothing can be read, with what is there."""

    files: dict[str, Any]
    unreadable: dict[str, str]


class _Link(NamedTuple):
    target: str
    rooted: bool  # a hard link's target is a name of the archive, a symbolic one's is relative


class _Broken(Exception):
    """A link leads to nothing that can be read; the text says what it is."""


Folder = dict[str, Any]  # of folders, links, files, and str: what it is that cannot be read


@functools.lru_cache(maxsize=4)
def index(path: str, size: int, modified_ns: int) -> Tar:
    """The files of a tar; size and time of change are part of the key.

    Raises:
      UserError: it is no whole, uncompressed tar.
    """
    del size, modified_ns
    try:
        with tarfile.open(path, "r:") as tar:
            found = members(tar, lambda member: (member.offset_data, member.size))
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"{path} is not a whole, uncompressed tar file ({_instead(path) or error}); fetch or "
            f"unpack it again"
        ) from error
    # tarfile takes an unreadable header, or zeros, for the end, and all files behind for absent.
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut short or damaged at byte {end}: there is neither a file nor the "
                f"end mark of a tar file; fetch it again"
            )
        if (more := _next_header(file)) is not None:
            raise UserError(
                f"{path} has its end mark at byte {end} and another file at byte {more}: it is "
                f"damaged, or several archives one after another; fetch it again, or join them "
                f"with tar -Af"
            )
    return found


def _instead(path: str) -> str | None:
    """What a file is that is no tar, by its first bytes; None: not known, or not to be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError:
        return None
    return next((what for magic, what in _OTHERS.items() if head.startswith(magic)), None)


def _next_header(file: BinaryIO) -> int | None:
    """Where the next member begins in what is left of a file at the end of a block."""
    while piece := file.read(_PIECE):
        found = piece.find(_MAGIC)
        while found >= 0:
            at = file.tell() - len(piece) + found - _MAGIC_AT
            if at % tarfile.BLOCKSIZE == 0:
                return at
            found = piece.find(_MAGIC, found + 1)
    return None


def read(path: str, place: Place | str, limit: int | None = None) -> bytes:
    """A file of a tar, or so many bytes of it.

    Raises:
      OSError: it cannot be read; ``place`` says what it is.
    """
    if isinstance(place, str):
        raise OSError(place)
    offset, length = place
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(length if limit is None else min(length, limit))


def members(tar: tarfile.TarFile, taken: Callable[[tarfile.TarInfo], Any]) -> Tar:
    """The files of an opened tar by their names, links followed.

    Args:
      taken: what is kept of a file; neither text nor a dict.
    """
    found: dict[str, Any] = {}
    for member in tar:
        if member.isfile():
            found[member.name] = "a sparse file" if member.issparse() else taken(member)
        elif member.islnk():  # to what has the name now, or else to what gets it later
            found[member.name] = found.get(member.linkname, _Link(member.linkname, True))
        elif member.issym():
            found[member.name] = _Link(member.linkname, False)
        elif not member.isdir():
            found[member.name] = kinds.NO_FILE
    linked = any(isinstance(node, _Link | str) for node in found.values())
    return _followed(str(tar.name), found) if linked else Tar(found, {})


def _followed(path: str, members: Folder) -> Tar:
    """The files as they would be found on a disk, behind links to files and to folders too."""
    root: Folder = {}
    for name, node in members.items():
        *above, last = _parts(name)
        folder = root
        for part in above:
            below = folder.setdefault(part, {})
            if not isinstance(below, dict):
                below = folder[part] = {}
            folder = below
        folder[last] = node
    files: dict[str, Any] = {}
    unreadable: dict[str, str] = {}

    def walk(folders: list[Folder], shown: str, trail: tuple[Folder, ...]) -> None:
        for name, node in folders[-1].items():
            at, above = f"{shown}{name}", folders
            if isinstance(node, _Link):
                try:
                    above, node = _target(node, folders, [])
                    if any(node is folder for folder in trail):
                        raise _Broken(kinds.AROUND)
                except _Broken as broken:
                    node = str(broken)
            if isinstance(node, dict):
                walk([*above, node], f"{at}/", (*trail, node))
            elif isinstance(node, str):
                unreadable[at] = node
            else:
                files[at] = node
            if len(files) + len(unreadable) > _MOST:
                raise UserError(
                    f"{path}: its links make more than {_MOST:,} files of {len(members):,}; "
                    f"store it without links between folders"
                )

    walk([root], "", (root,))
    return Tar(files, unreadable)


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _target(link: _Link, folders: list[Folder], followed: list[_Link]) -> tuple[list[Folder], Any]:
    """What a link leads to, and the folders above that, from the root.

    Args:
      folders: those that the link lies in, from the root.
      followed: the links on the way so far.

    Raises:
      _Broken: there is nothing, or it is outside the archive, or links lead in a circle.
    """
    said = f"a link to {link.target}"
    followed.append(link)
    if len(followed) > _HOPS:
        raise _Broken(f"{said}, in a circle of links")
    if link.target.startswith("/") and not link.rooted:
        raise _Broken(f"{said}, outside the archive")
    folders = folders[:1] if link.rooted else list(folders)
    parts = _parts(link.target)
    for number, part in enumerate(parts, 1):
        if part == "..":
            if len(folders) == 1:
                raise _Broken(f"{said}, outside the archive")
            folders.pop()
            continue
        node = folders[-1].get(part)
        above = folders
        if isinstance(node, _Link):
            above, node = _target(node, folders, followed)
        if node is None or (number < len(parts) and not isinstance(node, dict)):
            raise _Broken(f"{said}, which the archive does not hold")
        if not isinstance(node, dict):
            return above, node
        folders = [*above, node]
    return folders[:-1], folders[-1]
