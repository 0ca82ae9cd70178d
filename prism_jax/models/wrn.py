"""Wide residual networks for CIFAR (arXiv 1605.07146)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array


class WideResNet(nn.Module):
    """WRN with pre-activation blocks; the stem is 3x3 at every size.

    Attributes:
      blocks: per stage; the published depth is ``6 * blocks + 4``.
      widen: the published width.
    """

    num_classes: int
    blocks: int = 2
    widen: int = 2
    width: float = 1.0
    depth: float = 1.0
    stem: str = "small"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        def conv(x, features, kernel, name, stride=1):
            padding = (kernel - 1) // 2
            conv = layers.Conv(
                features, kernel, stride, padding, use_bias=False, dtype=self.dtype, name=name
            )
            return conv(x)

        def norm_relu(x, name):
            return nn.relu(layers.BatchNorm(dtype=self.dtype, name=name)(x, train))

        features = layers.scale_channels(16, self.width)
        x = conv(images_BHWC, features, 3, "conv1")
        for stage in range(3):
            features = layers.scale_channels(16 * 2**stage * self.widen, self.width)
            for block in range(layers.scale_blocks(self.blocks, self.depth)):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"block{stage + 1}.layer.{block}"
                y = norm_relu(x, f"{name}.bn1")
                if x.shape[-1] != features:
                    x = conv(y, features, 1, f"{name}.convShortcut", stride)
                elif stride == 2:
                    x = x[:, ::2, ::2]
                y = conv(y, features, 3, f"{name}.conv1", stride)
                x = x + conv(norm_relu(y, f"{name}.bn2"), features, 3, f"{name}.conv2")
        x = layers.sow_embedding(self, layers.global_avg_pool(norm_relu(x, "bn1")))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)
