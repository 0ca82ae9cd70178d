"""Combining the logits of several label teachers."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from prism_jax.types import Array


def single(logits_TBK: Array) -> Array:
    """One teacher's logits."""
    if logits_TBK.shape[0] != 1:
        raise ValueError(f"'single' takes one teacher, not {logits_TBK.shape[0]}")
    return logits_TBK[0]


def mean(logits_TBK: Array) -> Array:
    """Plain mean (EDC)."""
    return logits_TBK.mean(0)


def norm_mean(logits_TBK: Array) -> Array:
    """Mean of logits rescaled to a common norm (released PRISM for ResNet-18; G-VBSM).

    Each teacher's Frobenius norm over the batch becomes the mean of the teachers' norms.
    """
    norms_T = jnp.sqrt(jnp.square(logits_TBK).sum((1, 2)))
    return (logits_TBK * (norms_T.mean() / norms_T)[:, None, None]).mean(0)


def half_primary(logits_TBK: Array) -> Array:
    """Half the first teacher, half the mean of the others, then one norm for all images.

    Released PRISM for ResNet-50 and -101: every image's logit vector is rescaled to the batch
    mean of the norms.
    """
    if logits_TBK.shape[0] < 2:
        raise ValueError("'half_primary' takes two teachers or more")
    mixed_BK = 0.5 * logits_TBK[0] + 0.5 * logits_TBK[1:].mean(0)
    norms_B = jnp.sqrt(jnp.square(mixed_BK).sum(1))
    return mixed_BK * (norms_B.mean() / norms_B)[:, None]


ENSEMBLES: dict[str, Callable[[Array], Array]] = {
    "single": single,
    "mean": mean,
    "norm_mean": norm_mean,
    "half_primary": half_primary,
}
