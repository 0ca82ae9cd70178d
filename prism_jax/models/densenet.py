"""DenseNet (arXiv 1608.06993)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers, stem
from prism_jax.types import Array


class DenseNet(nn.Module):
    """DenseNet-BC. The small stem has stride 1 and no pooling: 16 px end as 2x2 maps.

    Attributes:
      blocks: layers of each dense block.
      growth: channels that a layer adds.
    """

    num_classes: int
    blocks: tuple[int, ...] = (6, 12, 24, 16)
    growth: int = 32
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        def conv(x, features, kernel, name):
            padding = (kernel - 1) // 2
            conv = layers.Conv(
                features, kernel, 1, padding, use_bias=False, dtype=self.dtype, name=name
            )
            return conv(x)

        def norm_relu(x, name):
            return nn.relu(layers.BatchNorm(dtype=self.dtype, name=name)(x, train))

        growth = layers.scale_channels(self.growth, self.width)
        names = ("features.conv0", "features.norm0")
        if self.stem == "imagenet":
            x = stem.conv_norm_pool(
                images_BHWC, 2 * growth, 7, names=names, train=train, dtype=self.dtype
            )
        else:
            x = norm_relu(conv(images_BHWC, 2 * growth, 3, names[0]), names[1])
        for block, count in enumerate(self.blocks, start=1):
            for layer in range(1, layers.scale_blocks(count, self.depth) + 1):
                name = f"features.denseblock{block}.denselayer{layer}"
                y = conv(norm_relu(x, f"{name}.norm1"), 4 * growth, 1, f"{name}.conv1")
                y = conv(norm_relu(y, f"{name}.norm2"), growth, 3, f"{name}.conv2")
                x = jnp.concatenate([x, y], axis=-1)
            if block < len(self.blocks):
                name = f"features.transition{block}"
                x = conv(norm_relu(x, f"{name}.norm"), x.shape[-1] // 2, 1, f"{name}.conv")
                x = layers.avg_pool(x, 2)
        x = layers.global_avg_pool(norm_relu(x, "features.norm5"))
        x = layers.sow_embedding(self, x)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
