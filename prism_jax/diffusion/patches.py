"""Codecs that need no training: pixels as they are, and patches by their principal components.

Both are linear, have no deviation, and give latents of mean 0 and deviation 1 per channel on the
images they were fitted to. Their parameters are dicts of arrays.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from prism_jax import environment
from prism_jax.diffusion import pixels
from prism_jax.diffusion.noise import Bounds
from prism_jax.errors import UserError
from prism_jax.types import Array

CHUNK = 1024  # images that are looked at together
LEAST = 1e-6  # deviation: of a channel that is the same everywhere


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Pixels, standardised per channel; for images of a few pixels (16 x 16)."""

    def encode(self, params: dict, images_BHWC: Array) -> tuple[Array, Array]:
        """See ``protocols.Codec``."""
        latents_BHWC = (images_BHWC - params["mean_C"]) / params["deviation_C"]
        return latents_BHWC, jnp.zeros_like(latents_BHWC)

    def decode(self, params: dict, latents_BHWC: Array) -> Array:
        """See ``protocols.Codec``."""
        return latents_BHWC * params["deviation_C"] + params["mean_C"]


@dataclasses.dataclass(frozen=True)
class Patches:
    """Patches of ``side`` pixels, each by its coordinates on principal components."""

    side: int

    def encode(self, params: dict, images_BHWC: Array) -> tuple[Array, Array]:
        """See ``protocols.Codec``."""
        centred = patches_of(images_BHWC, self.side) - params["mean_P"]
        latents_BHWC = jnp.matmul(centred, params["components_PC"], precision="highest")
        latents_BHWC = latents_BHWC / params["deviation_C"]
        return latents_BHWC, jnp.zeros_like(latents_BHWC)

    def decode(self, params: dict, latents_BHWC: Array) -> Array:
        """See ``protocols.Codec``."""
        scaled = latents_BHWC * params["deviation_C"]
        patches = jnp.matmul(scaled, params["components_PC"].T, precision="highest")
        batch, rows, columns, _ = latents_BHWC.shape
        tiles = (patches + params["mean_P"]).reshape(batch, rows, columns, self.side, self.side, -1)
        return tiles.swapaxes(2, 3).reshape(batch, rows * self.side, columns * self.side, -1)


def patches_of(images_BHWC: Any, side: int) -> Any:
    """(B, rows, columns, side * side * C)."""
    batch, height, width, channels = images_BHWC.shape
    cut = images_BHWC.reshape(batch, height // side, side, width // side, side, channels)
    return cut.swapaxes(2, 3).reshape(batch, height // side, width // side, -1)


def fit_pixels(images_uint8_NHWC: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters of ``Pixels``; with ``bounds``, black and white."""
    images = pixels.from_uint8(images_uint8_NHWC).astype(np.float64)
    mean_C, deviation_C = images.mean((0, 1, 2)), np.maximum(images.std((0, 1, 2)), LEAST)
    found = {"mean_C": mean_C, "deviation_C": deviation_C}
    found |= {"low_C": (-1 - mean_C) / deviation_C, "high_C": (1 - mean_C) / deviation_C}
    return {name: value.astype(np.float32) for name, value in found.items()}


def fit_patches(images_uint8_NHWC: np.ndarray, side: int, components: int) -> dict[str, np.ndarray]:
    """The parameters of ``Patches``: the first components of all patches, of one sign.

    The same bits on any number of threads: sums are float64, on one. Of a component and its
    opposite the one whose largest entry is positive is taken.

    Returns:
      Beside the parameters, ``kept``: which part of the patches' variance the components hold;
      and the bounds, ``low_C`` and ``high_C``: the extremes of the latents of these images.

    Raises:
      UserError: patches that do not tile the images, or more components than they have numbers.
    """
    _, height, width, channels = images_uint8_NHWC.shape
    numbers = side * side * channels
    if height % side or width % side:
        raise UserError(
            f"images of {height} x {width} px do not divide into patches of {side}; choose a "
            f"patch that divides both"
        )
    if not 1 <= components <= numbers:
        raise UserError(
            f"patches of {side} px have {numbers} numbers, so {components} components are not "
            f"possible; choose 1 to {numbers}"
        )

    def rows():
        for at in range(0, len(images_uint8_NHWC), CHUNK):
            chunk = pixels.from_uint8(images_uint8_NHWC[at : at + CHUNK]).astype(np.float64)
            yield patches_of(chunk, side).reshape(-1, numbers)

    with environment.one_thread():
        count, total, products = 0, np.zeros(numbers), np.zeros((numbers, numbers))
        for patches in rows():
            count, total = count + len(patches), total + patches.sum(0)
            products += patches.T @ patches
        mean_P = total / count
        covariance = products / count - np.outer(mean_P, mean_P)
        variances, vectors = np.linalg.eigh(covariance)
        order = np.argsort(-variances, kind="stable")[:components]
        components_PC = vectors[:, order]
        largest = np.abs(components_PC).argmax(0)
        components_PC = components_PC * np.sign(components_PC[largest, np.arange(components)])
        deviation_C = np.sqrt(np.maximum(variances[order], LEAST**2))
        low_C, high_C = np.full(components, np.inf), np.full(components, -np.inf)
        for patches in rows():
            latents = (patches - mean_P) @ components_PC / deviation_C
            low_C, high_C = np.minimum(low_C, latents.min(0)), np.maximum(high_C, latents.max(0))
    found = {
        "mean_P": mean_P,
        "components_PC": components_PC,
        "deviation_C": deviation_C,
        "low_C": low_C,
        "high_C": high_C,
        "kept": variances[order].sum() / np.maximum(variances.sum(), LEAST**2),
    }
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def bounds(params: dict[str, Array]) -> Bounds:
    """What the latents of real images lie between."""
    return Bounds(params["low_C"], params["high_C"])
