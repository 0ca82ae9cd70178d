"""Who supervises what: for each iteration, a weight per teacher for logits and for statistics."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from prism_jax.types import Array, Draw

MAX_OTHERS = 3  # slots beside the primary in the reference


def fixed(key: Array, num_teachers: int, primary: int) -> Draw:
    """The primary supervises alone: both its logits and its statistics (SRe2L)."""
    del key
    only = jnp.zeros((num_teachers,), jnp.float32).at[primary].set(1.0)
    return Draw(only, only)


def subset(key: Array, num_teachers: int, primary: int) -> Draw:
    """PRISM's draw: the primary, and up to three others without replacement.

    Each of ``min(3, others)`` slots is filled with probability 1/2 by a teacher not chosen yet
    (reference: n ~ Binomial(3, 1/2) others, uniformly). The statistics of the n + 1 teachers
    are averaged; the logits are the primary's alone.

    Args:
      key: the key of this draw.
      num_teachers: size of the pool.
      primary: index of the primary.

    Returns:
      Weights (T,), float32; the statistic weights sum to 1.
    """
    others = num_teachers - 1
    slots = min(MAX_OTHERS, others)
    count_key, order_key = jax.random.split(key)
    filled = jax.random.bernoulli(count_key, jnp.float32(0.5), (slots,)).sum(dtype=jnp.int32)
    rank_others = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (others,), jnp.float32)))
    chosen = jnp.insert((rank_others < filled).astype(jnp.float32), primary, 1.0)
    logits = jnp.zeros((num_teachers,), jnp.float32).at[primary].set(1.0)
    return Draw(logits, chosen / chosen.sum())


Sampler = Callable[[Array, int, int], Draw]
SAMPLERS: dict[str, Sampler] = {"fixed": fixed, "subset": subset}
