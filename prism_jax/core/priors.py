"""Terms of the image side that need no statistics of a network; all are unweighted scalars."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from prism_jax.core.statistics import safe_norm
from prism_jax.models.layers import adaptive_avg_pool
from prism_jax.types import Array

DENSITY_SIZE = 32  # side to which images are pooled before they are compared
DENSITY_TEMPERATURE = 4.0
FLATNESS_TEMPERATURE = 4.0


def total_variation(images_BHWC: Array, images_per_class: int) -> Array:
    """Sum of four norms of differences: horizontal, vertical and both diagonals (SRe2L)."""
    del images_per_class
    x = images_BHWC
    differences = (
        x[:, :, :-1] - x[:, :, 1:],
        x[:, :-1] - x[:, 1:],
        x[:, 1:, :-1] - x[:, :-1, 1:],
        x[:, :-1, :-1] - x[:, 1:, 1:],
    )
    return sum(map(safe_norm, differences))  # type: ignore[return-value]  # four of them: no 0


def image_l2(images_BHWC: Array, images_per_class: int) -> Array:
    """Mean over the batch of every image's norm (SRe2L)."""
    del images_per_class
    return jax.vmap(safe_norm)(images_BHWC).mean()


def densification(images_BHWC: Array, images_per_class: int) -> Array:
    """Spread the eigenvalues of every class's Gram matrix (G-VBSM, "data densification").

        sum_classes KL( stop_gradient(softmax(e / 4)) || softmax(e) )

    where e are the eigenvalues of the Gram matrix of the class's images, pooled to 32 x 32.

    Args:
      images_BHWC: class by class, ``images_per_class`` of each.
    """
    pooled = adaptive_avg_pool(images_BHWC, DENSITY_SIZE)
    x = pooled.reshape(-1, images_per_class, pooled[0].size)
    gram = jnp.einsum("kid,kjd->kij", x, x, precision=lax.Precision.HIGHEST)
    eigenvalues = jnp.linalg.eigvalsh(gram)
    teacher = jax.nn.log_softmax(lax.stop_gradient(eigenvalues) / DENSITY_TEMPERATURE)
    student = jax.nn.log_softmax(eigenvalues)
    return (jnp.exp(teacher) * (teacher - student)).sum()


# Terms of the viewed images alone.
PRIORS: dict[str, Callable[[Array, int], Array]] = {
    "total_variation": total_variation,
    "image_l2": image_l2,
    "densification": densification,
}


def flatness(logits_BK: Array, average_logits_BK: Array) -> Array:
    """``KL(softmax(a / 4) || softmax(z / 4))`` towards the logits a of averaged images (EDC).

    The mean is over images *and* classes, as released; no gradient flows into ``a``.
    """
    target = jax.nn.log_softmax(lax.stop_gradient(average_logits_BK) / FLATNESS_TEMPERATURE)
    log_p = jax.nn.log_softmax(logits_BK / FLATNESS_TEMPERATURE)
    return (jnp.exp(target) * (target - log_p)).mean()
