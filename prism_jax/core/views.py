"""Views: a random resized crop, a flip and a roll, sampled as a record and then applied.

A view is two matrix products, one for the rows and one for the columns, in which the bilinear
resize of the crop, the flip and the roll are folded together. Its gradient is the transposed
products: no gather, no scatter, and so deterministic on every backend.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from prism_jax import parallel
from prism_jax.types import AnyArray, Array, View

TRIES = 10  # torchvision's RandomResizedCrop
SHARES = 2**20  # steps in which the share of the area is drawn
RATIOS = 2**12  # equally probable ratios to draw from


def sample_view(
    key: Array,
    image_size: tuple[int, ...],
    *,
    crop_scale: tuple[float | Array, float | Array] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    crop_pad: int | None = None,
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
      crop_pad: in place of a resized crop, torchvision's RandomCrop with this padding of zeros:
        a shift by up to so many pixels either way.
      flip: whether to flip with probability 1/2.
      roll: the largest shift in pixels, per axis uniform in {0, ..., roll}.
      batch: None for one view of the whole batch, or a number for one view per image.

    Returns:
      A ``View`` of scalars, or with a leading axis of ``batch``.
    """
    # Two programs that draw the same view (a teacher's, a student's) must agree to the bit, but
    # a compiler may fuse ``a + u * b`` or an ``exp`` differently in each. So everything is drawn
    # as integers, in one go; what is left are single, correctly rounded operations.
    shape = () if batch is None else (batch,)
    bits = jax.random.bits(key, (*shape, 2 * TRIES + 5), jnp.uint32)
    share, ratio, offset, flips, rolls = jnp.split(
        bits, np.cumsum([TRIES, TRIES, 2, 1]).tolist(), axis=-1
    )
    if crop_pad is None:
        crop = _crop(share, ratio, offset, image_size, crop_scale, crop_ratio)
    else:
        start = _below(offset, 2 * crop_pad + 1) - crop_pad
        size = jnp.broadcast_to(jnp.asarray(image_size, jnp.int32), start.shape)
        crop = jnp.concatenate([start, size], axis=-1).astype(jnp.float32)
    flips, rolls = _below(flips[..., 0], 2) == 1, _below(rolls, roll + 1)
    return View(crop, flips if flip else jnp.zeros_like(flips), rolls)


def _below(bits: Array, count: int | Array) -> Array:
    """Random bits as int32 in [0, count), uniform up to count / 2^32."""
    return (bits % jnp.asarray(count).astype(jnp.uint32)).astype(jnp.int32)


def _crop(share, ratio, offset, image_size, crop_scale, crop_ratio) -> Array:
    """The first of ten tries that fits, else the largest centred crop of an allowed ratio.

    ``share``, ``ratio`` (..., TRIES) and ``offset`` (..., 2) are random bits.
    """
    low, high = (jnp.round(jnp.float32(x) * SHARES).astype(jnp.int32) for x in crop_scale)
    share = (low + _below(share, high - low + 1)).astype(jnp.float32)
    side = jnp.sqrt(share * jnp.float32(np.prod(image_size) / SHARES))
    middles = (np.arange(RATIOS) + 0.5) / RATIOS
    log_ratio = np.interp(middles, [0, 1], np.log(crop_ratio))
    stretches = np.exp(np.outer(log_ratio, [-0.5, 0.5]))  # of height and width, at equal area
    stretch = jnp.asarray(stretches, jnp.float32)[_below(ratio, RATIOS)]
    sizes = jnp.round(side[..., None] * stretch).astype(jnp.int32)  # (..., TRIES, 2)
    limits = jnp.asarray(image_size, jnp.int32)
    fits = ((sizes > 0) & (sizes <= limits)).all(-1)
    first = jnp.argmax(fits, axis=-1)[..., None, None]
    size = jnp.take_along_axis(sizes, first, -2)[..., 0, :]

    found = fits.any(-1)[..., None]
    size = jnp.where(found, size, jnp.asarray(_fallback(image_size, crop_ratio), jnp.int32))
    space = limits - size
    start = jnp.where(found, _below(offset, space + 1), space // 2)
    return jnp.concatenate([start, size], axis=-1).astype(jnp.float32)


def _fallback(image_size: tuple[int, ...], crop_ratio: tuple[float, float]) -> tuple[int, int]:
    """torchvision's: the whole image, narrowed to the nearest allowed ratio."""
    (height, width), (low, high) = image_size, crop_ratio
    if width / height < low:
        return round(width / low), width
    if width / height > high:
        return height, round(height * high)
    return height, width


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
    resizing does. What a box shows beyond the image's edges is zero: the mean colour.

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
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]  # made at run time
    if precision in ("highest", "float32"):
        return _resample(rows, columns, images_BHWC)
    # Off the CPU three passes of bfloat16, or TF32, move a pixel by less than its rounding to 8
    # bits (docs/precision.md).
    in_passes = functools.partial(_resample, precision=lax.Precision.HIGH)
    on_gpu = in_passes if view.flip.ndim else _resample_lines
    return parallel.suited(cpu=_resample, tpu=in_passes, default=on_gpu)(rows, columns, images_BHWC)


