"""What the engine asks of its networks. All are pure functions of (params, arrays).

Latents are NHWC like images; ``time_B`` is the denoiser's own: the index of one of its training
steps, 0 to 999, or a continuous time in [0, 1].
"""

from __future__ import annotations

from typing import Protocol

from prism_jax.types import Array, PyTree


class Codec(Protocol):
    """From images in [-1, 1] to the denoiser's space, and back."""

    def encode(self, params: PyTree, images_BHWC: Array) -> tuple[Array, Array]:
        """The mean and the standard deviation of the latents, scaled as the denoiser reads them."""
        ...

    def decode(self, params: PyTree, latents_BHWC: Array) -> Array:
        """Images, float32, not clipped to [-1, 1]."""
        ...


class Denoiser(Protocol):
    """What was added to a latent, as the denoiser was trained to say it."""

    def predict(
        self, params: PyTree, noisy_BHWC: Array, time_B: Array, condition_B: Array
    ) -> Array:
        """The prediction, float32; with a learned variance its channels come second."""
        ...


class Condition(Protocol):
    """What a denoiser is told of the class; a leading axis B, to be concatenated and cut."""

    def of_labels(self, params: PyTree, labels_B: Array) -> Array:
        """The condition of each label."""
        ...

    def null(self, params: PyTree, batch: int) -> Array:
        """The condition that says nothing, for classifier-free guidance."""
        ...
