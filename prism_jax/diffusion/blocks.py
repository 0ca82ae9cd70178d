"""What the U-Net, the autoencoder and the text encoder are built from; diffusers' names."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from prism_jax import parallel
from prism_jax.models import layers
from prism_jax.types import Array

QUERIES = 1024  # that meet all keys at once
SCORES = 2**22  # more than these a CPU makes image by image
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


class Doubled(nn.Module):
    """A 3x3 convolution, over zeros, of a map whose every pixel comes four times.

    A window there sees four pixels at most, so each corner of a pixel is a 2x2 convolution of the
    map itself, by sums of the kernel's rows and columns: 16 products in place of 36.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        shape = 3, 3, x_BHWC.shape[-1], self.features
        kernel_HWIO = layers.parameter(
            self, "kernel", nn.initializers.he_normal(), shape, jnp.float32
        )
        bias = layers.parameter(self, "bias", nn.initializers.zeros, shape[-1:], jnp.float32)
        x_BHWC = x_BHWC.astype(self.dtype)

        def corner(down: int, right: int) -> Array:
            kernel = _seen(_seen(kernel_HWIO, 0, down), 1, right).astype(self.dtype)
            edges = (0, 0), (1 - down, down), (1 - right, right), (0, 0)
            return layers.conv2d(jnp.pad(x_BHWC, edges), kernel)

        y_BHWC = interleaved([[corner(i, j) for j in (0, 1)] for i in (0, 1)])
        return y_BHWC + bias.astype(self.dtype)


def _seen(kernel_HWIO: Array, axis: int, second: int) -> Array:
    """What the first, or the second, of two equal pixels sees: three taps are two."""
    first, middle, last = jnp.split(kernel_HWIO, 3, axis)
    pair = [first + middle, last] if second else [first, middle + last]
    return jnp.concatenate(pair, axis)


def interleaved(corners: list[list[Array]]) -> Array:
    """A map of the maps of every pixel's corners, (B, H, W, C) each: rows of columns."""
    batch, rows, columns, channels = corners[0][0].shape
    whole = jnp.stack([jnp.stack(row, 3) for row in corners], 2)
    return whole.reshape(batch, 2 * rows, 2 * columns, channels)


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
    """Softmax attention; scores and softmax are float32 at least, whatever the inputs are."""
    given = query_BNHD, key_BMHD, value_BMHD
    if causal:
        return jax.nn.dot_product_attention(*given, is_causal=True)
    return parallel.suited(cpu=_on_cpu, default=_in_parts)(*given)


def _in_parts(query_BNHD: Array, key_BMHD: Array, value_BMHD: Array) -> Array:
    """Long sequences go a part of the queries at a time: scores of a whole image at 64 x 64 would
    take a gigabyte. XLA:GPU knows a softmax by the division of its weights: a fifth of the bytes.
    """
    batch, tokens, heads, width = query_BNHD.shape
    if tokens <= QUERIES or tokens % QUERIES:
        return jax.nn.dot_product_attention(query_BNHD, key_BMHD, value_BMHD)
    parts = jnp.moveaxis(query_BNHD.reshape(batch, -1, QUERIES, heads, width), 1, 0)
    parts = lax.map(lambda part: jax.nn.dot_product_attention(part, key_BMHD, value_BMHD), parts)
    return jnp.moveaxis(parts, 0, 1).reshape(query_BNHD.shape)


def _on_cpu(query_BNHD: Array, key_BMHD: Array, value_BMHD: Array) -> Array:
    """One image after another where there are many scores.

    XLA:CPU makes one operation of both products and what is between them, if the weights' sums
    divide the result. It asks for the room of the scores anew each time, and above 64 MB gets it
    from the operating system, page by page, which takes as long as the rest (measured, jax 0.10).
    """
    given = tuple(jnp.swapaxes(x, 1, 2) for x in (query_BNHD, key_BMHD, value_BMHD))
    batch, heads, tokens, _ = given[0].shape
    if batch * heads * tokens * key_BMHD.shape[1] <= SCORES:
        return jnp.swapaxes(_fused(*given), 1, 2)
    return jnp.swapaxes(lax.map(lambda image: _fused(*image), given), 1, 2)


def _fused(query: Array, key: Array, value: Array) -> Array:
    """Attention of (..., tokens, width)."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    product = functools.partial(jnp.einsum, preferred_element_type=wide)
    scores = product("...nd,...md->...nm", query, key)
    highest = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp((scores - highest) * query.shape[-1] ** -0.5)
    mixed = product("...nm,...md->...nd", weights.astype(value.dtype), value)
    return (mixed / weights.sum(-1, keepdims=True)).astype(query.dtype)
