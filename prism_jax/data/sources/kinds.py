"""Which files are images: what the installed Pillow reads, by its own registry.

A file whose name ends as one of Pillow's formats is an image, and is damaged where it cannot be
decoded. Any other is one if it begins as the files of a format do. What is left is no image; it
is named and counted, never dropped without a word.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import BinaryIO

from PIL import Image, ImageFile

from prism_jax import progress

# MPEG is recognised and never decoded. EPS is a program, which Pillow has Ghostscript run.
_NOT_DECODED = ("MPEG", "EPS")
_NAMED = 3

# Files that are no images, by what they are: one of these, a suffix, or a link to nothing.
HIDDEN = "hidden"
NO_FILE = "no regular file"
AROUND = "a link to a folder that it lies in"
Others = defaultdict[str, list[str]]


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats that are read, in the order in which Pillow tries them."""
    Image.preinit()  # the frequent ones first
    Image.init()

    def decoded(name: str) -> bool:
        factory = Image.OPEN[name][0]
        stub = isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
        return not stub and name not in _NOT_DECODED

    return tuple(name for name in Image.ID if decoded(name))


@functools.cache
def suffixes() -> frozenset[str]:
    """How the names of images end, in lower case."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in formats())


def images_of(paths: Iterable[str], opened: Callable[[str], BinaryIO], others: Others) -> list[str]:
    """The images among files, in their order; hidden files are none.

    Args:
      paths: with "/" between folders.
      opened: opens one, at its first byte; called for names that do not tell.
      others: receives the other files.
    """
    images = []
    for path in paths:
        if hidden(path):
            others[HIDDEN].append(path)
        elif is_named_as_one(path) or _begins_as_one(path, opened):
            images.append(path)
        else:
            others[os.path.splitext(path)[1].lower() or "without a suffix"].append(path)
    return images


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or what macOS adds to archives."""
    return name.startswith((".", "__MACOSX"))


def hidden(path: str) -> bool:
    """Whether a file is hidden, or lies in a folder that is, at any depth."""
    return any(map(is_hidden, path.split("/")))


def is_named_as_one(path: str) -> bool:
    """Whether the name of a file says that it is an image."""
    return os.path.splitext(path)[1].lower() in suffixes()


def _begins_as_one(path: str, opened: Callable[[str], BinaryIO]) -> bool:
    """Whether a file has the head of a format that can be told by it."""
    telling = [name for name in formats() if Image.OPEN[name][1] is not None]
    try:
        with opened(path) as file, Image.open(file, formats=telling):
            return True
    except Image.DecompressionBombError:
        return True  # an image, which is refused when it is read
    except Exception:  # Pillow's readers raise many kinds for what is none of theirs
        return False


def left_out(where: str, others: Others) -> int:
    """How many files are left out of a set; they are named, once however often it is opened."""
    if others:
        _say(where, tuple((kind, tuple(files)) for kind, files in sorted(others.items())))
    return sum(map(len, others.values()))


@functools.cache
def _say(where: str, others: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    count = sum(len(files) for _, files in others)
    progress.say(f"left out of {where}, as no images: {count} file{'s' * (count > 1)}")
    for kind, files in others:
        more = ", ..." if len(files) > _NAMED else ""
        progress.say(f"  {len(files)} x {kind}: {', '.join(files[:_NAMED])}{more}")
