"""Random streams addressed by coordinates, never by history.

``stream(key, "recover/view", slot, block, step)`` is the same key whatever was drawn before
it, on whatever device, after whatever interruption. Nothing in the package splits a key and
carries the rest along.
"""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.types import Integer


def root(seed: Integer) -> jax.Array:
    """The experiment's root key: threefry, named so that a JAX default cannot change it."""
    return jax.random.key(seed, impl="threefry2x32")


def stream(key: jax.Array, name: str, *coordinates: Integer) -> jax.Array:
    """The key of one draw.

    Args:
      key: a typed key, usually ``root(seed)``.
      name: what is drawn ("recover/view"); static.
      *coordinates: where: Python ints or traced int32 scalars, non-negative.

    Returns:
      A typed key. Different names or coordinates give independent streams; the *number* of
      coordinates is part of the address, so ``(1,)`` and ``(1, 0)`` differ.
    """
    key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
    for coordinate in coordinates:
        key = jax.random.fold_in(key, jnp.asarray(coordinate, jnp.uint32))
    return key


def generator(seed: int, name: str, *coordinates: int) -> np.random.Generator:
    """The same idea on the host: a NumPy generator (Philox) for permutations and choices."""
    words = [seed, zlib.crc32(name.encode()), *coordinates]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))
