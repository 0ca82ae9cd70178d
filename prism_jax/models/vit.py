"""Vision transformers: ViT (arXiv 2010.11929) and DeiT (arXiv 2012.12877)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array

HEAD = 64  # channels of an attention head
gelu = functools.partial(nn.gelu, approximate=False)


class VisionTransformer(nn.Module):
    """ViT with a class token. Its position embedding belongs to one image size.

    Attributes:
      heads: attention heads of 64 channels.
      blocks: transformer blocks.
      patch: side of a patch in pixels; the small stem reads patches of 4.
      stochastic_depth: rate of the last block; earlier ones have less.
    """

    num_classes: int
    heads: int
    blocks: int = 12
    patch: int = 16
    stochastic_depth: float = 0.0
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        heads = max(1, round(self.heads * self.width))
        features, blocks = heads * HEAD, layers.scale_blocks(self.blocks, self.depth)
        patch = 4 if self.stem == "small" else self.patch
        norm = functools.partial(layers.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        conv = layers.Conv(features, patch, patch, dtype=self.dtype, name="patch_embed.proj")
        x = conv(images_BHWC)
        x = x.reshape(x.shape[0], -1, features)
        init = nn.initializers.truncated_normal(0.02)
        token = self.param("cls_token", init, (1, 1, features), jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, features)), x], axis=1)
        x = x + self.param("pos_embed", init, (1, *x.shape[1:]), jnp.float32)
        x = x.astype(self.dtype)
        for block in range(blocks):
            name = f"blocks.{block}"
            rate = self.stochastic_depth * block / max(blocks - 1, 1)
            drop = functools.partial(layers.Dropout, rate, whole_images=True)
            y = attention(norm(name=f"{name}.norm1")(x), heads, f"{name}.attn", self.dtype)
            x = x + drop(name=f"{name}.drop_path1")(y, train)
            y = norm(name=f"{name}.norm2")(x)
            y = mlp(y, 4 * features, (f"{name}.mlp.fc1", f"{name}.mlp.fc2"), self.dtype)
            x = x + drop(name=f"{name}.drop_path2")(y, train)
        x = layers.sow_embedding(self, norm(name="norm")(x)[:, 0])
        return layers.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def mlp(x: Array, hidden: int, names: tuple[str, str], dtype: jnp.dtype) -> Array:
    """Two linear layers with a GELU between, added to the calling module."""
    dense = functools.partial(
        layers.Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=dtype
    )
    return dense(x.shape[-1], name=names[1])(gelu(dense(hidden, name=names[0])(x)))


def attention(
    x_BND: Array, heads: int, name: str, dtype: jnp.dtype, bias: Array | None = None
) -> Array:
    """Self-attention over N tokens, added to the calling module.

    Args:
      bias: added to the scores, broadcast to (B, heads, N, N).
    """
    batch, tokens, features = x_BND.shape
    dense = functools.partial(
        layers.Dense, kernel_init=nn.initializers.xavier_uniform(), dtype=dtype
    )
    qkv = dense(3 * features, name=f"{name}.qkv")(x_BND)
    query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, heads, -1), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(dtype, jnp.float32)))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), value)
    return dense(features, name=f"{name}.proj")(y.reshape(x_BND.shape))
