"""CLIP (arXiv 2103.00020): the text encoder of Stable Diffusion, and the image encoder.

Both give embeddings in one space where the weights have a projection.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.diffusion.blocks import Attention, gelu
from prism_jax.diffusion.forms import check_divides, stated
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.types import Array, Normalisation, PyTree

# What the image encoder was trained with.
NORMALISATION = Normalisation(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)
)


def quick_gelu(x: Array) -> Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    heads: int
    hidden: int
    activation: str
    epsilon: float
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BND: Array) -> Array:
        norm = functools.partial(layers.LayerNorm, self.epsilon, self.dtype)
        dense = functools.partial(layers.Dense, dtype=self.dtype)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        attention = Attention(self.heads, names, True, self.causal, self.dtype, name="self_attn")
        x_BND = x_BND + attention(norm(name="layer_norm1")(x_BND))
        y_BND = dense(self.hidden, name="mlp.fc1")(norm(name="layer_norm2")(x_BND))
        y_BND = ACTIVATIONS[self.activation](y_BND)
        return x_BND + dense(x_BND.shape[-1], name="mlp.fc2")(y_BND)


class TextEncoder(nn.Module):
    """Tokens to one state each, and to one embedding of the text. The defaults are CLIP-L's.

    Attributes:
      vocabulary: tokens that exist.
      length: tokens of a text, with its padding.
      depth, width, heads, hidden: layers; channels of a state; of the attention; of the MLP.
      activation: a key of ``ACTIVATIONS``.
      end: the token at whose first place the embedding is read; None: at the largest token's,
        which is the same where a config names the wrong one.
      projection: channels of the embedding; None: it is the state itself.
      dtype: of the computation; parameters, norms and softmax are float32.
    """

    vocabulary: int = 49408
    length: int = 77
    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end: int | None = None
    projection: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens_BN: Array) -> tuple[Array, Array]:
        shape = {"token": (self.vocabulary, self.width), "position": (self.length, self.width)}
        table, positions = (
            _table(self, f"embeddings.{name}_embedding.weight", shape[name]) for name in shape
        )
        x_BND = (table[tokens_BN] + positions[: tokens_BN.shape[1]]).astype(self.dtype)
        arguments = self.heads, self.hidden, self.activation, self.epsilon, True, self.dtype
        for index in range(self.depth):
            x_BND = Layer(*arguments, name=f"encoder.layers.{index}")(x_BND)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x_BND = layers.LayerNorm(self.epsilon, self.dtype, name="final_layer_norm")(x_BND)
        marks_BN = tokens_BN if self.end is None else tokens_BN == self.end
        embedding_BD = x_BND[jnp.arange(len(x_BND)), jnp.argmax(marks_BN, 1)]
        embedding_BD = _projected(embedding_BD, self.projection, "text_projection", self.dtype)
        return x_BND.astype(wide), embedding_BD.astype(wide)

    @nn.nowrap
    def encode(self, params: PyTree, tokens_BN: Array) -> tuple[Array, Array]:
        """States (B, N, width) and embeddings (B, D), float32."""
        found: Any = self.apply({"params": params}, tokens_BN)
        return found


class ImageEncoder(nn.Module):
    """Images, in ``NORMALISATION``, to one embedding each. The defaults are ViT-B/32's.

    Attributes:
      size, patch: sides of an image and of its patches in pixels.
      channels: of images.
      depth, width, heads, hidden, activation, epsilon, dtype: as of :class:`TextEncoder`.
      projection: channels of the embedding.
    """

    size: int = 224
    patch: int = 32
    channels: int = 3
    depth: int = 12
    width: int = 768
    heads: int = 12
    hidden: int = 3072
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    projection: int = 512
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images_BHWC: Array) -> Array:
        if images_BHWC.shape[1:] != (self.size, self.size, self.channels):
            raise UserError(
                f"this CLIP reads images of {self.size} x {self.size} px and {self.channels} "
                f"channels, not of {images_BHWC.shape[1:]}; resize them first"
            )
        batch, tokens = len(images_BHWC), (self.size // self.patch) ** 2
        patches = layers.Conv(
            self.width, self.patch, self.patch, use_bias=False, dtype=self.dtype,
            name="embeddings.patch_embedding",
        )  # fmt: skip
        first_D = _table(self, "embeddings.class_embedding", (self.width,))
        positions = _table(self, "embeddings.position_embedding.weight", (tokens + 1, self.width))
        x_BND = patches(images_BHWC).reshape(batch, tokens, self.width)
        first_BND = jnp.broadcast_to(first_D.astype(self.dtype), (batch, 1, self.width))
        x_BND = jnp.concatenate([first_BND, x_BND], 1) + positions.astype(self.dtype)
        norm = functools.partial(layers.LayerNorm, self.epsilon, self.dtype)
        x_BND = norm(name="pre_layrnorm")(x_BND)
        arguments = self.heads, self.hidden, self.activation, self.epsilon, False, self.dtype
        for index in range(self.depth):
            x_BND = Layer(*arguments, name=f"encoder.layers.{index}")(x_BND)
        embedding_BD = norm(name="post_layernorm")(x_BND[:, 0])
        embedding_BD = _projected(embedding_BD, self.projection, "visual_projection", self.dtype)
        return embedding_BD.astype(jnp.promote_types(self.dtype, jnp.float32))

    @nn.nowrap
    def embed(self, params: PyTree, images_BHWC: Array) -> Array:
        """Embeddings (B, projection), float32, not of unit length."""
        found: Any = self.apply({"params": params}, images_BHWC)
        return found


def _table(module: nn.Module, name: str, shape: tuple[int, ...]) -> Array:
    return layers.parameter(module, name, nn.initializers.normal(0.02), shape, jnp.float32)


def _projected(x_BD: Array, features: int | None, name: str, dtype: jnp.dtype) -> Array:
    if features is None:
        return x_BD
    return layers.Dense(features, use_bias=False, dtype=dtype, name=name)(x_BD)


def _encoder(config: dict[str, Any], what: str, free: dict[str, Any]) -> dict[str, Any]:
    """Our names of what a config of transformers says; most of its entries are not of the form."""
    found = stated(
        config,
        what,
        free={
            **free,
            "num_hidden_layers": 12,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 512,
        },
        fixed={},
        idle=config.keys(),
        optional=("eos_token_id", "projection_dim"),
    )
    heads = found["num_attention_heads"]
    check_divides(what, "num_attention_heads", heads, [found["hidden_size"]])
    if found["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"this {what} has hidden_act={found['hidden_act']!r}; "
            f"{' and '.join(ACTIVATIONS)} are implemented"
        )
    ours = {
        "num_hidden_layers": "depth",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "intermediate_size": "hidden",
        "hidden_act": "activation",
        "layer_norm_eps": "epsilon",
        "projection_dim": "projection",
        "vocab_size": "vocabulary",
        "max_position_embeddings": "length",
        "eos_token_id": "end",
        "image_size": "size",
        "patch_size": "patch",
        "num_channels": "channels",
    }
    return {ours[key]: value for key, value in found.items()}


def _half(config: dict[str, Any], half: str) -> dict[str, Any]:
    """One half of a CLIPModel's config; the config of one encoder as it is."""
    if half not in config:
        return config
    found = {**(config[half] or {}), **(config.get(f"{half}_dict") or {})}
    return {**found, "projection_dim": config.get("projection_dim", 512)}


