"""An encoder of images and texts as one more energy: images that it sees as it reads their class.

    E(x~) = mean_b ( 1 - cos( embed(x~_b), text_{y_b} ) )

It sees what the teachers see, at its own size and in its own normalisation (Direct Ascent
Synthesis, arXiv 2502.07753, with CLIP).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from prism_jax.core import pixels, views
from prism_jax.errors import UserError
from prism_jax.synthesis.recipe import Recipe
from prism_jax.types import AnyArray, Array, Normalisation, PyTree


class Encoder(Protocol):
    """From images of ``size`` pixels to embeddings (B, D), of any length."""

    @property
    def size(self) -> int: ...
    @property
    def channels(self) -> int: ...
    def embed(self, params: PyTree, images_BHWC: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Guide:
    """The encoder, and what it should see of each class; a tree whose leaves are the arrays.

    Attributes:
      params: the encoder's.
      texts_KD: the embedding of each class's text.
      encoder, normalisation: static; the encoder's own normalisation of images.
    """

    params: PyTree
    texts_KD: AnyArray
    encoder: Encoder
    normalisation: Normalisation


jax.tree_util.register_dataclass(
    Guide, data_fields=["params", "texts_KD"], meta_fields=["encoder", "normalisation"]
)


def check(recipe: Recipe, guide: Guide | None) -> None:
    """Refuse a weight without an encoder, and an encoder without one.

    Raises:
      UserError: either.
    """
    if bool(recipe.clip) != (guide is not None):
        given = "none is given" if guide is None else "an encoder is given"
        raise UserError(f"clip is {recipe.clip}, the weight of an encoder of images, and {given}")


def guide_gradient(
    recipe: Recipe,
    guide: Guide,
    normalisation: Normalisation,
    viewed_BHWC: Array,
    labels_B: AnyArray,
) -> tuple[Array, Array]:
    """The energy, unweighted, and the gradient by the viewed images of its weighted value."""

    def weighted(x_BHWC: Array) -> tuple[Array, Array]:
        value = energy(guide, normalisation, x_BHWC, labels_B)
        return recipe.clip * value, value

    with jax.named_scope("clip"):
        (_, value), gradient_BHWC = jax.value_and_grad(weighted, has_aux=True)(viewed_BHWC)
    return value, gradient_BHWC


def energy(
    guide: Guide, normalisation: Normalisation, images_BHWC: Array, labels_B: AnyArray
) -> Array:
    """How far images are from the texts of their classes: 0 where alike, 2 where opposite."""
    seen_BHWC = as_read(guide, normalisation, images_BHWC)
    images_BD = guide.encoder.embed(guide.params, seen_BHWC)
    texts_BD = jnp.asarray(guide.texts_KD)[labels_B]
    far = 1.0 - (_unit(images_BD) * _unit(texts_BD)).sum(-1)
    return far.mean().astype(images_BHWC.dtype)


def as_read(guide: Guide, normalisation: Normalisation, images_BHWC: Array) -> Array:
    """Images as the encoder reads them: of its size, channels and normalisation."""
    size, channels = guide.encoder.size, guide.encoder.channels
    x_BHWC, times = views.resize(images_BHWC, (size, size)), channels // images_BHWC.shape[-1]
    x_BHWC = jnp.broadcast_to(x_BHWC, (*x_BHWC.shape[:3], channels))
    spread = Normalisation(normalisation.mean * times, normalisation.std * times)
    return pixels.renormalise(x_BHWC, spread, guide.normalisation)


def _unit(x_BD: Array) -> Array:
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)
