"""The views and mixes of relabel and validate, as a function of coordinates.

Teacher and student must see the same pixels. Nothing about a view is stored: both sides call
:func:`augment` with the key of the same (epoch, batch) and get the same images.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from prism_jax import rng
from prism_jax.core import mixing, pixels, views
from prism_jax.types import AnyArray, Array, Mix, Normalisation, View


@dataclasses.dataclass(frozen=True)
class Augment:
    """What may be drawn: patches exchanged, a crop, a flip, a mix.

    Attributes:
      crop_min: smallest share of the area of a random resized crop.
      mix_per: "batch" or "image": for what one lambda and one box are drawn.
      crop_pad: in place of a resized crop, a shift by up to so many pixels, black coming in.
      patch_shuffle: bands into which the rows, and then the columns, of every image are cut and
        exchanged (RDED); 1: none.
    """

    crop_min: float
    flip: bool
    mix: str = "none"
    mix_alpha: float = 1.0
    mix_per: str = "batch"
    crop_pad: int | None = None
    patch_shuffle: int = 1


def augment(
    key: Array, images_uint8_BHWC: AnyArray, how: Augment, normalisation: Normalisation
) -> tuple[Array, Mix]:
    """Draw one shuffle, crop and flip per image and a mix, and apply them.

    Args:
      key: the batch's own key, ``stream(root, "relabel/view", epoch, batch)``.
      images_uint8_BHWC: pixels.
      how: the distribution.
      normalisation: of the result.

    Returns:
      float32 images_BHWC, normalised, and the mix that was applied to them.
    """
    batch, height, width, _ = images_uint8_BHWC.shape
    images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
    if how.patch_shuffle > 1:
        order = sample_order(rng.stream(key, "shuffle"), batch, how.patch_shuffle)
        images_BHWC = shuffle(images_BHWC, order)
    view, mix = draw(key, batch, (height, width), how)
    shown_BHWC = apply(images_BHWC, view, how.crop_pad, normalisation)
    return mixing.apply_mix(shown_BHWC, mix), mix


def apply(
    images_BHWC: Array, view: View, crop_pad: int | None, normalisation: Normalisation
) -> Array:
    """Normalised images through drawn views; a shifted one's border is black."""
    if crop_pad is None:
        return views.apply_view(images_BHWC, view)
    return views.apply_shift(images_BHWC, view, pixels.valid_range(normalisation)[0])


def show(images_uint8_BHWC: AnyArray, view: View, mix: Mix, normalisation: Normalisation) -> Array:
    """Images through a view and a mix that are known: float32 images_BHWC, normalised."""
    images_BHWC = pixels.normalise(images_uint8_BHWC, normalisation)
    return mixing.apply_mix(views.apply_view(images_BHWC, view), mix)


def draw(key: Array, batch: int, image_size: tuple[int, int], how: Augment) -> tuple[View, Mix]:
    """The crops and flips, one per image, and the mix that ``augment`` applies."""
    height, width = image_size
    view = views.sample_view(
        rng.stream(key, "view"),
        (height, width),
        crop_scale=(how.crop_min, 1.0),
        crop_pad=how.crop_pad,
        flip=how.flip,
        roll=0,
        batch=batch,
    )
    mix = mixing.sample_mix(
        rng.stream(key, "mix"),
        batch,
        (height, width),
        kind=how.mix,
        alpha=how.mix_alpha,
        per_image=how.mix_per == "image",
    )
    return view, mix


def sample_order(key: Array, batch: int, bands: int) -> Array:
    """Draw a permutation of the bands of rows and one of columns, per image: (B, 2, bands)."""
    bits = jax.random.bits(key, (batch, 2, bands), jnp.uint32)
    return jnp.argsort(bits, axis=-1).astype(jnp.int32)


def shuffle(images_BHWC: Array, order_B2F: Array) -> Array:
    """Cut images into bands of rows and exchange them, then into bands of columns.

    Band ``order[b, 0, i]`` of image b's rows comes to place i; height and width must divide.
    """
    batch, height, width, channels = images_BHWC.shape
    bands = order_B2F.shape[-1]
    rows, columns = (order_B2F[:, axis, :, None, None, None] for axis in (0, 1))
    cut = images_BHWC.reshape(batch, bands, height // bands, width, channels)
    images_BHWC = jnp.take_along_axis(cut, rows, 1).reshape(batch, height, width, channels)
    cut = images_BHWC.swapaxes(1, 2).reshape(batch, bands, width // bands, height, channels)
    cut = jnp.take_along_axis(cut, columns, 1).reshape(batch, width, height, channels)
    return cut.swapaxes(1, 2)
