"""Swin transformer (arXiv 2103.14030)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from prism_jax.models import layers
from prism_jax.models.vit import attention, mlp
from prism_jax.types import Array

HEAD = 32  # channels of an attention head
MASKED = -100.0


class Swin(nn.Module):
    """Swin. The small stem reads patches of 2 and attends in windows of 4.

    Attributes:
      heads: attention heads of 32 channels in the first stage; every stage doubles them.
      blocks: per stage.
    """

    num_classes: int
    heads: int = 3
    blocks: tuple[int, ...] = (2, 2, 6, 2)
    stochastic_depth: float = 0.2
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        patch, window = (2, 4) if self.stem == "small" else (4, 7)
        counts = [layers.scale_blocks(count, self.depth) for count in self.blocks]
        heads = max(1, round(self.heads * self.width))
        norm = functools.partial(layers.LayerNorm, epsilon=1e-5, dtype=self.dtype)
        conv = layers.Conv(heads * HEAD, patch, patch, dtype=self.dtype, name="features.0.0")
        x = norm(name="features.0.2")(conv(images_BHWC))
        index = 0
        for stage, count in enumerate(counts):
            if stage > 0:
                x = _merge(x, f"features.{2 * stage}", norm, self.dtype)
            for block in range(count):
                name = f"features.{2 * stage + 1}.{block}"
                rate = self.stochastic_depth * index / max(sum(counts) - 1, 1)
                drop = functools.partial(layers.Dropout, rate, whole_images=True)
                shift = window // 2 if block % 2 else 0
                y = norm(name=f"{name}.norm1")(x)
                y = self._attend(y, heads * 2**stage, window, shift, f"{name}.attn")
                x = x + drop(name=f"{name}.drop1")(y, train)
                y = norm(name=f"{name}.norm2")(x)
                names = (f"{name}.mlp.0", f"{name}.mlp.3")
                y = mlp(y, 4 * y.shape[-1], names, self.dtype)
                x = x + drop(name=f"{name}.drop2")(y, train)
                index += 1
        x = layers.sow_embedding(self, layers.global_avg_pool(norm(name="norm")(x)))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="head")(x)

    def _attend(self, x: Array, heads: int, window: int, shift: int, name: str) -> Array:
        """Attend within windows; shifted ones wrap around and mask what is not adjacent."""
        table = self.param(
            f"{name}.relative_position_bias_table",
            nn.initializers.truncated_normal(0.02),
            ((2 * window - 1) ** 2, heads),
            jnp.float32,
        )
        bias = jnp.moveaxis(table[_relative_position(window)], 2, 0)[None].astype(self.dtype)
        batch, height, width, features = x.shape
        rows, columns = -(-height // window), -(-width // window)
        x = jnp.pad(x, ((0, 0), (0, rows * window - height), (0, columns * window - width), (0, 0)))
        shifts = [shift if count > 1 else 0 for count in (rows, columns)]
        x = jnp.roll(x, [-s for s in shifts], (1, 2))
        x = x.reshape(batch, rows, window, columns, window, features).swapaxes(2, 3)
        x = x.reshape(batch * rows * columns, window * window, features)
        if any(shifts):
            mask = jnp.asarray(_apart(rows, columns, window, shifts) * MASKED, self.dtype)
            bias = bias + jnp.tile(mask, (batch, 1, 1))[:, None]
        x = attention(x, heads, name, self.dtype, bias)
        x = x.reshape(batch, rows, columns, window, window, features).swapaxes(2, 3)
        x = x.reshape(batch, rows * window, columns * window, features)
        return jnp.roll(x, shifts, (1, 2))[:, :height, :width]


def _merge(x: Array, name: str, norm, dtype: jnp.dtype) -> Array:
    """Make one token of 2x2, with twice the channels."""
    height, width, features = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
    x = norm(name=f"{name}.norm")(jnp.concatenate(corners, axis=-1))
    reduction = layers.Dense(2 * features, use_bias=False, dtype=dtype, name=f"{name}.reduction")
    return reduction(x)


def _relative_position(window: int) -> np.ndarray:
    """Row of the bias table for every pair of tokens of a window: (N, N)."""
    at = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    down, right = at[:, :, None] - at[:, None, :] + window - 1
    return down * (2 * window - 1) + right


def _apart(rows: int, columns: int, window: int, shifts: list[int]) -> np.ndarray:
    """Which pairs of tokens share a window only because of the wrap-around: (windows, N, N)."""

    def parts(count: int, shift: int) -> np.ndarray:
        at = np.arange(count * window)
        borders = [(count - 1) * window, count * window - shift] if shift else []
        return np.digitize(at, borders)

    part = 3 * parts(rows, shifts[0])[:, None] + parts(columns, shifts[1])
    part = part.reshape(rows, window, columns, window).swapaxes(1, 2).reshape(rows * columns, -1)
    return part[:, :, None] != part[:, None, :]
