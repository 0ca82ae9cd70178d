"""Images in folders, one per class, on disk or inside a tar file."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from prism_jax.data.datasets import DatasetInfo, imagenet_validation_wnids
from prism_jax.data.sources import kinds, tars
from prism_jax.data.sources.base import ImageSource, existing, file_state, file_states
from prism_jax.data.sources.decoding import EncodedSource
from prism_jax.errors import UserError
from prism_jax.paths import is_text

_TREE = """
    train/<class>/<image>   one folder per class, the same classes in both
    {test}/<class>/<image>
with images of any kind that Pillow reads (.jpg, .png, .webp, .bmp, .tif, .gif, ...)"""

# ImageNet's validation images as published: in one folder, numbered.
_NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})\.JPEG")
# The first folder of such a name is the split: a class may be called train, too.
_IN_SPLIT = re.compile(r"(?:.*?/)??(train|val|validation|test)/(.+)", re.DOTALL)
_TINY_TABLE = "val_annotations.txt"
_NEARLY = {  # what people call splits that are not found by that name
    "train": ("train", "training", "trainset", "train_images"),
    "test": ("test", "testing", "val", "valid", "validation", "testset", "test_images", "eval"),
}

_HEAD = 1 << 26  # bytes of a file that tell whether it is an image, where its name does not


def open_folder(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """A tree of images as torchvision's ImageFolder reads it."""
    expected = f"dataset.source=folder needs dataset.path to be a local folder with{_tree(info)}"
    path = existing(path, expected, os.path.isdir)
    roots = [os.path.join(path, name) for name in split_names(info, split)]
    root = next((root for root in roots if os.path.isdir(root)), None)
    if root is None:
        holding = {name: bool(_files(os.path.join(path, name))) for name in _folders(path)}
        raise UserError(_no_split(info, path, split, holding, expected))
    # Labels are positions among the classes of the training split, in both splits.
    train = os.path.join(path, "train")
    classes = _folders(train) if os.path.isdir(train) else None

    def opened(name: str) -> BinaryIO:
        return open(os.path.join(root, name), "rb")

    def read_path(name: str) -> bytes:
        with opened(name) as file:
            return file.read()

    others = kinds.Others(list)
    there = {os.path.basename(at): _folders(at) for at in roots if os.path.isdir(at)}
    instead = _instead(os.path.basename(root), there, classes)
    files = _labelled(walk(root, others), others, classes, opened, root, expected, instead)

    def states() -> list[tuple[str, int, int]]:
        return file_states([os.path.join(root, path) for path in files.paths])

    return _source(
        info,
        split,
        size,
        files,
        name=lambda i: f"{root}/{files.paths[i]}",
        read=lambda i: read_path(files.paths[i]),
        sizes=lambda: [size for _, size, _ in states()],
        stamp=lambda: repr(states()),
    )


