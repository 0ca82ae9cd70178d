"""Mixes: CutMix and MixUp of a batch with itself, sampled as a record and then applied."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.types import Array, Mix

MIXES = ("none", "cutmix", "mixup")
LAMBDAS = 2**12  # equally probable values of lambda to draw from


def sample_mix(
    key: Array,
    batch: int,
    image_size: tuple[int, int],
    *,
    kind: str,
    alpha: float = 1.0,
    per_image: bool = False,
) -> Mix:
    """Draw a mix for a batch: one partner permutation, and one box or weight, or one per image.

    CutMix (Yun et al., 2019): lambda ~ Beta(alpha, alpha), a box of side ratio
    ``sqrt(1 - lambda)`` centred uniformly and clipped to the image; ``weight`` is the share of
    pixels that stays, after clipping. MixUp (Zhang et al., 2018): ``weight`` is lambda.

    Args:
      key: the key of this draw.
      batch: number of images.
      image_size: (height, width) in pixels.
      kind: "none", "cutmix" or "mixup".
      alpha: static and positive; MixUp is usually run with 0.8.
      per_image: draw a lambda and a box for every image instead of one for all (reference: one).

    Raises:
      ValueError: another kind.
    """
    from scipy import special  # a fifth of a second, which most runs can do without at first

    if kind not in MIXES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(MIXES)}")
    height, width = image_size
    shape = (batch,) if per_image else ()
    one, empty = jnp.ones(shape, jnp.float32), jnp.zeros((*shape, 4), jnp.int32)
    if kind == "none":
        return Mix(jnp.arange(batch, dtype=jnp.int32), empty, one, one)
    # Teacher and student draw the same mix in two programs and must agree to the bit. A beta
    # variate computed on the device differs in its last bits from program to program; so the
    # draw is of integers, and the quantiles of lambda are a table made here, in float64.
    bits = jax.random.bits(key, (batch + 3 * (batch if per_image else 1),), jnp.uint32)
    partner_B = jnp.argsort(bits[:batch]).astype(jnp.int32)
    draws = bits[batch:].reshape(3, *shape)
    pick, row, column = (
        (draw % jnp.uint32(count)).astype(jnp.int32)
        for draw, count in zip(draws, (LAMBDAS, height, width), strict=True)
    )
    lam = special.betaincinv(alpha, alpha, (np.arange(LAMBDAS) + 0.5) / LAMBDAS)
    if kind == "mixup":
        weight = jnp.asarray(lam, jnp.float32)[pick]
        return Mix(partner_B, empty, weight, weight)
    halves = np.outer(np.sqrt(1.0 - lam), image_size).astype(np.int32) // 2
    half_h, half_w = jnp.moveaxis(jnp.asarray(halves, jnp.int32)[pick], -1, 0)
    box = jnp.stack(
        [
            jnp.clip(row - half_h, 0, height),
            jnp.clip(column - half_w, 0, width),
            jnp.clip(row + half_h, 0, height),
            jnp.clip(column + half_w, 0, width),
        ],
        axis=-1,
    )
    kept = height * width - (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])
    # Times the reciprocal: a compiler may turn a division by a constant into that, or may not.
    weight = kept.astype(jnp.float32) * jnp.float32(1 / (height * width))
    return Mix(partner_B, box, weight, one)


def apply_mix(images_BHWC: Array, mix: Mix) -> Array:
    """Blend every image with its partner, and paste the partner's box into it."""
    partners_BHWC = images_BHWC[mix.partner_B]
    blend = jnp.asarray(mix.blend, images_BHWC.dtype)[..., None, None, None]
    images_BHWC = blend * images_BHWC + (1.0 - blend) * partners_BHWC
    _, height, width, _ = images_BHWC.shape
    top, left, bottom, right = (mix.box[..., i, None] for i in range(4))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_H = (rows >= top) & (rows < bottom)
    inside_W = (columns >= left) & (columns < right)
    inside = inside_H[..., :, None, None] & inside_W[..., None, :, None]
    return jnp.where(inside, partners_BHWC, images_BHWC)
