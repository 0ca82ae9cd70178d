"""AlexNet in the variant of arXiv 1404.5997, without BatchNorm."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array


class AlexNet(nn.Module):
    """AlexNet. The small stem drops the first pooling and reads 2x2 instead of 6x6 cells."""

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        small = self.stem == "small"

        def conv(x, features, kernel, stride, padding, index):
            features = layers.scale_channels(features, self.width)
            name = f"features.{index}"
            return nn.relu(
                layers.Conv(features, kernel, stride, padding, dtype=self.dtype, name=name)(x)
            )

        def hidden(x, index):
            x = layers.Dropout(self.dropout, name=f"classifier.{index - 1}")(x, train)
            features = layers.scale_channels(4096, self.width)
            name = f"classifier.{index}"
            return nn.relu(layers.Dense(features, dtype=self.dtype, name=name)(x))

        if small:
            x = conv(images_BHWC, 64, 3, 1, 1, index=0)
        else:
            x = conv(images_BHWC, 64, 11, 4, 2, index=0)
            x = layers.max_pool(x, 3, 2)
        x = layers.max_pool(conv(x, 192, 5, 1, 2, index=3), 3, 2)
        x = conv(x, 384, 3, 1, 1, index=6)
        for extra in range(layers.scale_blocks(2, self.depth)):
            x = conv(x, 256, 3, 1, 1, index=8 + 2 * extra)
        x = layers.adaptive_avg_pool(layers.max_pool(x, 3, 2), 2 if small else 6)
        x = hidden(hidden(layers.flatten(x), 1), 4)
        x = layers.sow_embedding(self, x)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.6")(x)