def open_tar(info: DatasetInfo, path: str | None, split: str, size: int) -> ImageSource:
    """The same tree inside an uncompressed tar file, read in place."""
    expected = (
        "dataset.source=tar needs dataset.path to be an uncompressed .tar file, or a name with "
        f"{{split}} in it for one file per split (data_{{split}}.tar), that holds{_tree(info)}"
    )
    names, train = split_names(info, split), None
    if path and "{split}" in path:
        train = path.replace("{split}", "train")
        paths = [path.replace("{split}", name) for name in names]
        path = next((p for p in paths if os.path.isfile(p)), path)
    path = existing(path, expected, os.path.isfile)
    state = file_state(path)
    stored, unreadable = tars.index(*state)
    trees, twice = _trees((*stored, *unreadable))
    found = next((name for name in names if name in trees), None)
    if found is None:
        raise UserError(_no_split(info, path, split, _holding([*stored, *unreadable]), expected))
    # Labels are positions among the classes of the training split, in whichever file that is.
    training = trees.get("train", {})
    if train and train != path and os.path.isfile(train):
        of_train, _ = _trees(name for some in tars.index(*file_state(train)) for name in some)
        training = of_train.get("train", training)
    classes = {name.split("/")[0] for name in training if "/" in name and not kinds.is_hidden(name)}
    tree, others = {}, kinds.Others(list)
    for name, member in trees[found].items():
        kind = unreadable.get(member)
        if kinds.is_hidden(name) and "/" in name:
            if (folder := f"{name.split('/')[0]}/") not in others[kinds.HIDDEN]:
                others[kinds.HIDDEN].append(folder)
        elif kind and (kind in (kinds.NO_FILE, kinds.AROUND) or not kinds.is_named_as_one(name)):
            others[kind].append(name)
        elif member in twice and not kinds.is_hidden(name.rpartition("/")[2]):
            raise UserError(
                f"{path} holds {found}/{name} twice, as {twice[member]} and as {member}; pack one "
                f"of the folders around {found}/ alone: {expected}"
            )
        else:
            tree[name] = member

    def place(name: str) -> tars.Place | str:
        member = tree.get(name, name)
        return stored.get(member) or unreadable.get(member, "not in the archive")

    def opened(name: str) -> BinaryIO:
        return io.BytesIO(tars.read(path, place(name), limit=_HEAD))

    there = {
        name: {inside.split("/")[0] for inside in trees[name] if "/" in inside}
        for name in names
        if name in trees
    }
    instead = _instead(found, there, classes)
    files = _labelled(tree, others, classes or None, opened, path, expected, instead)
    members = [tree.get(name, name) for name in files.paths]
    places = [place(name) for name in files.paths]

    return _source(
        info,
        split,
        size,
        files,
        name=lambda i: f"{path}/{members[i]}",
        read=lambda i: tars.read(path, places[i]),
        sizes=lambda: [-1 if isinstance(at, str) else at[1] for at in places],
        stamp=lambda: repr(state),
    )


