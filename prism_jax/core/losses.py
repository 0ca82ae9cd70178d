"""Losses on logits: the image side's cross entropy, and what students are trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prism_jax import parallel
from prism_jax.core.statistics import safe_norm
from prism_jax.types import AnyArray, Array


class Targets(NamedTuple):
    """What a student is told about a batch.

    Attributes:
      labels_B: hard labels of the images before mixing.
      partners_B: hard labels of their mix partners.
      weight: () or (B,) float32, the share of an image's own pixels in its mix; 1 without one.
      logits_BK: the teachers' logits for the mixed images, or None.
      importance_B: how much each image counts, 1 on average over the set; None: alike.
    """

    labels_B: AnyArray
    partners_B: AnyArray
    weight: AnyArray
    logits_BK: AnyArray | None = None
    importance_B: AnyArray | None = None


def average(losses: AnyArray, targets: Targets) -> Array:
    """The mean of losses (B,) or (B, K), each image's times its importance."""
    if targets.importance_B is not None:
        losses = losses * targets.importance_B.reshape(-1, *[1] * (losses.ndim - 1))
    return jnp.mean(losses)


def cross_entropy(logits_BK: Array, labels_B: AnyArray) -> Array:
    """Mean over the batch of ``-log softmax(logits)[label]``."""
    return cross_entropies(logits_BK, labels_B).mean()


def cross_entropies(logits_BK: Array, labels_B: AnyArray) -> Array:
    """``-log softmax(logits)[label]`` of each image."""
    log_probabilities_BK = jax.nn.log_softmax(logits_BK)
    if parallel.platform() != "cpu":  # picking is a scatter in the gradient: six launches on a GPU
        classes_K = jnp.arange(logits_BK.shape[1])
        own_BK = labels_B[:, None] == classes_K
        picked_B = jnp.where(own_BK, log_probabilities_BK, 0.0).sum(1)
        there_B = (labels_B >= 0) & (labels_B < len(classes_K))
        return -jnp.where(there_B, picked_B, jnp.nan)
    picked_B1 = jnp.take_along_axis(log_probabilities_BK, labels_B[:, None].astype(jnp.int32), 1)
    return -picked_B1[:, 0]


def mse_gt(student_BK: Array, targets: Targets, *, ce_weight: float, temperature: float) -> Array:
    """Mean squared error of raw logits plus ``ce_weight`` times the hard label's cross entropy.

    PRISM, G-VBSM and EDC train with it (``train_FKD``'s ``mse_gt``). The temperature has no part.
    """
    del temperature
    assert targets.logits_BK is not None
    loss = average(jnp.square(student_BK - targets.logits_BK), targets)
    if ce_weight:
        # Reference: the label is the unmixed image's own; its mix partner's is ignored.
        loss += ce_weight * average(cross_entropies(student_BK, targets.labels_B), targets)
    return loss


def kl(student_BK: Array, targets: Targets, *, ce_weight: float, temperature: float) -> Array:
    """Batch mean of ``KL(softmax(teacher / T) || softmax(student / T))``, without a factor T^2.

    SRe2L, CDA, RDED and DELT train with it.
    """
    assert targets.logits_BK is not None
    teacher_BK = jax.nn.log_softmax(targets.logits_BK / temperature)
    log_student_BK = jax.nn.log_softmax(student_BK / temperature)
    loss = average((jnp.exp(teacher_BK) * (teacher_BK - log_student_BK)).sum(-1), targets)
    if ce_weight:
        loss += ce_weight * average(cross_entropies(student_BK, targets.labels_B), targets)
    return loss


def kl_t2(student_BK: Array, targets: Targets, *, ce_weight: float, temperature: float) -> Array:
    """``kl`` with the divergence multiplied by T^2 (Hinton et al., 2015)."""
    loss = temperature**2 * kl(student_BK, targets, ce_weight=0.0, temperature=temperature)
    if ce_weight:
        loss += ce_weight * average(cross_entropies(student_BK, targets.labels_B), targets)
    return loss


def dist(student_BK: Array, targets: Targets, *, ce_weight: float, temperature: float) -> Array:
    """DIST (Huang et al., 2022): the Pearson relations of the two tables of probabilities.

        T^2 (1 - mean_b r(s_b, t_b))  +  T^2 (1 - mean_k r(s_k, t_k))

    with s, t = softmax(logits / T), rows b (inter-class) and columns k (intra-class), both terms
    with weight 1. The columns make it depend on which images are in a batch together, so images
    cannot count differently.
    """
    assert targets.logits_BK is not None and targets.importance_B is None
    s_BK, t_BK = (
        jax.nn.softmax(logits_BK / temperature) for logits_BK in (student_BK, targets.logits_BK)
    )
    inter = 1.0 - pearson(s_BK, t_BK).mean()
    intra = 1.0 - pearson(s_BK.T, t_BK.T).mean()
    loss = temperature**2 * (inter + intra)
    if ce_weight:
        loss += ce_weight * average(cross_entropies(student_BK, targets.labels_B), targets)
    return loss


def pearson(these: Array, those: Array) -> Array:
    """Correlation of each row with its counterpart; 0 (and no NaN gradient) for a constant row."""
    these, those = (x - x.mean(-1, keepdims=True) for x in (these, those))
    norms = jax.vmap(safe_norm)(these) * jax.vmap(safe_norm)(those)
    return (these * those).sum(-1) / (norms + 1e-8)  # Reference: the epsilon of DIST's code.


def ce(student_BK: Array, targets: Targets, *, ce_weight: float, temperature: float) -> Array:
    """Cross entropy with the hard labels, mixed as the pixels were; soft labels have no part."""
    del ce_weight, temperature
    own_B = cross_entropies(student_BK, targets.labels_B)
    partner_B = cross_entropies(student_BK, targets.partners_B)
    return average(targets.weight * own_B + (1.0 - targets.weight) * partner_B, targets)


STUDENT_LOSSES: dict[str, Callable[..., Array]] = {
    "mse_gt": mse_gt,
    "kl": kl,
    "kl_t2": kl_t2,
    "dist": dist,
    "ce": ce,
}
