"""Mixes: CutMix and MixUp of a batch with itself, sampled as a record and then applied."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from prism_jax.types import Array, Mix

MIXES = ("none", "cutmix", "mixup")


def sample_mix(
    key: Array,
    batch: int,
    image_size: tuple[int, int],
    *,
    kind: str,
    alpha: float = 1.0,
) -> Mix:
    """Draw one mix for a batch: one partner permutation, one box or weight.

    CutMix (Yun et al., 2019): lambda ~ Beta(alpha, alpha), a box of side ratio
    ``sqrt(1 - lambda)`` centred uniformly and clipped to the image; ``weight`` is the share of
    pixels that stays, after clipping. MixUp (Zhang et al., 2018): ``weight`` is lambda.

    Args:
      batch: number of images.
      image_size: (height, width) in pixels.
      kind: "none", "cutmix" or "mixup".

    Raises:
      ValueError: another kind.
    """
    if kind not in MIXES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(MIXES)}")
    height, width = image_size
    one, empty = jnp.ones((), jnp.float32), jnp.zeros((4,), jnp.int32)
    if kind == "none":
        return Mix(jnp.arange(batch, dtype=jnp.int32), empty, one, one)
    partner_key, weight_key, row_key, column_key = jax.random.split(key, 4)
    # Sorting named-dtype draws: jax.random.permutation's index dtype depends on x64 mode.
    partner_B = jnp.argsort(jax.random.uniform(partner_key, (batch,), jnp.float32))
    partner_B = partner_B.astype(jnp.int32)
    lam = jax.random.beta(weight_key, jnp.float32(alpha), jnp.float32(alpha), (), jnp.float32)
    if kind == "mixup":
        return Mix(partner_B, empty, lam, lam)
    side = jnp.sqrt(1.0 - lam)
    half_h = (side * height).astype(jnp.int32) // 2
    half_w = (side * width).astype(jnp.int32) // 2
    row = jax.random.randint(row_key, (), 0, height, jnp.int32)
    column = jax.random.randint(column_key, (), 0, width, jnp.int32)
    box = jnp.stack(
        [
            jnp.clip(row - half_h, 0, height),
            jnp.clip(column - half_w, 0, width),
            jnp.clip(row + half_h, 0, height),
            jnp.clip(column + half_w, 0, width),
        ]
    )
    cut = ((box[2] - box[0]) * (box[3] - box[1])).astype(jnp.float32)
    return Mix(partner_B, box, 1.0 - cut / (height * width), one)


def apply_mix(images_BHWC: Array, mix: Mix) -> Array:
    """Blend every image with its partner, and paste the partner's box into it."""
    partners_BHWC = images_BHWC[mix.partner_B]
    blend = mix.blend.astype(images_BHWC.dtype)
    images_BHWC = blend * images_BHWC + (1.0 - blend) * partners_BHWC
    _, height, width, _ = images_BHWC.shape
    top, left, bottom, right = mix.box
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_HW = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
    return jnp.where(inside_HW[:, :, None], partners_BHWC, images_BHWC)
