"""Who supervises what: for each iteration, a weight per teacher."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.types import Array, Integer

MEMBERS = 2  # of a committee (CV-DD)


class Place(NamedTuple):
    """Where in a run a draw is made; scalars, int32.

    Attributes:
      slot: first slot of the batch.
      iteration: counted over all batches, in the order in which they are worked on.
    """

    slot: Integer
    iteration: Integer


@dataclasses.dataclass(frozen=True)
class Roles:
    """What a sampler must know of the pool; static in a trace.

    Attributes:
      size: teachers in the pool.
      primary: index of the primary.
      others: how many others ``subset`` may add to it.
      probability: with which each of those slots is filled.
      committee: how ``committee`` finds its two members: "best", "listed" or "random".
      priors: one score per teacher, in percent; None: equal votes.
      temperature: of the softmax that turns scores into votes.
    """

    size: int
    primary: int = 0
    others: int = 3
    probability: float = 0.5
    committee: str = "random"
    priors: tuple[float, ...] | None = None
    temperature: float = 5.0


def fixed(key: Array, place: Place, roles: Roles) -> Array:
    """The primary alone (SRe2L)."""
    del key, place
    return jnp.zeros((roles.size,), jnp.float32).at[roles.primary].set(1.0)


def subset(key: Array, place: Place, roles: Roles) -> Array:
    """PRISM's draw: the primary, and some others without replacement, averaged.

    Each of ``min(others, size - 1)`` slots is filled with a probability by a teacher not chosen
    yet (reference: n ~ Binomial(3, 1/2) others, uniformly). With probability 1 it is exactly so
    many others.
    """
    del place
    others = roles.size - 1
    slots = min(roles.others, others)
    count_key, order_key = jax.random.split(key)
    probability = jnp.float32(roles.probability)
    filled = jax.random.bernoulli(count_key, probability, (slots,)).sum(dtype=jnp.int32)
    rank_others = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (others,), jnp.float32)))
    chosen = jnp.insert((rank_others < filled).astype(jnp.float32), roles.primary, 1.0)
    return chosen / chosen.sum()


def round_robin(key: Array, place: Place, roles: Roles) -> Array:
    """One after the other, in the pool's order (G-VBSM, EDC, FADRM)."""
    del key
    turn = jnp.mod(place.iteration, roles.size)
    return (jnp.arange(roles.size, dtype=jnp.int32) == turn).astype(jnp.float32)


def uniform(key: Array, place: Place, roles: Roles) -> Array:
    """All of them, averaged."""
    del key, place
    return jnp.full((roles.size,), 1 / roles.size, jnp.float32)


def committee(key: Array, place: Place, roles: Roles) -> Array:
    """Two teachers, who vote with their prior performance (CV-DD, sections A.2 and A.3).

    "best" takes those of the highest priors, "listed" goes through all pairs with the slot,
    "random" draws a pair. The votes are ``softmax(prior / temperature)`` over the two.
    """
    count = min(MEMBERS, roles.size)
    scores = np.asarray(roles.priors or [0.0] * roles.size)
    pairs = np.array(list(itertools.combinations(range(roles.size), count)))
    if roles.committee == "best":
        pairs = np.sort(np.argsort(-scores, kind="stable")[:count])[None]
    weights_PT = np.zeros((len(pairs), roles.size))
    for row, pair in zip(weights_PT, pairs, strict=True):
        votes = np.exp((scores[pair] - scores[pair].max()) / roles.temperature)
        row[pair] = votes / votes.sum()
    picked = jnp.mod(place.slot, len(pairs))
    if roles.committee == "random":
        picked = jax.random.randint(key, (), 0, len(pairs), jnp.int32)
    return jnp.asarray(weights_PT, jnp.float32)[picked]


Sampler = Callable[[Array, Place, Roles], Array]
SAMPLERS: dict[str, Sampler] = {
    "fixed": fixed,
    "subset": subset,
    "round_robin": round_robin,
    "uniform": uniform,
    "committee": committee,
}
COMMITTEES = ("best", "listed", "random")