def text_from_config(config: dict[str, Any]) -> TextEncoder:
    """The text encoder of a config.json of transformers.

    Raises:
      UserError: it states another form.
    """
    free = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "eos_token_id": 49407,
    }
    found = _encoder(_half(config, "text_config"), "CLIP text encoder", free)
    if config.get("architectures") == ["CLIPTextModel"]:
        found["projection"] = None
    if found["end"] == 2:  # of files that are older than the entry
        found["end"] = None
    return TextEncoder(**found)


def image_from_config(config: dict[str, Any]) -> ImageEncoder:
    """The image encoder of a config.json of transformers.

    Raises:
      UserError: it states another form.
    """
    free = {
        "image_size": 224,
        "patch_size": 32,
        "num_channels": 3,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
    }
    return ImageEncoder(**_encoder(_half(config, "vision_config"), "CLIP image encoder", free))


def _rename(tensors: dict[str, np.ndarray], mine: str, other: str) -> dict[str, np.ndarray]:
    """Cut off the encoder's name, where it is; leave out the other half of a whole CLIPModel."""
    whole = "logit_scale" in tensors
    return {
        re.sub(mine, "", name): tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
        and not (whole and re.match(rf"({other})|logit_scale$", name))
    }


rename_text = functools.partial(_rename, mine=r"^text_model\.", other=r"vision_model\.|visual_proj")
rename_image = functools.partial(_rename, mine=r"^vision_model\.", other=r"text_model\.|text_proj")
