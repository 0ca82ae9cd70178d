"""Class folders inside a .tar or .zip file, compressed or not; nothing is unpacked to disk."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable

from prism_jax.data.sets.base import CLASS_TABLE, Found, Stated, called
from prism_jax.data.sets.folder import images_of, in_order
from prism_jax.data.sources import ImageSource, kinds, tars
from prism_jax.data.sources.base import file_state
from prism_jax.errors import UserError

_BROKEN = (
    *(tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, KeyError),
    *(zlib.error, lzma.LZMAError),
)


def sniff(path: str) -> bool:
    """Whether it is a tar or zip file."""
    if not os.path.isfile(path):
        return False
    if path.lower().endswith((".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return True
    # Without a suffix, as caches of downloads have them; .npz and .pt are zip files, too.
    return not os.path.splitext(path)[1] and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def open_set(path: str, stated: Stated, real: ImageSource) -> Found:
    """A file that holds class folders, or one folder or ``train`` around them."""
    del stated, real
    try:
        is_zip = path.lower().endswith(".zip") or zipfile.is_zipfile(path)
        sizes, unreadable, read_member = (_open_zip if is_zip else _open_tar)(path)
    except _BROKEN as error:
        raise UserError(
            f"{path} is not a whole tar or zip file ({error}); fetch it again"
        ) from error
    others = kinds.Others(list)
    for name, what in unreadable.items():
        if kinds.is_named_as_one(name) and what not in (kinds.NO_FILE, kinds.AROUND):
            raise UserError(f"{path}: {name} is {what}; get a whole copy of the set")
        others[what].append(name)
    root, files = images_of(list(sizes), lambda name: io.BytesIO(read_member(name)), others)
    folders = sorted({f.split("/")[0] for f in files})
    names, labels = in_order(folders, files)
    around = [f"{at}/{CLASS_TABLE}".lstrip("/") for at in (root[:-1], os.path.dirname(root[:-1]))]
    tables = (read_member(name) for name in around if name in sizes)
    classes, numbered = called(tuple(folders), False, tables)
    return Found(
        "archive",
        classes,
        numbered,
        "class folders",
        labels,
        name=lambda i: f"{path}/{root}{names[i]}",
        read=lambda i: read_member(root + names[i]),
        stamp=lambda i: f"{names[i]}\0{sizes[root + names[i]]}\n",
        left_out=kinds.left_out(path, others),
    )


# Sizes of files; names under which nothing can be read, with what is there; the content of a file.
Archive = tuple[dict[str, int], dict[str, str], Callable[[str], bytes]]


def _open_zip(path: str) -> Archive:
    archive = zipfile.ZipFile(path)
    entries = {_plain(e.filename): e for e in archive.infolist() if not e.is_dir()}
    sizes = {name: e.file_size for name, e in entries.items()}
    return sizes, {}, _whole(lambda name: archive.read(entries[name]))


def _open_tar(path: str) -> Archive:
    """Links are followed inside the archive. A compressed one is read once, into memory."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.ReadError:
        with tarfile.open(path, "r:*") as tar:
            found = _named(tars.members(tar, lambda member: _content(tar, member)))
        sizes = {name: len(data) for name, data in found.files.items()}
        return sizes, found.unreadable, found.files.__getitem__
    found = _named(tars.index(*file_state(path)))
    sizes = {name: length for name, (_, length) in found.files.items()}
    return sizes, found.unreadable, lambda name: tars.read(path, found.files[name])


def _whole(read: Callable[[str], bytes]) -> Callable[[str], bytes]:
    """The same, raising OSError for a member that is damaged or encrypted."""

    def checked(name: str) -> bytes:
        try:
            return read(name)
        except (*_BROKEN, RuntimeError) as error:
            raise OSError(str(error)) from error

    return checked


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # members() asks for files alone
    return file.read()


def _named(tar: tars.Tar) -> tars.Tar:
    return tars.Tar(*({_plain(name): what for name, what in some.items()} for some in tar))


def _plain(name: str) -> str:
    return name.removeprefix("./").lstrip("/")
