"""PyTorch's names and layout for flax variables, and back.

Module names are PyTorch's, so a tensor's name is the path of its leaf, joined with dots, and
one table of leaves serves every architecture. Files that name their tensors otherwise have a row
in ``layouts.LAYOUTS``.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.types import PyTree

LEAVES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


class Leaf(NamedTuple):
    """Where one tensor goes: its path from the collection on, its shapes here and in PyTorch."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    torch_shape: tuple[int, ...]


def from_state_dict(tensors: dict[str, np.ndarray], like: PyTree, dtype: np.dtype) -> PyTree:
    """Lay out tensors with our names as variables.

    Args:
      tensors: by name, in PyTorch's layout; just those of ``like``.
      like: variables, or their shapes.
      dtype: of the result.
    """

    def convert(keys: Any, leaf: Any) -> np.ndarray:
        path = _names(keys)
        tensor = tensors[torch_name(path)]
        if path[-1] == "kernel":
            tensor = tensor.transpose(*range(2, tensor.ndim), 1, 0)
        return np.ascontiguousarray(tensor.reshape(leaf.shape), dtype)

    return jax.tree_util.tree_map_with_path(convert, like)


def to_state_dict(variables: PyTree) -> dict[str, np.ndarray]:
    """Name and lay out variables as PyTorch does: the inverse of :func:`from_state_dict`.

    Returns:
      Tensors by name, in the dtypes given, without BatchNorm's counters.
    """
    flat = {_names(path): np.asarray(leaf) for path, leaf in _flatten(variables)}
    return {torch_name(path): to_torch(path, array) for path, array in flat.items()}


def torch_leaves(variables: PyTree) -> dict[str, Leaf]:
    """What a checkpoint of these variables (or their shapes) holds: name to leaf."""
    leaves = {}
    for keys, leaf in _flatten(variables):
        path = _names(keys)
        torch_shape = to_torch(path, np.broadcast_to(np.float32(0), leaf.shape)).shape
        leaves[torch_name(path)] = Leaf(path, leaf.shape, torch_shape)
    return leaves


def _flatten(variables: PyTree) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(variables)[0]


def _names(keys: Any) -> tuple[str, ...]:
    return tuple(key.key for key in keys)


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of the leaf at a path, of which the first part is the collection."""
    collection, *parents, leaf = path
    return ".".join([*parents, LEAVES.get((collection, leaf), leaf)])


def to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """A leaf's values as PyTorch lays them out."""
    if (
        path[-1] == "kernel" and array.ndim > 1
    ):  # HWIO to OIHW, or inputs by features the other way round
        return array.transpose(array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))
    if path[-1].endswith("layer_scale"):
        return array.reshape(-1, 1, 1)
    return array


@functools.lru_cache(maxsize=64)  # a deep network takes a second, and a run asks many times
def variable_shapes(module: nn.Module, image_shape: tuple[int, int, int]) -> PyTree:
    """The shapes of a network's variables for images of (height, width, channels).

    To be read only: whoever asks again is given the same tree.
    """
    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), images_BHWC)
