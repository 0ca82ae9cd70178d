"""What the U-Net, the autoencoder and the text encoder are built from; diffusers' names."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from prism_jax.models import layers
from prism_jax.types import Array

QUERIES = 1024  # that meet all keys at once
silu = nn.silu
gelu = functools.partial(nn.gelu, approximate=False)


class GroupNorm(nn.Module):
    """Normalise groups of channels of each image, at least in float32; params "scale", "bias".

    A group's moments are means of its channels' moments about the group's mean: the map is never
    laid out by groups, which costs a CPU four times as much (measured), and a TPU, whose registers
    are 128 channels wide, most of each.
    """

    groups: int
    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        batch, *_, channels = x_BHWC.shape
        scale_C = layers.parameter(self, "scale", nn.initializers.ones, (channels,), jnp.float32)
        bias_C = layers.parameter(self, "bias", nn.initializers.zeros, (channels,), jnp.float32)
        wide_BHWC = x_BHWC.astype(jnp.promote_types(x_BHWC.dtype, jnp.float32))

        def mean(map_BHWC: Array) -> Array:
            """Of each channel's group."""
            grouped = map_BHWC.mean((1, 2)).reshape(batch, self.groups, -1)
            means = jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape)
            return means.reshape(batch, 1, 1, channels)

        centred_BHWC = wide_BHWC - mean(wide_BHWC)
        variance_B11C = mean(jnp.square(centred_BHWC))
        gain_B11C = lax.rsqrt(variance_B11C + self.epsilon) * scale_C
        return (centred_BHWC * gain_B11C + bias_C).astype(self.dtype)


class Resnet(nn.Module):
    """Two convolutions around the time, beside a shortcut."""

    features: int
    groups: int
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array | None = None) -> Array:
        norm = functools.partial(GroupNorm, self.groups, self.epsilon, self.dtype)
        conv = functools.partial(layers.Conv, self.features, dtype=self.dtype)
        y_BHWC = conv(3, padding=1, name="conv1")(silu(norm(name="norm1")(x_BHWC)))
        if time_BD is not None:
            dense = layers.Dense(self.features, dtype=self.dtype, name="time_emb_proj")
            y_BHWC = y_BHWC + dense(silu(time_BD))[:, None, None]
        y_BHWC = conv(3, padding=1, name="conv2")(silu(norm(name="norm2")(y_BHWC)))
        if x_BHWC.shape[-1] != self.features:
            x_BHWC = conv(1, name="conv_shortcut")(x_BHWC)
        return x_BHWC + y_BHWC


def doubled(x_BHWC: Array) -> Array:
    """Twice as many rows and columns, each pixel four times."""
    batch, rows, columns, channels = x_BHWC.shape
    shape = (batch, rows, 2, columns, 2, channels)
    quadrupled = jnp.broadcast_to(x_BHWC[:, :, None, :, None], shape)
    return quadrupled.reshape(batch, 2 * rows, 2 * columns, channels)


class Attention(nn.Module):
    """Queries from one sequence, keys and values from another; no bias but the output's.

    Attributes:
      names: of the maps to queries, keys, values and to the output.
      qkv_bias: the first three have a bias too.
      causal: a token sees none behind it.
    """

    heads: int
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out.0")
    qkv_bias: bool = False
    causal: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BND: Array, context_BMD: Array | None = None) -> Array:
        context_BMD = x_BND if context_BMD is None else context_BMD
        width = x_BND.shape[-1]

        def heads(tokens: Array, name: str) -> Array:
            dense = layers.Dense(width, use_bias=self.qkv_bias, dtype=self.dtype, name=name)
            return dense(tokens).reshape(*tokens.shape[:2], self.heads, -1)

        query, key, value = map(heads, (x_BND, context_BMD, context_BMD), self.names[:3])
        y = attend(query, key, value, causal=self.causal).reshape(x_BND.shape)
        return layers.Dense(width, dtype=self.dtype, name=self.names[3])(y)


def attend(query_BNHD: Array, key_BMHD: Array, value_BMHD: Array, *, causal: bool = False) -> Array:
    """Softmax attention; scores and softmax are float32 at least, whatever the inputs are.

    Long sequences go a part of the queries at a time: scores of a whole image at 64 x 64 would
    take a gigabyte.
    """
    batch, tokens, heads, width = query_BNHD.shape
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=causal)
    if tokens <= QUERIES or tokens % QUERIES or causal:
        return attention(query_BNHD, key_BMHD, value_BMHD)
    parts = jnp.moveaxis(query_BNHD.reshape(batch, -1, QUERIES, heads, width), 1, 0)
    parts = lax.map(lambda part: attention(part, key_BMHD, value_BMHD), parts)
    return jnp.moveaxis(parts, 0, 1).reshape(query_BNHD.shape)
