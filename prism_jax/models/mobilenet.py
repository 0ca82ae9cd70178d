"""MobileNetV2 (arXiv 1801.04381) and MnasNet (arXiv 1807.11626): inverted residuals."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.types import Array

# expansion, features, blocks, stride
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
# kernel, expansion, features, blocks, stride
MNASNET_STAGES = (
    (3, 3, 24, 3, 2),
    (5, 3, 40, 3, 2),
    (5, 6, 80, 3, 2),
    (3, 6, 96, 2, 1),
    (5, 6, 192, 4, 2),
    (3, 6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2. With the small stem, its first two strides are 1: 16 px end as 2x2 maps."""

    num_classes: int
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(
            layers.conv_norm, activation=nn.relu6, train=train, dtype=self.dtype
        )
        small = self.stem == "small"
        features = layers.scale_channels(32, self.width)
        names = ("features.0.0", "features.0.1")
        x = conv_norm(images_BHWC, features, 3, 1 if small else 2, names=names)
        index = 1
        for stage, (expansion, channels, blocks, stage_stride) in enumerate(MOBILENET_STAGES):
            for block in range(layers.scale_blocks(blocks, self.depth)):
                stride = 1 if block > 0 or (small and stage == 1) else stage_stride
                x = self._block(
                    x,
                    layers.scale_channels(channels, self.width),
                    expansion,
                    stride,
                    f"features.{index}.conv",
                    conv_norm,
                )
                index += 1
        last = layers.scale_channels(1280, self.width)
        x = conv_norm(x, last, 1, names=(f"features.{index}.0", f"features.{index}.1"))
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        x = layers.Dropout(self.dropout, name="classifier.0")(x, train)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.1")(x)

    @staticmethod
    def _block(x: Array, features: int, expansion: int, stride: int, name: str, conv_norm):
        hidden = x.shape[-1] * expansion
        y, at = x, 0
        if expansion > 1:
            y = conv_norm(y, hidden, 1, names=(f"{name}.0.0", f"{name}.0.1"))
            at = 1
        names = (f"{name}.{at}.0", f"{name}.{at}.1")
        y = conv_norm(y, hidden, 3, stride, groups=hidden, names=names)
        names = (f"{name}.{at + 1}", f"{name}.{at + 2}")
        y = conv_norm(y, features, 1, names=names, activation=None)
        return x + y if x.shape == y.shape else y


class MnasNet(nn.Module):
    """MnasNet-A1 without squeeze-excitation ("B1"), as torchvision's mnasnet.

    Reference: the BatchNorm momentum of 3e-4 needs the tens of thousands of steps of ImageNet.
    The small stem, which torchvision does not have, takes the usual 0.1.

    Attributes:
      alpha: the variant's own width multiplier (1.3 for mnasnet1_3).
    """

    num_classes: int
    alpha: float = 1.0
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        small = self.stem == "small"
        conv_norm = functools.partial(
            layers.conv_norm,
            train=train,
            dtype=self.dtype,
            momentum=layers.MOMENTUM if small else 3e-4,
        )

        def scaled(channels: int) -> int:
            return layers.scale_channels(round_up(channels * self.alpha), self.width)

        x, first = images_BHWC, scaled(32)
        x = conv_norm(
            x, first, 3, 1 if small else 2, names=("layers.0", "layers.1"), activation=nn.relu
        )
        x = conv_norm(x, first, 3, groups=first, names=("layers.3", "layers.4"), activation=nn.relu)
        x = conv_norm(x, scaled(16), 1, names=("layers.6", "layers.7"))
        for stage, (kernel, expansion, channels, blocks, stage_stride) in enumerate(MNASNET_STAGES):
            for block in range(layers.scale_blocks(blocks, self.depth)):
                stride = 1 if block > 0 or (small and stage == 0) else stage_stride
                name = f"layers.{8 + stage}.{block}.layers"
                hidden = x.shape[-1] * expansion
                names = [(f"{name}.{i}", f"{name}.{i + 1}") for i in (0, 3, 6)]
                y = conv_norm(x, hidden, 1, names=names[0], activation=nn.relu)
                y = conv_norm(y, hidden, kernel, stride, hidden, names=names[1], activation=nn.relu)
                y = conv_norm(y, scaled(channels), 1, names=names[2])
                x = x + y if x.shape == y.shape else y
        last = layers.scale_channels(1280, self.width)
        x = conv_norm(x, last, 1, names=("layers.14", "layers.15"), activation=nn.relu)
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        x = layers.Dropout(self.dropout, name="classifier.0")(x, train)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.1")(x)


def round_up(channels: float, divisor: int = 8) -> int:
    """Round to the divisor, upwards unless that adds less than a tenth (torchvision's rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor
