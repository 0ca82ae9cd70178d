"""Small networks built from the package's own layers, and pools of them."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.models import layers
from prism_jax.teachers import TeacherPool
from prism_jax.types import Array, Normalisation, PyTree

GREY = Normalisation(mean=(0.5,), std=(0.25,))
COLOUR = Normalisation(mean=(0.45, 0.5, 0.4), std=(0.25, 0.2, 0.3))


class TwoConvs(nn.Module):
    """conv - BN - relu, twice, the second with stride 2; mean over the map; dense."""

    features: tuple[int, int] = (4, 6)
    num_classes: int = 5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        for i, features in enumerate(self.features, 1):
            x_BHWC = layers.Conv(
                features, 3, stride=i, padding=1, use_bias=False, dtype=self.dtype, name=f"conv{i}"
            )(x_BHWC)
            x_BHWC = nn.relu(layers.BatchNorm(dtype=self.dtype, name=f"bn{i}")(x_BHWC, train))
        pooled_BD = layers.global_avg_pool(x_BHWC)
        return layers.Dense(self.num_classes, dtype=self.dtype, name="head")(pooled_BD)


class NoNorm(nn.Module):
    """A network without BatchNorm, as AlexNet is: flatten, dense."""

    num_classes: int = 5

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        del train
        return layers.Dense(self.num_classes, name="head")(layers.flatten(x_BHWC))


class Mirror(nn.Module):
    """Its logits are the pixels it was shown, times a scale of one, plus a bias of zero."""

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        del train
        x_BD = x_BHWC.reshape(x_BHWC.shape[0], -1)
        scale_D = self.param("scale", nn.initializers.ones, x_BD.shape[-1:], jnp.float32)
        bias_D = self.param("bias", nn.initializers.zeros, x_BD.shape[-1:], jnp.float32)
        return x_BD * scale_D + bias_D


def random_variables(
    module: nn.Module, image_shape: tuple[int, int, int], seed: int, dtype=np.float32
) -> PyTree:
    """Weights and running statistics that are all of order one, so that each of them matters."""
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    )
    random = np.random.default_rng(seed)

    def value(path, leaf):
        x = random.standard_normal(leaf.shape)
        name = path[-1].key
        if name == "kernel":
            x *= np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif name == "scale":
            x = 1 + 0.3 * x
        elif name == "var":
            x = np.exp(0.5 * x)
        return x.astype(dtype)

    variables = jax.tree_util.tree_map_with_path(value, shapes)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def small_pool(
    size: int,
    *,
    image_shape: tuple[int, int, int] = (8, 8, 1),
    normalisation: Normalisation = GREY,
    num_classes: int = 5,
    dtype=np.float32,
) -> TeacherPool:
    """Teachers "a", "b", ... of different widths."""
    members = {}
    for i, name in enumerate("abcdefgh"[:size]):
        module = TwoConvs((4 + i, 6 + 2 * i), num_classes, jnp.dtype(dtype))
        members[name] = module, random_variables(module, image_shape, i, dtype)
    return TeacherPool.of(members, image_shape=image_shape, normalisation=normalisation)


def furthest(found: PyTree, wanted: PyTree) -> float:
    """The largest difference of any two values of two trees."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(np.float64(a) - np.float64(b)).max(initial=0)) for a, b in pairs)
