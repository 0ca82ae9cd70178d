"""Pixels: uint8 in [0, 255] on disk, float32 in a dataset's normalised space in the engine."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from prism_jax.types import AnyArray, Array, Normalisation

IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def alike(one: Normalisation, other: Normalisation) -> bool:
    """Whether two normalisations differ by no more than how they are usually written."""
    a, b = one.mean + one.std, other.mean + other.std
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-3, atol=1e-6)


def _constants(normalisation: Normalisation, dtype) -> tuple[Array, Array]:
    return jnp.asarray(normalisation.mean, dtype), jnp.asarray(normalisation.std, dtype)


def normalise(images_uint8_BHWC: AnyArray, normalisation: Normalisation) -> Array:
    """Turn uint8 pixels into float32 ``(pixel / 255 - mean) / std``."""
    mean_C, std_C = _constants(normalisation, jnp.float32)
    return (jnp.asarray(images_uint8_BHWC).astype(jnp.float32) / 255.0 - mean_C) / std_C


def denormalise(images_BHWC: AnyArray, normalisation: Normalisation) -> Array:
    """Turn normalised images into floats in [0, 1], clipped."""
    mean_C, std_C = _constants(normalisation, images_BHWC.dtype)
    return jnp.clip(images_BHWC * std_C + mean_C, 0.0, 1.0)


ROUNDINGS = ("nearest", "truncate")


def to_uint8(
    images_BHWC: AnyArray, normalisation: Normalisation, *, rounding: str = "nearest"
) -> Array:
    """Turn normalised images into uint8 pixels.

    Args:
      rounding: "nearest", or "truncate" as the released code, which loses half a level on
        average. Nearest makes uint8 -> float -> uint8 exact.

    Raises:
      ValueError: another rounding.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding is {rounding!r}; allowed: {', '.join(ROUNDINGS)}")
    levels = denormalise(images_BHWC, normalisation) * 255.0
    return (jnp.round(levels) if rounding == "nearest" else jnp.floor(levels)).astype(jnp.uint8)


def valid_range(normalisation: Normalisation, dtype=jnp.float32) -> tuple[Array, Array]:
    """The normalised values (low_C, high_C) of black and white."""
    mean_C, std_C = _constants(normalisation, dtype)
    return -mean_C / std_C, (1.0 - mean_C) / std_C


def clip(images_BHWC: Array, normalisation: Normalisation) -> Array:
    """Clamp normalised images per channel to values that are pixels."""
    return jnp.clip(images_BHWC, *valid_range(normalisation, images_BHWC.dtype))


def renormalise(images_BHWC: Array, source: Normalisation, target: Normalisation | None) -> Array:
    """Move images from one normalised space to another; None or an equal one: unchanged."""
    if target is None or target == source:
        return images_BHWC
    mean_C, std_C = _constants(source, images_BHWC.dtype)
    target_mean_C, target_std_C = _constants(target, images_BHWC.dtype)
    return (images_BHWC * std_C + (mean_C - target_mean_C)) / target_std_C
