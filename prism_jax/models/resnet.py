"""ResNet (arXiv 1512.03385), wide ResNet-50-2 (arXiv 1605.07146) and the CIFAR ResNets."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers, stem
from prism_jax.types import Array


class ResNet(nn.Module):
    """ResNet for ImageNet, version 1.5: the stride of a bottleneck is in its 3x3 convolution.

    Attributes:
      blocks: residual blocks per stage.
      bottleneck: 1x1, 3x3, 1x1 blocks with four times the features at the end, or two 3x3.
      inner: multiplier of the features inside a bottleneck (2 for wide_resnet50_2).
    """

    num_classes: int
    blocks: tuple[int, ...]
    bottleneck: bool = False
    inner: int = 1
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(layers.conv_norm, train=train, dtype=self.dtype)
        features = layers.scale_channels(64, self.width)
        names = ("conv1", "bn1")
        if self.stem == "imagenet":
            x = stem.conv_norm_pool(
                images_BHWC, features, 7, names=names, train=train, dtype=self.dtype
            )
        else:
            x = conv_norm(images_BHWC, features, 3, names=names, activation=nn.relu)
        for stage, count in enumerate(self.blocks):
            for block in range(layers.scale_blocks(count, self.depth)):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}.{block}"
                x = self._block(x, features * 2**stage, stride, name, conv_norm)
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)

    def _block(self, x: Array, features: int, stride: int, name: str, conv_norm) -> Array:
        if self.bottleneck:
            plan = [(features * self.inner, 1, 1), (features * self.inner, 3, stride)]
            plan.append((features * 4, 1, 1))
        else:
            plan = [(features, 3, stride), (features, 3, 1)]
        y = x
        for i, (width, kernel, step) in enumerate(plan, start=1):
            names = (f"{name}.conv{i}", f"{name}.bn{i}")
            last = i == len(plan)
            y = conv_norm(y, width, kernel, step, names=names, activation=None if last else nn.relu)
        if x.shape != y.shape:
            names = (f"{name}.downsample.0", f"{name}.downsample.1")
            x = conv_norm(x, y.shape[-1], 1, stride, names=names)
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-6n+2 for 32-pixel images; its shortcuts have no weights (option A).

    A shortcut that changes the map takes every second pixel and pads channels with zeros.

    Attributes:
      blocks: residual blocks in each of the three stages.
    """

    num_classes: int
    blocks: int
    width: float = 1.0
    depth: float = 1.0
    stem: str = "small"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(layers.conv_norm, train=train, dtype=self.dtype)
        features = layers.scale_channels(16, self.width)
        x = conv_norm(images_BHWC, features, 3, names=("conv1", "bn1"), activation=nn.relu)
        for stage in range(3):
            width = features * 2**stage
            for block in range(layers.scale_blocks(self.blocks, self.depth)):
                name = f"layer{stage + 1}.{block}"
                stride = 2 if stage > 0 and block == 0 else 1
                names = [(f"{name}.conv{i}", f"{name}.bn{i}") for i in (1, 2)]
                y = conv_norm(x, width, 3, stride, names=names[0], activation=nn.relu)
                y = conv_norm(y, width, 3, names=names[1])
                if stride == 2:
                    grown = width - x.shape[-1]
                    edges = ((0, 0), (0, 0), (0, 0), (grown // 2, grown - grown // 2))
                    x = jnp.pad(x[:, ::2, ::2], edges)
                x = nn.relu(x + y)
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="linear")(x)
