"""ConvNeXt (arXiv 2201.03545)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp

from prism_jax.models import layers
from prism_jax.models.vit import mlp
from prism_jax.types import Array


class ConvNeXt(nn.Module):
    """ConvNeXt. The small stem is 3x3 at stride 1: 16 px end as 2x2 maps.

    Attributes:
      features, blocks: per stage.
    """

    num_classes: int
    features: tuple[int, ...] = (96, 192, 384, 768)
    blocks: tuple[int, ...] = (3, 3, 9, 3)
    stochastic_depth: float = 0.1
    layer_scale: float = 1e-6
    width: float = 1.0
    depth: float = 1.0
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array, train: bool = False) -> Array:
        counts = [layers.scale_blocks(count, self.depth) for count in self.blocks]
        widths = [layers.scale_channels(features, self.width) for features in self.features]
        norm = functools.partial(layers.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        conv = functools.partial(layers.Conv, dtype=self.dtype)
        kernel, stride, padding = (3, 1, 1) if self.stem == "small" else (4, 4, 0)
        x = conv(widths[0], kernel, stride, padding, name="features.0.0")(images_BHWC)
        x = norm(name="features.0.1")(x)
        index = 0
        for stage, (features, count) in enumerate(zip(widths, counts, strict=True)):
            if stage > 0:
                x = norm(name=f"features.{2 * stage}.0")(x)
                x = conv(features, 2, 2, name=f"features.{2 * stage}.1")(x)
            for block in range(count):
                name = f"features.{2 * stage + 1}.{block}"
                rate = self.stochastic_depth * index / max(sum(counts) - 1, 1)
                y = conv(features, 7, 1, 3, features, name=f"{name}.block.0")(x)
                y = norm(name=f"{name}.block.2")(y)
                y = mlp(y, 4 * features, (f"{name}.block.3", f"{name}.block.5"), self.dtype)
                init = nn.initializers.constant(self.layer_scale)
                scale_C = self.param(f"{name}.layer_scale", init, (features,), jnp.float32)
                drop = layers.Dropout(rate, whole_images=True, name=f"{name}.stochastic_depth")
                x = x + drop(y * scale_C.astype(self.dtype), train)
                index += 1
        x = norm(name="classifier.0")(layers.global_avg_pool(x))
        x = layers.sow_embedding(self, x)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="classifier.2")(x)