def apply_shift(images_BHWC: Array, view: View, border_C: AnyArray) -> Array:
    """As ``apply_view``, for boxes that are only shifted: beyond the edges is ``border_C``.

    References pad with black before they normalise: PyTorch's RandomCrop(padding=...), ToTensor.
    """
    inside = apply_view(jnp.ones_like(images_BHWC[..., :1]), view)  # of whole pixels: 0 or 1
    return apply_view(images_BHWC, view) + (1 - inside) * jnp.asarray(border_C)


def _resample(
    rows: Array, columns: Array, images_BHWC: Array, precision=lax.Precision.HIGHEST
) -> Array:
    per_image = "b" if rows.ndim == 3 else ""
    return jnp.einsum(
        f"{per_image}ih,bhwc,{per_image}jw->bijc", rows, images_BHWC, columns, precision=precision
    )


def _resample_lines(rows: Array, columns: Array, images_BHWC: Array) -> Array:
    """One view of all images as two products of whole lines, so that nothing is transposed.

    A line's channels stay together: the columns' matrix has a diagonal block for each pair of
    columns. That triples its products, which costs a GPU less than transposing the images.
    """
    batch, height, width, channels = images_BHWC.shape
    blocks = columns[:, None, :, None] * jnp.eye(channels, dtype=columns.dtype)[:, None, :]
    lines = jnp.einsum(
        "bhx,yx->bhy",
        images_BHWC.reshape(batch, height, width * channels),
        blocks.reshape(2 * (width * channels,)),
        precision=lax.Precision.HIGH,
    )
    everywhere = jnp.broadcast_to(rows, (batch, *rows.shape))
    seen = jnp.einsum("bih,bhy->biy", everywhere, lines, precision=lax.Precision.HIGH)
    return seen.reshape(images_BHWC.shape)


def _resize_matrix(size: int, start, length, flip, roll, dtype) -> Array:
    """The (..., size, size) matrix of one axis: output position by input pixel."""
    at = jnp.arange(size, dtype=jnp.int32)
    source = jnp.mod(at - roll[..., None], size)
    source = jnp.where(flip[..., None], size - 1 - source, source).astype(dtype)
    length, start = length[..., None].astype(dtype), start[..., None].astype(dtype)
    inside = jnp.clip((source + 0.5) * (length / size) - 0.5, 0.0, length - 1.0)
    distance = jnp.abs((start + inside)[..., None] - at.astype(dtype))
    return jnp.maximum(0.0, 1.0 - distance)


def resize(images_BHWC: Array, size: tuple[int, int]) -> Array:
    """Resize bilinearly between pixel centres, without antialiasing (torch's interpolate)."""
    if images_BHWC.shape[1:3] == tuple(size):
        return images_BHWC
    rows, columns = (
        jnp.asarray(_bilinear(out, source), images_BHWC.dtype)
        for out, source in zip(size, images_BHWC.shape[1:3], strict=True)
    )
    return jnp.einsum(
        "ih,bhwc,jw->bijc", rows, images_BHWC, columns, precision=lax.Precision.HIGHEST
    )


def _bilinear(out: int, source: int) -> np.ndarray:
    """The (out, source) matrix of one axis, in float64."""
    at = np.clip((np.arange(out) + 0.5) * source / out - 0.5, 0.0, source - 1.0)
    return np.maximum(0.0, 1.0 - np.abs(at[:, None] - np.arange(source)))
