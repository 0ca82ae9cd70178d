"""Views: a random resized crop, a flip and a roll, sampled as a record and then applied.

A view is two matrix products, one for the rows and one for the columns, in which the bilinear
resize of the crop, the flip and the roll are folded together. Its gradient is the transposed
products: no gather, no scatter, and so deterministic on every backend.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from prism_jax.types import Array, View

TRIES = 10  # torchvision's RandomResizedCrop


def sample_view(
    key: Array,
    image_size: tuple[int, int],
    *,
    crop_scale: tuple[float | Array, float | Array] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool,
    roll: int,
    batch: int | None = None,
) -> View:
    """Draw a view as torchvision's RandomResizedCrop and RandomHorizontalFlip do, and a roll.

    Args:
      key: the key of this draw.
      image_size: (height, width) in pixels.
      crop_scale: bounds of the crop's share of the area, uniform; may be traced scalars.
      crop_ratio: bounds of width / height, log-uniform.
      flip: whether to flip with probability 1/2.
      roll: the largest shift in pixels, per axis uniform in {0, ..., roll}.
      batch: None for one view of the whole batch, or a number for one view per image.

    Returns:
      A ``View`` of scalars, or with a leading axis of ``batch``.
    """
    shape = () if batch is None else (batch,)
    area_key, ratio_key, top_key, left_key, flip_key, roll_key = jax.random.split(key, 6)
    crop = _sample_crop(
        (area_key, ratio_key, top_key, left_key), shape, image_size, crop_scale, crop_ratio
    )
    flips = jnp.zeros(shape, jnp.bool)
    if flip:
        flips = jax.random.bernoulli(flip_key, jnp.float32(0.5), shape)
    rolls = jnp.zeros((*shape, 2), jnp.int32)
    if roll:
        rolls = jax.random.randint(roll_key, (*shape, 2), 0, roll + 1, jnp.int32)
    return View(crop, flips, rolls)


def _sample_crop(keys, shape, image_size, crop_scale, crop_ratio) -> Array:
    """The first of ten tries that fits, else the largest centred crop of an allowed ratio."""
    area_key, ratio_key, top_key, left_key = keys
    height, width = image_size

    def uniform(key, low, high):
        unit = jax.random.uniform(key, (*shape, TRIES), jnp.float32)
        return jnp.float32(low) + unit * (jnp.float32(high) - jnp.float32(low))

    area = jnp.float32(height * width) * uniform(area_key, *crop_scale)
    ratio = jnp.exp(uniform(ratio_key, *jnp.log(jnp.asarray(crop_ratio, jnp.float32))))
    w = jnp.round(jnp.sqrt(area * ratio)).astype(jnp.int32)
    h = jnp.round(jnp.sqrt(area / ratio)).astype(jnp.int32)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = jnp.argmax(fits, axis=-1)[..., None]
    w, h = (jnp.take_along_axis(x, first, -1)[..., 0] for x in (w, h))

    # torchvision's fallback: the whole image, narrowed to the nearest allowed ratio.
    low, high = crop_ratio
    if width / height < low:
        fallback = (round(width / low), width)
    elif width / height > high:
        fallback = (height, round(height * high))
    else:
        fallback = (height, width)
    found = fits.any(-1)
    h = jnp.where(found, h, fallback[0])
    w = jnp.where(found, w, fallback[1])

    def offset(key, space):
        unit = jax.random.uniform(key, shape, jnp.float32)
        drawn = jnp.floor(unit * (space + 1).astype(jnp.float32)).astype(jnp.int32)
        return jnp.where(found, jnp.minimum(drawn, space), space // 2)

    top, left = offset(top_key, height - h), offset(left_key, width - w)
    return jnp.stack([top, left, h, w], axis=-1).astype(jnp.float32)


def identity_view(image_size: tuple[int, int], batch: int | None = None) -> View:
    """The view that shows the whole image as it is."""
    shape = () if batch is None else (batch,)
    box = jnp.asarray([0, 0, *image_size], jnp.float32)
    return View(
        jnp.broadcast_to(box, (*shape, 4)),
        jnp.zeros(shape, jnp.bool),
        jnp.zeros((*shape, 2), jnp.int32),
    )


def apply_view(images_BHWC: Array, view: View) -> Array:
    """Show images through a view: crop, bilinear resize to the same size, flip, roll.

    Interpolates between pixel centres and *inside* the crop box, as cropping first and then
    resizing does.

    Args:
      images_BHWC: floating point.
      view: of scalars, or with a leading axis B.

    Returns:
      images_BHWC of the same shape and dtype.
    """
    _, height, width, _ = images_BHWC.shape
    top, left, h, w = (view.crop[..., i] for i in range(4))
    never = jnp.zeros_like(view.flip)
    rows = _resize_matrix(height, top, h, never, view.roll[..., 0], images_BHWC.dtype)
    columns = _resize_matrix(width, left, w, view.flip, view.roll[..., 1], images_BHWC.dtype)
    per_image = "b" if view.flip.ndim else ""
    return jnp.einsum(
        f"{per_image}ih,bhwc,{per_image}jw->bijc", rows, images_BHWC, columns,
        precision=lax.Precision.HIGHEST,
    )  # fmt: skip


def _resize_matrix(size: int, start, length, flip, roll, dtype) -> Array:
    """The (..., size, size) matrix of one axis: output position by input pixel."""
    at = jnp.arange(size, dtype=jnp.int32)
    source = jnp.mod(at - roll[..., None], size)
    source = jnp.where(flip[..., None], size - 1 - source, source).astype(dtype)
    length, start = length[..., None].astype(dtype), start[..., None].astype(dtype)
    inside = jnp.clip((source + 0.5) * (length / size) - 0.5, 0.0, length - 1.0)
    distance = jnp.abs((start + inside)[..., None] - at.astype(dtype))
    return jnp.maximum(0.0, 1.0 - distance)
