"""Trees of Flax: ``.msgpack`` of flax.serialization, and ``.npz`` with names as "a/b/c"."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from prism_jax.data.weight_files import flax_vit
from prism_jax.data.weight_files.contents import Contents
from prism_jax.errors import UserError
from prism_jax.models.import_torch import to_torch, torch_name

COLLECTIONS = ("params", "batch_stats")


def read_msgpack(data: bytes) -> Contents:
    """Read what ``flax.serialization.to_bytes`` wrote."""
    tree = serialization.msgpack_restore(data)
    return Contents("Flax msgpack", tensors_of(tree), flax=True)


def read_npz(data: bytes) -> Contents:
    """Read an archive of arrays, without any that is pickled."""
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        try:
            arrays = {name: archive[name] for name in archive.files}
        except ValueError as error:
            if "allow_pickle" not in str(error):
                raise
            raise UserError(
                "it is an .npz with pickled objects in it, which are not run; save plain arrays: "
                "np.savez(path, **{'/'.join(names): array})"
            ) from None
    return Contents("NumPy .npz", tensors_of(arrays), flax=is_flax(arrays))


def is_flax(names: Iterable[str]) -> bool:
    """Whether names are of a Flax tree: "a/b/c", or its leaves' own."""
    return any("/" in name or name in ("kernel", "scale") for name in names)


def tensors_of(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    """A tree's arrays by the keys that lead to them, named and laid out as PyTorch's.

    The collections' names are left out, so that parameters and statistics stand together.
    """

    def walk(found: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        if isinstance(found, dict):
            for key, value in found.items():
                yield from walk(value, (*path, *str(key).split("/")))
        elif isinstance(found, (list, tuple)):
            for place, value in enumerate(found):
                yield from walk(value, (*path, str(place)))
        elif isinstance(found, np.ndarray):
            yield path, found

    tensors = {}
    for path, array in flax_vit.rename(dict(walk(tree, ()))).items():
        if array.dtype == np.dtype("V2"):  # how NumPy stores bfloat16
            array = array.view(jnp.bfloat16)
        at = next((i for i, key in enumerate(path) if key in COLLECTIONS), None)
        collection = "params" if at is None else path[at]
        *parents, leaf = path if at is None else path[:at] + path[at + 1 :]
        tensors[*parents, torch_name((collection, leaf))] = to_torch((leaf,), array)
    return tensors
