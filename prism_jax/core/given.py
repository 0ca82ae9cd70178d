"""What a caller of the Python API gives, looked at before anything is made of it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.errors import UserError
from prism_jax.types import AnyArray


def images(of: str, given: AnyArray) -> np.ndarray:
    """Images as uint8 (N, H, W, C); ``of`` is the function that they were given to.

    Raises:
      UserError: they are others.
    """
    found = np.asarray(given)
    if found.dtype != np.uint8 or found.ndim != 4:
        raise UserError(
            f"{of} got images of dtype {found.dtype} and shape {found.shape}; it needs uint8 "
            f"(N, H, W, C), not normalised: it does that itself"
        )
    return found


def labels(of: str, given: AnyArray, count: int, num_classes: int) -> np.ndarray:
    """One class per image, as int32.

    Raises:
      UserError: they are others. Off a CPU a label that is no class would be read as NaN, on one
        as another class.
    """
    found = np.asarray(given)
    whole = found.dtype.kind in "iuf" and np.array_equal(found, found.astype(np.int64))
    if not whole or found.shape != (count,):
        raise UserError(
            f"{of} got labels of dtype {found.dtype} and shape {found.shape}; it needs whole "
            f"numbers, one for each of the {count} images"
        )
    if count and not 0 <= found.min() <= found.max() < num_classes:
        raise UserError(
            f"{of} got labels from {found.min()} to {found.max()}; the network knows {num_classes} "
            f"classes, 0 to {num_classes - 1}"
        )
    return found.astype(np.int32)


def one_of(name: str, given: Any, allowed: Iterable[str]) -> None:
    """Check a word.

    Raises:
      UserError: it is none of those allowed.
    """
    known = list(allowed)
    if given not in known:
        near = difflib.get_close_matches(str(given).lower(), known, n=1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"{name} is {given!r}{meant}; allowed: {', '.join(known)}")


def fields_of(of: str, given: Iterable[str], recipe: type) -> None:
    """Check keywords: the names of a dataclass's fields.

    Raises:
      UserError: one of them is none.
    """
    for name in given:
        one_of(f"a keyword of {of}", name, [field.name for field in dataclasses.fields(recipe)])


def num_classes(module: nn.Module, image_shape: Sequence[int]) -> int:
    """How many logits a network has; nothing is computed."""

    def logits(images_BHWC: AnyArray) -> AnyArray:
        return module.init_with_output(jax.random.key(0), images_BHWC, train=False)[0]

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(logits, image).shape[-1]
