"""What draws a sample beside its noise: its class, and further terms, each with its window.

A term is a direction in latent space. One step of a sampler subtracts

    weight * deviation * direction(estimate, anchor)

from where it would have gone, ``deviation`` being that of the posterior between the two levels
(a learned variance's where the sampler has one), as MGD3 does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.errors import UserError
from prism_jax.types import Array, PyTree


class Term(NamedTuple):
    """A row of ``TERMS`` at work; static in a trace.

    Attributes:
      window: the first and the last step at which it counts, both included. Steps are numbered
        as they are respaced, down to 0 (the last one), whatever the strength.
    """

    name: str
    weight: float
    window: tuple[int, int]


def mode(clean_BHWC: Array, anchors_BHWC: Array) -> Array:
    """Towards the anchor (MGD3, arXiv 2505.18963): the estimate minus it."""
    return clean_BHWC - anchors_BHWC


# (clean_BHWC, anchors_BHWC) -> what is subtracted.
TERMS: dict[str, Callable[[Array, Array], Array]] = {"mode": mode}


def weights(term: Term, steps: np.ndarray) -> np.ndarray:
    """A term's weight at numbered steps, float32: zero outside its window."""
    first, last = term.window
    return np.where((first <= steps) & (steps <= last), term.weight, 0.0).astype(np.float32)


def check(terms: Sequence[Term], steps: int, begun: int) -> None:
    """Refuse terms that are unknown or that would count at no step.

    Args:
      steps: of the sampler.
      begun: how many of them the strength leaves.

    Raises:
      UserError: such a term, before any work.
    """
    for term in terms:
        if term.name not in TERMS:
            raise UserError(f"the guidance term is {term.name!r}; allowed: {', '.join(TERMS)}")
        first, last = term.window
        if not 0 <= first <= last < steps:
            raise UserError(
                f"the window of guidance term {term.name!r} is {first} to {last}, but the steps "
                f"are numbered 0 (the last one) to {steps - 1}; choose a window among them"
            )
        if first >= begun:
            raise UserError(
                f"the window of guidance term {term.name!r} is {first} to {last}, but the strength "
                f"leaves steps {begun - 1} to 0 only; choose an earlier window or more strength"
            )


def classifier_free(
    predict: Callable[[Array, Array, PyTree], Array],
    noisy_BHWC: Array,
    time_B: Array,
    condition: PyTree,
    null: PyTree,
    *,
    guidance: float,
    channels: int,
) -> Array:
    """``null + guidance (condition - null)``, both read in one pass (arXiv 2207.12598).

    Args:
      predict: (noisy_BHWC, time_B, condition) -> prediction.
      null: the condition that says nothing; not looked at if ``guidance`` is 1.
      channels: the first so many are guided, the others are the condition's: a learned variance,
        and the fourth channel in DiT's released code.
    """
    if guidance == 1.0:
        return predict(noisy_BHWC, time_B, condition)
    twice = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)
    both = predict(jnp.concatenate([noisy_BHWC] * 2), jnp.concatenate([time_B] * 2), twice)
    with_class, without = jnp.split(both, 2)
    guided = without + guidance * (with_class - without)
    return jnp.concatenate([guided[..., :channels], with_class[..., channels:]], -1)
