"""The U-Net of Stable Diffusion 1 and 2 (arXiv 2112.10752): a denoiser told by a text."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.diffusion.blocks import Attention, Doubled, GroupNorm, Resnet, gelu, silu
from prism_jax.diffusion.dit import time_waves
from prism_jax.diffusion.forms import check_divides, counts, stated
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.types import Array, PyTree

SPATIAL_EPSILON = 1e-6  # of the norm in front of a spatial transformer
TOKEN_EPSILON = 1e-5


class UNet2DCondition(nn.Module):
    """Residual blocks and attention over a map, down and up, with what was on the way down.

    It is a :class:`~prism_jax.diffusion.protocols.Denoiser`; its condition is (B, tokens, width).
    The defaults are Stable Diffusion 1.5.

    Attributes:
      channels: of the latent.
      widths: channels per level; between two levels the sides are halved.
      attends: per level, going down, whether it has attention.
      heads: attention heads per level.
      blocks: per level on the way down; on the way up there is one more.
      transformers: transformer blocks of an attention, per level.
      context: width of the condition.
      linear: a spatial transformer's ends are matrices, in place of 1x1 convolutions: names and
        numbers are the same, the files' shapes are not.
      groups, epsilon: of a norm.
      dtype: of the computation; parameters, norms, scores and softmax are float32, so that
        nothing is left for diffusers' ``upcast_attention`` to say.
    """

    channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    attends: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    blocks: int = 2
    transformers: tuple[int, ...] = (1, 1, 1, 1)
    context: int = 768
    linear: bool = False
    groups: int = 32
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, noisy_BHWC: Array, time_B: Array, context_BMD: Array) -> Array:
        levels, factor = len(self.widths), 2 ** (len(self.widths) - 1)
        if any(side % factor for side in noisy_BHWC.shape[1:3]):
            raise UserError(
                f"latents of {noisy_BHWC.shape[1]} x {noisy_BHWC.shape[2]} cannot be halved "
                f"{levels - 1} times; choose sides that {factor} divides"
            )
        conv = functools.partial(layers.Conv, dtype=self.dtype)
        dense = functools.partial(layers.Dense, 4 * self.widths[0], dtype=self.dtype)
        time_BD = dense(name="time_embedding.linear_1")(time_waves(time_B, self.widths[0] // 2, 0))
        time_BD = dense(name="time_embedding.linear_2")(silu(time_BD))
        context_BMD = context_BMD.astype(self.dtype)

        def stage(x_BHWC: Array, name: str, index: int, level: int, attends: bool) -> Array:
            x_BHWC = self._resnet(x_BHWC, time_BD, level, f"{name}.resnets.{index}")
            if attends:
                spatial = Spatial(
                    self.heads[level], self.transformers[level], self.linear, self.groups,
                    self.dtype, name=f"{name}.attentions.{index}",
                )  # fmt: skip
                x_BHWC = spatial(x_BHWC, context_BMD)
            return x_BHWC

        x_BHWC = conv(self.widths[0], 3, padding=1, name="conv_in")(noisy_BHWC)
        passed = [x_BHWC]
        for level, width in enumerate(self.widths):
            name = f"down_blocks.{level}"
            for index in range(self.blocks):
                x_BHWC = stage(x_BHWC, name, index, level, self.attends[level])
                passed.append(x_BHWC)
            if level < levels - 1:
                half = conv(width, 3, 2, 1, name=f"{name}.downsamplers.0.conv")
                x_BHWC = half(x_BHWC)
                passed.append(x_BHWC)

        x_BHWC = stage(x_BHWC, "mid_block", 0, levels - 1, True)
        x_BHWC = self._resnet(x_BHWC, time_BD, levels - 1, "mid_block.resnets.1")

        for up, level in enumerate(reversed(range(levels))):
            name = f"up_blocks.{up}"
            for index in range(self.blocks + 1):
                x_BHWC = jnp.concatenate([x_BHWC, passed.pop()], -1)
                x_BHWC = stage(x_BHWC, name, index, level, self.attends[level])
            if level:
                twice = Doubled(self.widths[level], self.dtype, name=f"{name}.upsamplers.0.conv")
                x_BHWC = twice(x_BHWC)

        norm = GroupNorm(self.groups, self.epsilon, self.dtype, name="conv_norm_out")
        x_BHWC = conv(self.channels, 3, padding=1, name="conv_out")(silu(norm(x_BHWC)))
        return x_BHWC.astype(jnp.promote_types(self.dtype, jnp.float32))

    def _resnet(self, x_BHWC: Array, time_BD: Array, level: int, name: str) -> Array:
        width = self.widths[level]
        return Resnet(width, self.groups, self.epsilon, self.dtype, name=name)(x_BHWC, time_BD)

    @nn.nowrap
    def predict(
        self, params: PyTree, noisy_BHWC: Array, time_B: Array, context_BMD: Array
    ) -> Array:
        found: Any = self.apply({"params": params}, noisy_BHWC, time_B, context_BMD)
        return found


class Spatial(nn.Module):
    """A transformer over the pixels of a map, beside a shortcut."""

    heads: int
    transformers: int
    linear: bool
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC: Array, context_BMD: Array) -> Array:
        width = x_BHWC.shape[-1]
        norm = GroupNorm(self.groups, SPATIAL_EPSILON, self.dtype, name="norm")
        y_BHWC = self._end("proj_in", width)(norm(x_BHWC))
        y_BND = y_BHWC.reshape(len(x_BHWC), -1, width)
        for index in range(self.transformers):
            block = Transformer(self.heads, self.dtype, name=f"transformer_blocks.{index}")
            y_BND = block(y_BND, context_BMD)
        return x_BHWC + self._end("proj_out", width)(y_BND.reshape(x_BHWC.shape))

    def _end(self, name: str, width: int) -> nn.Module:
        if self.linear:
            return layers.Dense(width, dtype=self.dtype, name=name)
        return layers.Conv(width, 1, dtype=self.dtype, name=name)


class Transformer(nn.Module):
    """Attention among pixels, attention to the text, a gated MLP."""

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BND: Array, context_BMD: Array) -> Array:
        width = x_BND.shape[-1]
        norm = functools.partial(layers.LayerNorm, TOKEN_EPSILON, self.dtype)
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        attention = functools.partial(Attention, self.heads, dtype=self.dtype)
        x_BND = x_BND + attention(name="attn1")(norm(name="norm1")(x_BND))
        x_BND = x_BND + attention(name="attn2")(norm(name="norm2")(x_BND), context_BMD)
        y_BND = dense(8 * width, name="ff.net.0.proj")(norm(name="norm3")(x_BND))
        value_BND, gate_BND = jnp.split(y_BND, 2, -1)
        return x_BND + dense(width, name="ff.net.2")(value_BND * gelu(gate_BND))


def from_config(config: dict[str, Any]) -> UNet2DCondition:
    """The U-Net of a config.json of diffusers.

    Raises:
      UserError: it states another form.
    """
    down = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    what = "UNet2DConditionModel"
    widths = counts(config, what, "block_out_channels", (320, 640, 1280, 1280))
    levels = len(widths)
    plain = ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"]
    types = config.get("down_block_types", plain)
    if not isinstance(types, list) or len(types) != levels or not {*map(type, types)} <= {str}:
        raise UserError(
            f"this {what} has down_block_types={types!r}; it must be a list of {levels} words, as "
            f"many as block_out_channels has numbers. Download its config again"
        )
    # Whether a level attends is free; going up, it attends where it did going down.
    up = [kind.replace("Down", "Up") for kind in reversed(types)]
    found = stated(
        config,
        what,
        free={
            "in_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "norm_eps": 1e-5,
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 8,
            "num_attention_heads": None,
            "use_linear_projection": False,
        },
        fixed={
            "out_channels": config.get("in_channels", 4),
            "down_block_types": [kind for kind in types if kind in down],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "up_block_types": up,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "mid_block_scale_factor": 1,
            "resnet_time_scale_shift": "default",
            "resnet_out_scale_factor": 1.0,
            "time_embedding_type": "positional",
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "attention_type": "default",
        },
        idle=(
            "block_out_channels", "sample_size", "dropout", "upcast_attention",
            "addition_embed_type_num_heads",
        ),
        listed=(
            "layers_per_block", "cross_attention_dim", "transformer_layers_per_block",
            "attention_head_dim", "num_attention_heads",
        ),
        optional=(
            "use_linear_projection",
            *(["attention_head_dim"] if config.get("num_attention_heads") else []),
        ),
    )  # fmt: skip

    def per_level(key: str) -> tuple[int, ...]:
        value = found[key]
        if isinstance(value, list) and len(value) != levels:
            raise UserError(
                f"this {what} has {key}={value!r}; it must be one number, or {levels}, as many as "
                f"block_out_channels has. Download its config again"
            )
        return tuple(value) if isinstance(value, list) else (value,) * levels

    def alike(key: str) -> int:
        first, *others = per_level(key)
        if {*others} - {first}:
            raise UserError(
                f"this {what} has {key}={found[key]!r}; only one number for all levels is "
                f"implemented. Take weights of the plain form"
            )
        return first

    # diffusers keeps the number of heads under the name of their width.
    key = "num_attention_heads" if found["num_attention_heads"] else "attention_head_dim"
    heads, attends = per_level(key), tuple(down[kind] for kind in types)
    check_divides(what, "norm_num_groups", found["norm_num_groups"], widths)
    for level, (width, parts) in enumerate(zip(widths, heads, strict=True)):
        if attends[level] or level == levels - 1:  # in the middle, there is attention, too
            check_divides(what, key, parts, [width])
    return UNet2DCondition(
        channels=found["in_channels"],
        widths=widths,
        attends=attends,
        heads=heads,
        blocks=alike("layers_per_block"),
        transformers=per_level("transformer_layers_per_block"),
        context=alike("cross_attention_dim"),
        linear=bool(found["use_linear_projection"]),
        groups=found["norm_num_groups"],
        epsilon=found["norm_eps"],
    )
