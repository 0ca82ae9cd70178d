"""ShuffleNetV2 (arXiv 1807.11164)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers, stem
from prism_jax.types import Array


class ShuffleNetV2(nn.Module):
    """ShuffleNetV2. The small stem has stride 1 and no pooling: 16 px end as 2x2 maps.

    Attributes:
      features: of the three stages and of the last convolution.
      blocks: units per stage.
    """

    num_classes: int
    features: tuple[int, int, int, int]
    blocks: tuple[int, int, int] = (4, 8, 4)
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        conv_norm = functools.partial(layers.conv_norm, train=train, dtype=self.dtype)
        first, *stages, last = (layers.scale_channels(c, self.width) for c in (24, *self.features))
        names = ("conv1.0", "conv1.1")
        if self.stem == "imagenet":
            x = stem.conv_norm_pool(
                images_BHWC, first, 3, names=names, train=train, dtype=self.dtype
            )
        else:
            x = conv_norm(images_BHWC, first, 3, names=names, activation=nn.relu)
        for stage, (features, blocks) in enumerate(zip(stages, self.blocks, strict=True), start=2):
            for block in range(layers.scale_blocks(blocks, self.depth)):
                name = f"stage{stage}.{block}"
                x = _unit(x, features // 2, 2 if block == 0 else 1, name, conv_norm)
        x = conv_norm(x, last, 1, names=("conv5.0", "conv5.1"), activation=nn.relu)
        x = layers.sow_embedding(self, layers.global_avg_pool(x))
        return layers.Dense(self.num_classes, dtype=self.dtype, name="fc")(x)


def _unit(x: Array, half: int, stride: int, name: str, conv_norm) -> Array:
    """Pass half of the channels (all, at stride 2) through a branch, then shuffle the halves."""
    kept, y = (x, x) if stride == 2 else jnp.split(x, 2, axis=-1)
    if stride == 2:
        branch = f"{name}.branch1"
        inputs = kept.shape[-1]
        names = (f"{branch}.0", f"{branch}.1")
        kept = conv_norm(kept, inputs, 3, 2, groups=inputs, names=names)
        names = (f"{branch}.2", f"{branch}.3")
        kept = conv_norm(kept, half, 1, names=names, activation=nn.relu)
    branch = f"{name}.branch2"
    y = conv_norm(y, half, 1, names=(f"{branch}.0", f"{branch}.1"), activation=nn.relu)
    y = conv_norm(y, half, 3, stride, groups=half, names=(f"{branch}.3", f"{branch}.4"))
    y = conv_norm(y, half, 1, names=(f"{branch}.5", f"{branch}.6"), activation=nn.relu)
    return jnp.stack([kept, y], axis=-1).reshape(*y.shape[:3], 2 * half)
