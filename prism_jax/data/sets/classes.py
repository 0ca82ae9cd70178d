"""Which of our labels each class of a published set is: stated or found, never guessed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import numpy as np

from prism_jax.data.datasets import DatasetInfo, imagenet_wnids, plain
from prism_jax.data.sets.base import Found
from prism_jax.data.sources import ImageSource
from prism_jax.errors import UserError

FLAG = "recover.initialise_classes"
ORDERS = ("text", "numbers")  # words of the flag; a list of names is the third thing it takes

_WNID = re.compile(r"n[0-9]{8}")
_NUMBER = re.compile(r"(\D*)([0-9]+)\D*")


def wnids(imagenet_indices: Sequence[int] | None) -> tuple[str, ...] | None:
    """The WordNet IDs of classes of ImageNet; None where they are not known."""
    known = imagenet_wnids()
    if imagenet_indices is None or not known:
        return None
    return tuple(known[index] for index in imagenet_indices)


def class_map(
    path: str,
    found: Found,
    real: ImageSource,
    info: DatasetInfo,
    stated: tuple[str, ...] | None = None,
) -> np.ndarray:
    """The position in the set's ``classes`` of each of our labels: int64 (K,).

    The first that applies: what is stated; names (WordNet IDs, those of the real images or of the
    data set); numbers 0 to K - 1; ImageNet's numbers of the classes; and, where the data has no
    names that could say otherwise, the sorted names, as ImageFolder has them.

    Args:
      path: of the set, for messages.
      found: it.
      real, info: the real images and their data set.
      stated: "text" or "numbers" alone, or the set's names in the order of our labels.

    Raises:
      UserError: another number of classes, classes that the data has not, or two readings.
    """
    present = sorted(set(found.labels_N.tolist())) if found.numbered else range(len(found.classes))
    names = [found.classes[at] for at in present]
    if len(names) != real.num_classes:
        raise UserError(
            f"{path} has {len(names)} {found.unit}, but dataset.num_classes is {real.num_classes}"
        )
    at = {name: position for name, position in zip(names, present, strict=True)}
    if len(at) < len(names):
        if stated == ("numbers",) and found.numbered:
            return np.array(present, np.int64)
        raise UserError(
            f"{path} gives two classes one name ({', '.join(_repeated(names)[:3])}), by which "
            f"they cannot be told apart. Where its label 0 ({found.classes[0]}) is the data's "
            f"class 0, and so on, state --config.{FLAG}=numbers; else give each a name of its own"
        )

    def ordered(order: Sequence[str]) -> np.ndarray:
        return np.array([at[name] for name in order], np.int64)

    numbers = numbers_of(names)
    as_text = sorted(names)
    as_numbers = [names[i] for i in np.argsort(numbers, kind="stable")] if numbers else None
    if stated:
        return ordered(_stated(path, stated, names, as_text, as_numbers))

    ids = wnids(real.imagenet_indices)
    knowns = [order for order in (ids, real.class_names, info.class_names) if order]
    for order in knowns:
        if set(order) == set(names):
            return ordered(order)
        by_plain = {plain(name): name for name in names}
        if len(by_plain) == len(names) and set(map(plain, order)) == by_plain.keys():
            return ordered([by_plain[plain(name)] for name in order])
    if ids and all(map(_WNID.fullmatch, names)):
        others = sorted(set(names) - set(ids))
        raise UserError(
            f"{path} has {len(others)} {found.unit} of other classes than the data has "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})"
        )
    if numbers:
        return ordered(_by_number(path, found, real, names, numbers, as_text, as_numbers))
    if knowns:
        raise UserError(
            f"{path} calls its classes {_some(names)}, and the data calls them "
            f"{_some(knowns[-1])}: which is which is not known. State one of\n"
            f"  --config.{FLAG}=NAME,NAME,...   its names in the order of the data's labels"
            + (
                f"\n  --config.{FLAG}=numbers   its label 0 ({found.classes[0]}) is the data's "
                f"class 0, and so on"
                if found.numbered
                else f"\n  --config.{FLAG}=text   sorted as text, as ImageFolder has them: "
                f"{_some(as_text)}"
            )
        )
    if found.numbered:
        return np.array(present, np.int64)
    naturally = sorted(names, key=_natural)
    if naturally != as_text:
        warnings.warn(
            f"the numbers in the names of {path} say no order that is known; sorted as text, as "
            f"ImageFolder has them, they are {', '.join(as_text[:4])}, ..., by their numbers "
            f"{', '.join(naturally[:4])}, ...; --config.{FLAG}=NAME,NAME,... states another order",
            stacklevel=2,
        )
    return ordered(as_text)


def _stated(path, stated, names, as_text, as_numbers) -> Sequence[str]:
    if stated == ("text",):
        return as_text
    if stated == ("numbers",):
        return as_numbers or names
    if sorted(stated) != sorted(names):
        extra, missing = sorted(set(stated) - set(names)), sorted(set(names) - set(stated))
        raise UserError(
            f"{FLAG} names {len(stated)} classes, and {path} has {len(names)}: not in the set "
            f"{_some(extra)}; not named {_some(missing)}. Name each of its classes once, or say "
            f"{' or '.join(ORDERS)}"
        )
    return stated


def _by_number(path, found, real, names, numbers, as_text, as_numbers) -> Sequence[str]:
    """The names by the numbers in them."""
    count = len(names)
    if set(numbers) == set(range(count)):
        if not found.numbered and as_text != as_numbers:
            warnings.warn(
                f"the class folders are numbers without leading zeros; they are taken in numeric "
                f"order ({', '.join(as_numbers[:3])}, ...), where torchvision's ImageFolder sorts "
                f"them as text ({', '.join(as_text[:3])}, ...): --config.{FLAG}=text takes them so",
                stacklevel=2,
            )
        return as_numbers
    indices = real.imagenet_indices
    if indices is not None and set(indices) == set(numbers):
        by_number = dict(zip(numbers, names, strict=True))
        return [by_number[index] for index in indices]
    if set(numbers) == set(range(1, count + 1)):
        return as_numbers  # it counts from one; there is no class 0 that it could leave out
    raise UserError(
        f"{path} numbers its {count} classes {_some(as_numbers)}, neither 0 to {count - 1} nor "
        f"as ImageNet does the data's: which is which is not known. State one of\n"
        f"  --config.{FLAG}=numbers   in the order of their numbers: {_some(as_numbers)}\n"
        f"  --config.{FLAG}=NAME,NAME,...   in the order of the data's labels"
    )


def numbers_of(names: Sequence[str]) -> list[int] | None:
    """The number of each name, where all are one text and a number of their own."""
    if all(map(_WNID.fullmatch, names)):
        return None
    found = [_NUMBER.fullmatch(name) if name.isascii() else None for name in names]
    matches = [match for match in found if match is not None]
    if len(matches) < len(names) or len({match[1] for match in matches}) > 1:
        return None
    numbers = [int(match[2]) for match in matches]
    return numbers if len(set(numbers)) == len(numbers) else None


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:3]) + (", ..." if len(names) > 3 else "")) or "none"
