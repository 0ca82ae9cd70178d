"""Images of a batch: start, sample, refine, decode. Pure, and the same on every device.

Everything random has coordinates (class, slot, step), so an image depends neither on its batch
nor on devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prism_jax import rng
from prism_jax.diffusion import guidance, noise, samplers
from prism_jax.diffusion import refine as engine
from prism_jax.diffusion.protocols import Codec, Condition, Denoiser
from prism_jax.diffusion.refine import Refining
from prism_jax.diffusion.samplers import Sampling
from prism_jax.types import Array, PyTree


class Generator(NamedTuple):
    """The three networks, without weights; static in a trace."""

    codec: Codec
    denoiser: Denoiser
    condition: Condition


class Weights(NamedTuple):
    """Theirs; ``bounds`` are what a clean latent lies between, where estimates are clipped."""

    codec: PyTree
    denoiser: PyTree
    condition: PyTree
    bounds: noise.Bounds | None = None


class Places(NamedTuple):
    """The coordinates of a batch, int32. ``labels_B`` are what the condition calls the classes."""

    classes_B: Array
    slots_B: Array
    labels_B: Array


def generate(
    generator: Generator,
    sampling: Sampling,
    weights: Weights,
    seed: Array,
    places: Places,
    anchors_BHWC: Array,
    refining: Refining | None = None,
) -> tuple[Array, Array]:
    """Images of a batch of anchors, and the latents that they are decoded from.

    Args:
      sampling: already found good by ``samplers.check``.
      seed: uint32.
      anchors_BHWC: latents; they do not count at strength 1, but give the shape.
      refining: of the sampled latents; None, or no steps: they are decoded as they are.

    Returns:
      (B, H, W, C) float32 images, not clipped to [-1, 1], and latents of the anchors' shape.
    """
    latents_BHWC = sample(generator, sampling, weights, seed, places, anchors_BHWC)
    if refining is not None and refining.steps:
        latents_BHWC = refine(generator, refining, weights, seed, places, latents_BHWC)
    return generator.codec.decode(weights.codec, latents_BHWC), latents_BHWC


def sample(
    generator: Generator,
    sampling: Sampling,
    weights: Weights,
    seed: Array,
    places: Places,
    anchors_BHWC: Array,
) -> Array:
    """The latents of a batch; the anchors themselves, to the bit, at strength 0."""
    if sampling.strength == 0:
        return anchors_BHWC
    batch, *_, channels = anchors_BHWC.shape
    key = rng.root(seed)
    condition = generator.condition.of_labels(weights.condition, places.labels_B)
    null = None
    if sampling.guidance != 1:
        null = generator.condition.null(weights.condition, batch)

    def predict(noisy_BHWC: Array, time: Array) -> Array:
        return guidance.classifier_free(
            lambda *seen: generator.denoiser.predict(weights.denoiser, *seen),
            noisy_BHWC, jnp.broadcast_to(time, (noisy_BHWC.shape[0],)), condition, null,
            guidance=sampling.guidance, channels=sampling.guided_channels or channels,
        )  # fmt: skip

    def draw(name: str, *coordinates: Array) -> Array:
        def one(cls, slot):
            address = rng.stream(key, name, cls, slot, *coordinates)
            return jax.random.normal(address, anchors_BHWC.shape[1:], jnp.float32)

        return jax.vmap(one)(places.classes_B, places.slots_B)

    sight = samplers.Sight(
        predict, lambda step: draw("diffusion/noise", step), anchors_BHWC, weights.bounds
    )
    begin_BHWC = samplers.start(sampling, anchors_BHWC, draw("diffusion/start"))
    return samplers.run(samplers.SAMPLERS[sampling.sampler](sampling, sight, begin_BHWC))


def refine(
    generator: Generator,
    refining: Refining,
    weights: Weights,
    seed: Array,
    places: Places,
    latents_BHWC: Array,
) -> Array:
    """The latents of a batch, each refined under its class, without guidance."""
    key = rng.root(seed)
    condition = generator.condition.of_labels(weights.condition, places.labels_B)
    first, last = refining.window

    def added(cls: Array, slot: Array) -> Array:
        address = rng.stream(key, "diffusion/refine/noise", cls, slot)
        return jax.random.normal(address, latents_BHWC.shape[1:], jnp.float32)

    def number(cls: Array, slot: Array, step: Array) -> Array:
        address = rng.stream(key, "diffusion/refine/step", cls, slot, step)
        return jax.random.randint(address, (), first, last + 1, jnp.int32)

    of_images = places.classes_B, places.slots_B
    return engine.refine(
        refining,
        lambda noisy_BHWC, time_B: generator.denoiser.predict(
            weights.denoiser, noisy_BHWC, time_B, condition
        ),
        latents_BHWC,
        jax.vmap(added)(*of_images),
        jax.vmap(lambda step: jax.vmap(number, (0, 0, None))(*of_images, step))(
            jnp.arange(refining.steps, dtype=jnp.int32)
        ),
    )


def encode(
    codec: Codec,
    params: PyTree,
    seed: Array,
    positions_B: Array,
    images_BHWC: Array,
    *,
    sampled: bool = False,
    flip: bool = False,
) -> Array:
    """The latents of real images.

    Args:
      positions_B: of the images in their source: the coordinates of what is drawn.
      images_BHWC: float32 in [-1, 1].
      sampled: a draw from the codec's posterior (D4M as released), in place of its mean.
      flip: mirror a random half of the images first (MGD3).
    """
    key = rng.root(seed)
    if flip:
        turned_B = jax.vmap(lambda at: jax.random.bernoulli(rng.stream(key, "diffusion/flip", at)))(
            positions_B
        )
        images_BHWC = jnp.where(turned_B[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC)
    mean_BHWC, deviation_BHWC = codec.encode(params, images_BHWC)
    if not sampled:
        return mean_BHWC
    draws_BHWC = jax.vmap(
        lambda at: jax.random.normal(
            rng.stream(key, "diffusion/encode", at), mean_BHWC.shape[1:], jnp.float32
        )
    )(positions_B)
    return mean_BHWC + deviation_BHWC * draws_BHWC
