"""The convolutional autoencoder of Stable Diffusion (arXiv 2112.10752, appendix G)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from prism_jax.diffusion.blocks import Attention, Doubled, GroupNorm, Resnet, silu
from prism_jax.diffusion.forms import check_divides, counts, stated
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.types import Array, PyTree

EPSILON = 1e-6
LOG_VARIANCE = (-30.0, 20.0)  # the encoder's, clipped


class AutoencoderKL(nn.Module):
    """Images to a diagonal Gaussian of latents, by default an eighth as wide, and back.

    It is a :class:`~prism_jax.diffusion.protocols.Codec`.

    Attributes:
      channels: of images.
      latent_channels: of latents.
      widths: channels per level; between two levels the sides are halved.
      blocks: residual blocks per level; the decoder has one more.
      groups: of a norm.
      scale: what latents are multiplied by for the denoiser.
      dtype: of the computation; parameters, norms and softmax are float32.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    scale: float = 0.18215
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        arguments = self.widths, self.blocks, self.groups, self.dtype
        conv = functools.partial(layers.Conv, kernel_size=1, dtype=self.dtype)
        self.encoder = Encoder(2 * self.latent_channels, *arguments)
        self.quant_conv = conv(2 * self.latent_channels)
        self.post_quant_conv = conv(self.latent_channels)
        self.decoder = Decoder(self.channels, *arguments)

    def __call__(self, images_BHWC: Array) -> Array:
        mean_BHWC, _ = self.gaussian(images_BHWC)
        return self.images(mean_BHWC)

    def gaussian(self, images_BHWC: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the latents, times the scale."""
        factor = 2 ** (len(self.widths) - 1)
        if any(side % factor for side in images_BHWC.shape[1:3]):
            raise UserError(
                f"images of {images_BHWC.shape[1]} x {images_BHWC.shape[2]} px do not shrink "
                f"{factor} times to whole latents; choose sides that {factor} divides"
            )
        moments_BHWC = self.quant_conv(self.encoder(images_BHWC)).astype(self._wide)
        mean_BHWC, log_variance_BHWC = jnp.split(moments_BHWC, 2, -1)
        deviation_BHWC = jnp.exp(jnp.clip(log_variance_BHWC, *LOG_VARIANCE) / 2)
        return mean_BHWC * self.scale, deviation_BHWC * self.scale

    def images(self, latents_BHWC: Array) -> Array:
        """Images of latents that were multiplied by the scale."""
        return self.decoder(self.post_quant_conv(latents_BHWC / self.scale)).astype(self._wide)

    @property
    def _wide(self) -> np.dtype:
        return jnp.promote_types(self.dtype, jnp.float32)

    @nn.nowrap
    def encode(self, params: PyTree, images_BHWC: Array) -> tuple[Array, Array]:
        found: Any = self.apply({"params": params}, images_BHWC, method="gaussian")
        return found

    @nn.nowrap
    def decode(self, params: PyTree, latents_BHWC: Array) -> Array:
        found: Any = self.apply({"params": params}, latents_BHWC, method="images")
        return found


class _Half(nn.Module):
    """What encoder and decoder share."""

    features: int
    widths: tuple[int, ...]
    blocks: int
    groups: int
    dtype: jnp.dtype

    def _conv(self, features: int, name: str, **kwargs: Any) -> layers.Conv:
        return layers.Conv(features, 3, dtype=self.dtype, name=name, **{"padding": 1} | kwargs)

    def _resnet(self, x_BHWC: Array, width: int, name: str) -> Array:
        return Resnet(width, self.groups, EPSILON, self.dtype, name=name)(x_BHWC)

    def _middle(self, x_BHWC: Array) -> Array:
        width, name = x_BHWC.shape[-1], "mid_block.attentions.0"
        norm = GroupNorm(self.groups, EPSILON, self.dtype, name=f"{name}.group_norm")
        attention = Attention(1, qkv_bias=True, dtype=self.dtype, name=name)
        x_BHWC = self._resnet(x_BHWC, width, "mid_block.resnets.0")
        tokens_BND = norm(x_BHWC).reshape(len(x_BHWC), -1, width)
        x_BHWC = x_BHWC + attention(tokens_BND).reshape(x_BHWC.shape)
        return self._resnet(x_BHWC, width, "mid_block.resnets.1")

    def _end(self, x_BHWC: Array) -> Array:
        norm = GroupNorm(self.groups, EPSILON, self.dtype, name="conv_norm_out")
        return self._conv(self.features, "conv_out")(silu(norm(x_BHWC)))


class Encoder(_Half):
    """Images to the moments of latents."""

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        x_BHWC = self._conv(self.widths[0], "conv_in")(x_BHWC)
        for level, width in enumerate(self.widths):
            name = f"down_blocks.{level}"
            for block in range(self.blocks):
                x_BHWC = self._resnet(x_BHWC, width, f"{name}.resnets.{block}")
            if level < len(self.widths) - 1:
                x_BHWC = jnp.pad(x_BHWC, ((0, 0), (0, 1), (0, 1), (0, 0)))
                half = self._conv(width, f"{name}.downsamplers.0.conv", stride=2, padding=0)
                x_BHWC = half(x_BHWC)
        return self._end(self._middle(x_BHWC))


class Decoder(_Half):
    """Latents to images."""

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        x_BHWC = self._middle(self._conv(self.widths[-1], "conv_in")(x_BHWC))
        for level, width in enumerate(reversed(self.widths)):
            name = f"up_blocks.{level}"
            for block in range(self.blocks + 1):
                x_BHWC = self._resnet(x_BHWC, width, f"{name}.resnets.{block}")
            if level < len(self.widths) - 1:
                x_BHWC = Doubled(width, self.dtype, name=f"{name}.upsamplers.0.conv")(x_BHWC)
        return self._end(x_BHWC)


def from_config(config: dict[str, Any]) -> AutoencoderKL:
    """The autoencoder of a config.json of diffusers.

    Raises:
      UserError: it states another form.
    """
    widths = counts(config, "AutoencoderKL", "block_out_channels", (64,))
    found = stated(
        config,
        "AutoencoderKL",
        free={
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 32,
            "scaling_factor": 0.18215,
        },
        fixed={
            "out_channels": config.get("in_channels", 3),
            "down_block_types": ["DownEncoderBlock2D"] * len(widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(widths),
            "act_fn": "silu",
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        },
        idle=("block_out_channels", "sample_size", "force_upcast"),
    )
    check_divides("AutoencoderKL", "norm_num_groups", found["norm_num_groups"], widths)
    return AutoencoderKL(
        channels=found["in_channels"],
        latent_channels=found["latent_channels"],
        widths=widths,
        blocks=found["layers_per_block"],
        groups=found["norm_num_groups"],
        scale=found["scaling_factor"],
    )


_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give an attention's tensors their present names, matrices where they are 1x1 convolutions."""
    found = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        if parent.endswith(".attentions.0"):
            name = f"{parent}.{_OLD.get(last, last)}.{leaf}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        found[name] = tensor
    return found