def _trees(members: Iterable[str]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The members of each split by their names in it, and others under the same names, by these."""
    trees: dict[str, dict[str, str]] = {}
    twice: dict[str, str] = {}
    for member in members:
        if match := _IN_SPLIT.fullmatch(member):
            tree = trees.setdefault(match[1], {})
            before = tree.get(match[2])
            tree[match[2]] = member
            # "./train/" is "train/": there the later one replaces the other, as on a disk.
            if before and os.path.normpath(f"/{before}") != os.path.normpath(f"/{member}"):
                twice[member] = before
    return trees, twice


def split_names(info: DatasetInfo, split: str) -> tuple[str, ...]:
    """The names under which a split is found, best first."""
    return {"train": ("train",), "test": info.test_splits}[split]


def _no_split(
    info: DatasetInfo, path: str, split: str, holding: dict[str, bool], expected: str
) -> str:
    """What to say where a split is not found.

    Args:
      holding: the folders that are there, and whether files lie directly in each.
      expected: what belongs there.
    """
    names, folders = split_names(info, split), sorted(holding)
    said = f"{path} has no folder {' or '.join(names)}"
    some = ", ".join(folders[:3]) + (", ..." if len(folders) > 3 else "")
    of_class = f"a part of the images of each class belongs into {info.test_splits[0]}/<class>"
    if near := [name for name in folders if name.lower() in _NEARLY[split]]:
        said += f", but {', '.join(near)}: rename {near[0]} to {names[0]}"
    elif os.path.basename(os.path.abspath(path)) in ("train", *info.test_splits):
        said += f": name the folder around it, {os.path.dirname(os.path.abspath(path))}"
    elif split == "test":
        said += f", only {some}: {of_class}" if some else f": {of_class}"
    elif any(holding.values()):
        said += f"; if {some} are its classes, they belong into train, and {of_class}"
    elif some:
        said += f", only {some}"
    return f"{said}; {expected}"


def _holding(names: Iterable[str]) -> dict[str, bool]:
    """The folders below those that hold everything, and whether files lie directly in each."""
    paths = [[part for part in name.split("/") if part != "."] for name in names]
    splits = {name for near in _NEARLY.values() for name in near}
    while len(heads := {parts[0] for parts in paths}) == 1 and min(map(len, paths)) > 2:
        if heads & splits:
            break
        paths = [parts[1:] for parts in paths]
    holding: dict[str, bool] = {}
    for parts in paths:
        if len(parts) > 1:
            holding[parts[0]] = holding.get(parts[0], False) or len(parts) == 2
    return holding


def _tree(info: DatasetInfo) -> str:
    return _TREE.format(test=info.test_splits[0]) + (
        f" (instead of {info.test_splits[0]}/ also {'/ or '.join(info.test_splits[1:])}/)"
    )


class _Files(NamedTuple):
    """The images of a split in order: where each is, what identifies it, and its label."""

    paths: list[str]
    names: list[str]
    labels_N: np.ndarray
    classes: list[str]
    left_out: int


def _source(
    info: DatasetInfo,
    split: str,
    size: int,
    files: _Files,
    *,
    name: Callable[[int], str],
    read: Callable[[int], bytes],
    sizes: Callable[[], list[int]],
    stamp: Callable[[], str],
) -> EncodedSource:
    def content() -> bytes:
        lines = (f"{name}\0{size}\n" for name, size in zip(files.names, sizes(), strict=True))
        return "".join(lines).encode("utf-8", "surrogateescape")

    return EncodedSource(
        info,
        split,
        size,
        count=len(files.paths),
        labels=lambda: files.labels_N,
        num_classes=len(files.classes),
        class_names=tuple(files.classes),
        read=read,
        name=name,
        content=content,
        stamp=stamp,
        left_out=files.left_out,
    )


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder or a link to one; a circle of links is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _folders(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return [e.name for e in entries if _is_folder(e) and not kinds.is_hidden(e.name)]


def walk(root: str, others: kinds.Others, start: str = "") -> list[str]:
    """Files at any depth below a folder, as paths relative to the root; links are followed.

    Args:
      others: receives hidden folders, and what is no file.
      start: the first folder, relative to the root.
    """
    found: list[str] = []

    def visit(folder: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    state = entry.stat()
                    identity = state.st_dev, state.st_ino
                    if kinds.is_hidden(entry.name):
                        others[kinds.HIDDEN].append(f"{path}/")
                    elif identity in above:
                        others[kinds.AROUND].append(path)
                    else:
                        visit(path, above | {identity})
                elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                    found.append(path)
                elif entry.is_symlink() and kinds.is_named_as_one(path):
                    found.append(path)  # an image that is missing
                else:
                    kind = "a link to nothing" if entry.is_symlink() else kinds.NO_FILE
                    others[kind].append(path)

    state = os.stat(os.path.join(root, start))
    visit(start, frozenset({(state.st_dev, state.st_ino)}))
    return found


def _files(root: str) -> list[str]:
    with os.scandir(root) as entries:
        return [e.name for e in entries if not kinds.is_hidden(e.name) and not _is_folder(e)]


def class_order(names: Sequence[str] | set[str]) -> list[str]:
    """The classes in label order: sorted as text, as torchvision does.

    Numbers without leading zeros are sorted as numbers (2 before 10) with a warning, because
    ImageFolder would give them other labels.
    """
    as_text = sorted(names)
    if all(name.isascii() and name.isdigit() for name in as_text):
        as_numbers = sorted(as_text, key=lambda name: (int(name), name))
        if as_numbers != as_text:
            warnings.warn(
                f"the class folders are numbers without leading zeros; they are taken in "
                f"numeric order ({', '.join(as_numbers[:3])}, ...), where torchvision's "
                f"ImageFolder sorts them as text ({', '.join(as_text[:3])}, ...)",
                stacklevel=2,
            )
        return as_numbers
    return as_text


def _instead(taken: str, there: Mapping[str, Iterable[str]], classes: Iterable[str] | None) -> str:
    """What to do where a split has no classes and one that stands back for it has them.

    Args:
      taken: the name of the split.
      there: those that it could be, with their folders.
      classes: of the training split.
    """
    wanted = set(classes or ())
    for name, folders in there.items():
        if name != taken and wanted and wanted <= set(folders):
            return f"{name}/ has these classes: rename {taken}/, or remove it; "
    return ""


def _labelled(
    paths: Iterable[str],
    others: kinds.Others,
    train_classes: Iterable[str] | None,
    opened: Callable[[str], BinaryIO],
    root: str,
    expected: str,
    instead: str,
) -> _Files:
    """The images among the files of a split, in ImageFolder's order, with labels.

    Args:
      paths: relative to the split.
      others: what is no image already; it is named and counted with what is found to be none.
      train_classes: the folders of the training split; None: there is none.
      opened: opens a file of the split.
      root, expected: for messages.
      instead: what is said before the latter of a split without its classes.
    """
    paths = list(paths)
    class_of = _classified(paths, opened)
    for stray in (path for path in paths if path not in class_of and path != _TINY_TABLE):
        others[kinds.HIDDEN if kinds.hidden(stray) else "in no class folder"].append(stray)
    found = kinds.images_of(class_of, opened, others)
    left_out = kinds.left_out(root, others)
    classes = class_order(set(train_classes or class_of.values()))
    images: dict[str, list[tuple[str, ...]]] = {cls: [] for cls in classes}
    for path in found:
        cls = class_of[path]
        folder, _, file = path.rpartition("/")
        if cls not in images:
            raise UserError(
                f"{root}/{cls} is a class that the training split does not have; {instead}"
                f"{expected}"
            )
        images[cls].append((folder, file))
    if not classes:
        raise UserError(f"{root} has no class folders; {instead}{expected}")
    if nameless := [cls for cls in classes if not is_text(cls)]:
        raise UserError(
            f"{root} has a class folder whose name is no UTF-8, {os.fsencode(nameless[0])!r}; "
            f"rename it: names of classes are written into every result"
        )
    if empty := [cls for cls in classes if not images[cls]]:
        raise UserError(
            f"{root} has no image for {len(empty)} of {len(classes)} classes "
            f"({', '.join(empty[:5])}{', ...' if len(empty) > 5 else ''}); {instead}{expected}"
        )
    ordered = [(cls, *at) for cls in classes for at in sorted(images[cls])]
    paths = [f"{folder}/{file}" if folder else file for _, folder, file in ordered]
    names = [
        path if path.startswith(f"{cls}/") else f"{cls}/{file}"
        for path, (cls, _, file) in zip(paths, ordered, strict=True)
    ]
    counts = [len(images[cls]) for cls in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return _Files(paths, names, labels, classes, left_out)


def _classified(paths: list[str], opened: Callable[[str], BinaryIO]) -> dict[str, str]:
    """The class of each file of a split that has one.

    The class is the first folder, but for two published sets whose validation images lie in one
    folder: Tiny ImageNet's has a table, and ImageNet's are numbered. Many move them into class
    folders, all or some of them, and leave the table where it is.
    """
    of_folders = {path: path.split("/")[0] for path in paths if "/" in path}
    if _TINY_TABLE in paths:
        with opened(_TINY_TABLE) as file:
            rows = [line.split("\t") for line in file.read().decode().splitlines()]
        told = {f"images/{row[0]}": row[1] for row in rows if len(row) > 1}
        if not told.keys().isdisjoint(paths):
            moved = {path: cls for path, cls in of_folders.items() if cls != "images"}
            away = {path.rpartition("/")[2] for path in moved}
            return moved | {p: cls for p, cls in told.items() if p.rpartition("/")[2] not in away}
    numbers = {path: int(match[1]) for path in paths if (match := _NUMBERED.fullmatch(path))}
    known = imagenet_validation_wnids()
    if numbers and max(numbers.values()) <= len(known):
        return of_folders | {path: known[number - 1] for path, number in numbers.items()}
    return of_folders
