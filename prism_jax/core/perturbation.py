"""Perturbed teachers: a few steps uphill in the cross entropy, before a batch begins (DWA)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prism_jax.types import Array, PyTree


def ascend(
    loss: Callable[[PyTree, Array], Array], params: PyTree, images_BHWC: Array, *, length: float
) -> tuple[PyTree, Array]:
    """Move all weights together by one step of a given length, uphill.

        w <- w + length g / (||g|| + 1e-12),    g = d loss / d w

    DWA does it K times with ``length = rho / K`` before a batch's first iteration.

    Args:
      loss: of (params, images).

    Returns:
      The weights, and the gradient by the images at the weights before (the released code
      leaves it in the images' gradient).
    """
    by_weights, by_images_BHWC = jax.grad(loss, argnums=(0, 1))(params, images_BHWC)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(by_weights)))
    rate = length / (norm + 1e-12)
    return jax.tree.map(lambda w, g: w + rate * g, params, by_weights), by_images_BHWC
