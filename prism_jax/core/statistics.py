"""Batch statistics against running statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import traverse_util

from prism_jax.errors import UserError
from prism_jax.types import Array, PyTree


def safe_norm(x: Array) -> Array:
    """The Euclidean norm of all elements, with a gradient of 0 (not NaN) at 0.

    NaN and Inf stay what they are, so that a loss made of norms still shows them. In float32
    squares below 1e-38 count as 0 and above 3e38 as Inf.
    """
    square = jnp.sum(jnp.square(x))
    zero = square == 0  # False for NaN, unlike the negation of square > 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def bn_alignment(
    statistics: PyTree,
    running: PyTree,
    *,
    first: tuple[str, ...],
    first_multiplier: float,
    variance_weight: float = 1.0,
) -> Array:
    """Distance of a batch's BatchNorm statistics from the running ones.

        sum_l w_l ( ||mean_l - running_mean_l|| + variance_weight ||var_l - running_var_l|| )

    Norms are not squared, variances biased, ``w`` is ``first_multiplier`` for the first layer
    and 1 for the others (DeepInversion; SRe2L; PRISM, equation of the recover loss).

    Args:
      statistics: nested dict with leaves "mean" and "var" (C,) per layer: the batch's.
      running: the same for the running statistics ("batch_stats").
      first: path of the first layer.

    Returns:
      A scalar.

    Raises:
      UserError: the two trees name different layers, or ``first`` is none of them.
    """
    batch = _layers(statistics)
    target = _layers(running)
    if batch.keys() != target.keys():
        odd = sorted("/".join(path) for path in batch.keys() ^ target.keys())
        raise UserError(
            f"batch and running statistics name different layers ({', '.join(odd[:5])}); every "
            f"BatchNorm must be models.layers.BatchNorm and be called exactly once"
        )
    if first not in batch:
        raise UserError(
            f"no BatchNorm at {'/'.join(first)}; there are: "
            f"{', '.join('/'.join(path) for path in batch)}"
        )
    total = jnp.zeros((), jax.tree.leaves(statistics)[0].dtype)
    for path in sorted(batch):
        mean = safe_norm(batch[path]["mean"] - target[path]["mean"])
        var = safe_norm(batch[path]["var"] - target[path]["var"])
        total += (first_multiplier if path == first else 1.0) * (mean + variance_weight * var)
    return total


def _layers(tree: PyTree) -> dict[tuple[str, ...], dict[str, Array]]:
    layers: dict[tuple[str, ...], dict[str, Array]] = {}
    for path, leaf in traverse_util.flatten_dict(tree).items():
        layers.setdefault(path[:-1], {})[path[-1]] = leaf
    return layers
