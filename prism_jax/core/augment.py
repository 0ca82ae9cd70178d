"""The views and mixes of relabel and validate, as a function of coordinates.

Teacher and student must see the same pixels. Nothing about a view is stored: both sides call
:func:`augment` with the key of the same (epoch, batch) and get the same images.
"""

from __future__ import annotations

import dataclasses

from prism_jax import rng
from prism_jax.core import mixing, pixels, views
from prism_jax.types import Array, Mix, Normalisation


@dataclasses.dataclass(frozen=True)
class Augment:
    """What may be drawn: random resized crop of at least ``crop_min`` of the area, flip, mix.

    ``mix_per`` is "batch" or "image": for what one lambda and one box are drawn.
    """

    crop_min: float
    flip: bool
    mix: str = "none"
    mix_alpha: float = 1.0
    mix_per: str = "batch"


def augment(
    key: Array, images_uint8_BHWC: Array, how: Augment, normalisation: Normalisation
) -> tuple[Array, Mix]:
    """Draw one crop and flip per image and a mix, and apply them.

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
    view = views.sample_view(
        rng.stream(key, "view"),
        (height, width),
        crop_scale=(how.crop_min, 1.0),
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
    return mixing.apply_mix(views.apply_view(images_BHWC, view), mix), mix
