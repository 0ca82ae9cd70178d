"""VGG with BatchNorm (arXiv 1409.1556)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array

FEATURES = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """VGG. The small stem drops the first pooling and reads one cell instead of 7x7.

    Attributes:
      convolutions: per stage; a stage ends with a pooling.
    """

    num_classes: int
    convolutions: tuple[int, ...] = (1, 1, 2, 2, 2)
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        small = self.stem == "small"
        x, index = images_BHWC, 0
        for stage, count in enumerate(self.convolutions):
            features = layers.scale_channels(FEATURES[stage], self.width)
            for _ in range(layers.scale_blocks(count, self.depth)):
                name = f"features.{index}"
                x = layers.Conv(features, 3, padding=1, dtype=self.dtype, name=name)(x)
                norm = layers.BatchNorm(dtype=self.dtype, name=f"features.{index + 1}")
                x = nn.relu(norm(x, train))
                index += 3
            if stage > 0 or not small:
                x = layers.max_pool(x, 2, 2)
            index += 1
        x = layers.flatten(layers.adaptive_avg_pool(x, 1 if small else 7))
        hidden = layers.scale_channels(4096, self.width)
        for name, dropout in (("classifier.0", "classifier.2"), ("classifier.3", "classifier.5")):
            init = nn.initializers.he_normal()
            x = nn.relu(layers.Dense(hidden, init, dtype=self.dtype, name=name)(x))
            x = layers.Dropout(self.dropout, name=dropout)(x, train)
        x = layers.sow_embedding(self, x)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.6")(x)
