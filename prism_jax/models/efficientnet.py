"""EfficientNet-B0 (arXiv 1905.11946)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array

# expansion, kernel, stride, features, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class EfficientNet(nn.Module):
    """EfficientNet. With the small stem, its first two strides are 1: 16 px end as 2x2 maps."""

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.2
    stochastic_depth: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(
            layers.conv_norm, activation=nn.silu, train=train, dtype=self.dtype
        )
        small = self.stem == "small"
        counts = [layers.scale_blocks(blocks, self.depth) for *_, blocks in STAGES]
        features = layers.scale_channels(32, self.width)
        names = ("features.0.0", "features.0.1")
        x = conv_norm(images_BHWC, features, 3, 1 if small else 2, names=names)
        index = 0
        for stage, (expansion, kernel, stage_stride, channels, _) in enumerate(STAGES):
            for block in range(counts[stage]):
                stride = 1 if block > 0 or (small and stage == 1) else stage_stride
                name = f"features.{stage + 1}.{block}"
                features = layers.scale_channels(channels, self.width)
                y = self._block(x, features, expansion, kernel, stride, name, conv_norm)
                if x.shape == y.shape:
                    rate = self.stochastic_depth * index / sum(counts)
                    drop = layers.Dropout(rate, whole_images=True, name=f"{name}.drop")
                    y = x + drop(y, train)
                x, index = y, index + 1
        last = layers.scale_channels(1280, self.width)
        x = conv_norm(x, last, 1, names=("features.8.0", "features.8.1"))
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        x = layers.Dropout(self.dropout, name="classifier.0")(x, train)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.1")(x)

    def _block(self, x, features, expansion, kernel, stride, name, conv_norm) -> Array:
        """Expand, convolve each channel, reweight the channels, project."""
        inputs, at = x.shape[-1], 0
        hidden = inputs * expansion
        if expansion > 1:
            x = conv_norm(x, hidden, 1, names=(f"{name}.block.0.0", f"{name}.block.0.1"))
            at = 1
        names = (f"{name}.block.{at}.0", f"{name}.block.{at}.1")
        x = conv_norm(x, hidden, kernel, stride, groups=hidden, names=names)
        squeeze = f"{name}.block.{at + 1}"
        x = squeeze_excite(x, max(1, inputs // 4), nn.silu, squeeze, self.dtype)
        names = (f"{name}.block.{at + 2}.0", f"{name}.block.{at + 2}.1")
        return conv_norm(x, features, 1, names=names, activation=None)


def squeeze_excite(x_BHWC: Array, features: int, activation, name: str, dtype) -> Array:
    """Scale every channel by what all channels are on average (arXiv 1709.01507)."""
    conv = functools.partial(layers.Conv, kernel_size=1, dtype=dtype)
    scale = jnp.mean(x_BHWC, axis=(1, 2), keepdims=True)
    scale = activation(conv(features, name=f"{name}.fc1")(scale))
    return x_BHWC * nn.sigmoid(conv(x_BHWC.shape[-1], name=f"{name}.fc2")(scale))
