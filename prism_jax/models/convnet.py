"""ConvNet-D: the plain student of dataset condensation (arXiv 2006.05929)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array

NORMS = {"batch": layers.BatchNorm, "instance": layers.InstanceNorm, "none": None}


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, norm, ReLU and 2x2 average pooling, then one linear layer.

    The linear layer reads the whole last map, so the weights belong to one image size. The stem
    is the same for all sizes.

    Attributes:
      blocks: how many; each halves the map.
      norm: "batch", "instance" (the field's default; no BatchNorm to align) or "none".
    """

    num_classes: int
    blocks: int = 3
    norm: str = "instance"
    width: float = 1.0
    depth: float = 1.0
    stem: str = "small"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        features = layers.scale_channels(128, self.width)
        norm = NORMS[self.norm]
        x, index = images_BHWC, 0
        for _ in range(layers.scale_blocks(self.blocks, self.depth)):
            name = f"features.{index}"
            x = layers.Conv(features, 3, padding=1, dtype=self.dtype, name=name)(x)
            if norm is not None:
                x = norm(dtype=self.dtype, name=f"features.{index + 1}")(x, train)
            x = layers.avg_pool(nn.relu(x), 2)
            index += 3 if norm is None else 4
        x = layers.sow_embedding(self, layers.flatten(x))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
