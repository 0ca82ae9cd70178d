"""RegNetY (arXiv 2003.13678)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.models.efficientnet import squeeze_excite
from prism_jax.types import Array


class RegNetY(nn.Module):
    """RegNetY. With the small stem, its first two strides are 1: 16 px end as 2x2 maps.

    Attributes:
      features, blocks: per stage.
      group: channels per group of the 3x3 convolutions.
    """

    num_classes: int
    features: tuple[int, ...] = (224, 448, 896, 2016)
    blocks: tuple[int, ...] = (2, 4, 10, 1)
    group: int = 56
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(layers.conv_norm, train=train, dtype=self.dtype)
        small = self.stem == "small"
        group = layers.scale_channels(self.group, self.width)
        x = conv_norm(
            images_BHWC,
            layers.scale_channels(32, self.width),
            3,
            1 if small else 2,
            names=("stem.0", "stem.1"),
            activation=nn.relu,
        )
        for stage, (channels, count) in enumerate(zip(self.features, self.blocks, strict=True)):
            features = layers.scale_channels(channels, self.width, group)
            for block in range(layers.scale_blocks(count, self.depth)):
                stride = 1 if block > 0 or (small and stage == 0) else 2
                name = f"trunk_output.block{stage + 1}.block{stage + 1}-{block}"
                x = self._block(x, features, features // group, stride, name, conv_norm)
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)

    def _block(self, x: Array, features: int, groups: int, stride: int, name: str, conv_norm):
        def names(part: str) -> tuple[str, str]:
            return f"{name}.{part}.0", f"{name}.{part}.1"

        y = conv_norm(x, features, 1, names=names("f.a"), activation=nn.relu)
        y = conv_norm(y, features, 3, stride, groups, names=names("f.b"), activation=nn.relu)
        y = squeeze_excite(y, round(x.shape[-1] / 4), nn.relu, f"{name}.f.se", self.dtype)
        y = conv_norm(y, features, 1, names=names("f.c"))
        if x.shape != y.shape:
            x = conv_norm(x, features, 1, stride, names=names("proj"))
        return nn.relu(x + y)
