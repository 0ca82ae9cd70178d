"""Combining the logits of several label teachers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from prism_jax.types import AnyArray, Array


def single(logits_TBK: Array, votes_T: AnyArray | None = None) -> Array:
    """One teacher's logits."""
    del votes_T
    if logits_TBK.shape[0] != 1:
        raise ValueError(f"'single' takes one teacher, not {logits_TBK.shape[0]}")
    return logits_TBK[0]


def mean(logits_TBK: Array, votes_T: AnyArray | None = None) -> Array:
    """Plain mean (EDC)."""
    del votes_T
    return logits_TBK.mean(0)


def norm_mean(logits_TBK: Array, votes_T: AnyArray | None = None) -> Array:
    """Mean of logits rescaled to a common norm (released PRISM for ResNet-18; G-VBSM).

    Each teacher's Frobenius norm over the batch becomes the mean of the teachers' norms.
    """
    del votes_T
    norms_T = jnp.sqrt(jnp.square(logits_TBK).sum((1, 2)))
    return (logits_TBK * (norms_T.mean() / norms_T)[:, None, None]).mean(0)


def half_primary(logits_TBK: Array, votes_T: AnyArray | None = None) -> Array:
    """Half the first teacher, half the mean of the others, then one norm for all images.

    Released PRISM for ResNet-50 and -101: every image's logit vector is rescaled to the batch
    mean of the norms.
    """
    del votes_T
    if logits_TBK.shape[0] < 2:
        raise ValueError("'half_primary' takes two teachers or more")
    mixed_BK = 0.5 * logits_TBK[0] + 0.5 * logits_TBK[1:].mean(0)
    norms_B = jnp.sqrt(jnp.square(mixed_BK).sum(1))
    return mixed_BK * (norms_B.mean() / norms_B)[:, None]


def committee(logits_TBK: Array, votes_T: AnyArray | None = None) -> Array:
    """Sum weighted by the teachers' votes, which sum to one (CV-DD)."""
    if votes_T is None or len(votes_T) != logits_TBK.shape[0]:
        raise ValueError("'committee' takes one vote per teacher")
    return (logits_TBK * votes_T[:, None, None]).sum(0)


def votes(priors: Sequence[float], temperature: float) -> np.ndarray:
    """``softmax(priors / temperature)``, float32 (T,): how much each teacher's logits count.

    A prior is the accuracy, in percent, of a student trained on what was distilled from that
    teacher alone (CV-DD; its temperature is 10 for labels).
    """
    scores_T = np.asarray(priors, np.float64) / temperature
    shares_T = np.exp(scores_T - scores_T.max())
    return (shares_T / shares_T.sum()).astype(np.float32)


ENSEMBLES: dict[str, Callable[[Array, AnyArray | None], Array]] = {
    "single": single,
    "mean": mean,
    "norm_mean": norm_mean,
    "half_primary": half_primary,
    "committee": committee,
}
