"""What is optimised of an image: its pixels, or components at several resolutions that are added.

    x = clip( sum_r enlarge(p_r) ),    p_r of r x r pixels, enlarged bilinearly

(Direct Ascent Synthesis, arXiv 2502.07753.) The loss knows the sum alone, and Adam knows
gradients alone. So the components themselves are never kept: an image is their sum, a step adds
the enlarged steps of all of them, and Adam's moments are those of each. What clipping takes away
is taken from the component of the image's own size.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from prism_jax.core import views
from prism_jax.synthesis.recipe import Recipe
from prism_jax.types import Array


def adam(recipe: Recipe) -> optax.GradientTransformation:
    """Adam without its learning rate, which has a schedule over each unit's own budget."""
    return optax.scale_by_adam(b1=recipe.betas[0], b2=recipe.betas[1], eps=1e-8)


def pyramid(recipe: Recipe) -> optax.GradientTransformation:
    """Adam of every component; the image's direction is the sum of theirs, enlarged."""
    of_components = adam(recipe)

    def init(images_BHWC: Array) -> optax.OptState:
        batch, size, _, channels = images_BHWC.shape
        return of_components.init(
            tuple(
                jnp.zeros((batch, r, r, channels), images_BHWC.dtype)
                for r in resolutions_of(recipe.resolutions, size)
            )
        )

    def update(
        gradient_BHWC: Array, state: optax.OptState, params: Array | None = None
    ) -> tuple[Array, optax.OptState]:
        del params
        size = gradient_BHWC.shape[1]
        gradients = tuple(
            reduced(gradient_BHWC, r) for r in resolutions_of(recipe.resolutions, size)
        )
        directions, state = of_components.update(gradients, state)
        enlarged = [views.resize(direction, (size, size)) for direction in directions]
        return sum(enlarged[1:], enlarged[0]), state

    return optax.GradientTransformation(init, update)


# From the recipe to the transformation of an image's gradient into the direction of its step.
PARAMETRISATIONS: dict[str, Callable[[Recipe], optax.GradientTransformation]] = {
    "pixels": adam,
    "pyramid": pyramid,
}


def resolutions_of(stated: tuple[int, ...], size: int) -> tuple[int, ...]:
    """The components' sides, rising; unstated, the powers of two below the image's, and its own."""
    return stated or (*(2**i for i in range((size - 1).bit_length())), size)


def reduced(gradient_BHWC: Array, resolution: int) -> Array:
    """The gradient by a component of ``resolution``, from that by the image it is enlarged into."""
    batch, height, width, channels = gradient_BHWC.shape
    component = jax.ShapeDtypeStruct((batch, resolution, resolution, channels), gradient_BHWC.dtype)
    enlarge = jax.linear_transpose(lambda x: views.resize(x, (height, width)), component)
    return enlarge(gradient_BHWC)[0]
