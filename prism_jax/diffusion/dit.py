"""Diffusion transformers with adaLN-zero (arXiv 2212.09748), and the names of their weights.

Module names are those of the released code, so its files need no table; diffusers' names are
translated by :func:`rename_diffusers`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from prism_jax.diffusion.blocks import attend
from prism_jax.diffusion.forms import stated
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.types import Array, PyTree

FREQUENCIES = 128  # sines, and as many cosines, of the time
gelu = functools.partial(nn.gelu, approximate=True)
silu = nn.silu

zeros = nn.initializers.zeros
_Dense = functools.partial(layers.Dense, kernel_init=nn.initializers.xavier_uniform())
_Small = functools.partial(layers.Dense, kernel_init=nn.initializers.normal(0.02))
_Zero = functools.partial(layers.Dense, kernel_init=zeros)


class DiT(nn.Module):
    """A transformer over patches; the class and the time modulate every block.

    It is a :class:`~prism_jax.diffusion.protocols.Denoiser` and, its condition being the labels
    themselves, a :class:`~prism_jax.diffusion.protocols.Condition`. The defaults are DiT-XL/2.
    A fresh one predicts zero.

    Attributes:
      classes: label ``classes`` stands for no class.
      channels: of the latent.
      patch: side of a patch; it divides the latent's sides.
      width: of a token, a multiple of four and of ``heads``.
      depth, heads: blocks, and attention heads in each.
      learned_variance: twice the channels are returned.
      time_scale: what the time is multiplied by; 1000 for times in [0, 1].
      frequency_shift: the slowest of the time's waves has the period 2 pi 10000 in diffusers (1)
        and one step less in the released code (0); weights belong to one of them.
      mlp_epsilon: of the norm in front of the MLP; diffusers' files state theirs.
      dtype: of the computation; parameters, norms and softmax are float32.
    """

    classes: int = 1000
    channels: int = 4
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    learned_variance: bool = True
    time_scale: float = 1.0
    frequency_shift: int = 0
    mlp_epsilon: float = 1e-6
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, noisy_BHWC: Array, time_B: Array, labels_B: Array) -> Array:
        batch, *size, _ = noisy_BHWC.shape
        if any(side % self.patch for side in size):
            raise UserError(
                f"latents of {size[0]} x {size[1]} do not divide into patches of {self.patch}; "
                "choose a patch that divides both sides"
            )
        rows, columns = (side // self.patch for side in size)
        conv = layers.Conv(
            self.width, self.patch, self.patch, dtype=self.dtype, name="x_embedder.proj"
        )
        x_BND = conv(noisy_BHWC).reshape(batch, rows * columns, self.width)
        x_BND = x_BND + position_table(rows, columns, self.width).astype(self.dtype)

        waves_BF = time_waves(time_B * self.time_scale, FREQUENCIES, self.frequency_shift)
        time_BD = _Small(self.width, dtype=self.dtype, name="t_embedder.mlp.0")(waves_BF)
        time_BD = _Small(self.width, dtype=self.dtype, name="t_embedder.mlp.2")(silu(time_BD))
        table_KD = layers.parameter(
            self,
            "y_embedder.embedding_table.weight",
            nn.initializers.normal(0.02),
            (self.classes + 1, self.width),
            jnp.float32,
        )
        condition_BD = silu(time_BD + table_KD[labels_B].astype(self.dtype))

        for index in range(self.depth):
            block = Block(self.heads, self.mlp_epsilon, self.dtype, name=f"blocks.{index}")
            x_BND = block(x_BND, condition_BD)

        modulation = _Zero(2 * self.width, dtype=self.dtype, name="final_layer.adaLN_modulation.1")
        shift, scale = jnp.split(modulation(condition_BD), 2, -1)
        x_BND = modulated(x_BND, shift, scale, 1e-6)
        channels = self.channels * (2 if self.learned_variance else 1)
        x_BNP = _Zero(self.patch**2 * channels, dtype=self.dtype, name="final_layer.linear")(x_BND)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        patches = x_BNP.reshape(batch, rows, columns, self.patch, self.patch, channels)
        return patches.swapaxes(2, 3).reshape(batch, *size, channels).astype(wide)

    @nn.nowrap
    def predict(self, params: PyTree, noisy_BHWC: Array, time_B: Array, labels_B: Array) -> Array:
        found: Any = self.apply({"params": params}, noisy_BHWC, time_B, labels_B)
        return found

    @nn.nowrap
    def of_labels(self, params: PyTree, labels_B: Array) -> Array:
        return labels_B.astype(jnp.int32)

    @nn.nowrap
    def null(self, params: PyTree, batch: int) -> Array:
        return jnp.full((batch,), self.classes, jnp.int32)


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    heads: int
    mlp_epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BND: Array, condition_BD: Array) -> Array:
        width = x_BND.shape[-1]
        modulation = _Zero(6 * width, dtype=self.dtype, name="adaLN_modulation.1")
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(
            modulation(condition_BD), 6, -1
        )
        y_BND = self._attention(modulated(x_BND, shift, scale, 1e-6))
        x_BND = x_BND + gate[:, None] * y_BND
        y_BND = modulated(x_BND, mlp_shift, mlp_scale, self.mlp_epsilon)
        y_BND = gelu(_Dense(4 * width, dtype=self.dtype, name="mlp.fc1")(y_BND))
        y_BND = _Dense(width, dtype=self.dtype, name="mlp.fc2")(y_BND)
        return x_BND + mlp_gate[:, None] * y_BND

    def _attention(self, x_BND: Array) -> Array:
        batch, tokens, width = x_BND.shape
        qkv = _Dense(3 * width, dtype=self.dtype, name="attn.qkv")(x_BND)
        query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, -1), 2, 0)
        y = attend(query, key, value)
        return _Dense(width, dtype=self.dtype, name="attn.proj")(y.reshape(batch, tokens, width))


def modulated(x_BND: Array, shift_BD: Array, scale_BD: Array, epsilon: float) -> Array:
    """Normalise each token without weights, scale by ``1 + scale``, shift."""
    normal = layers.normalise(x_BND, -1, epsilon).astype(x_BND.dtype)
    return normal * (1 + scale_BD[:, None]) + shift_BD[:, None]


def time_waves(time_B: Array, frequencies: int, shift: int) -> Array:
    """Cosines, then sines, of the time, from one radian a step down to (almost) 1 / 10000.

    Args:
      shift: 1 if the last frequency is 1 / 10000 itself, 0 if the next one would be.
    """
    frequency_F = 10000 ** (-np.arange(frequencies) / (frequencies - shift))
    angles_BF = time_B.astype(jnp.float32)[:, None] * frequency_F.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles_BF), jnp.sin(angles_BF)], -1)


def position_table(rows: int, columns: int, width: int) -> np.ndarray:
    """(rows * columns, width) float32: sines and cosines of the column, then those of the row."""
    omega = 1 / 10000 ** (np.arange(width // 4) / (width // 4))

    def waves(positions: np.ndarray) -> np.ndarray:
        angles = positions.reshape(-1, 1) * omega
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    row, column = np.mgrid[:rows, :columns]
    return np.concatenate([waves(column), waves(row)], 1).astype(np.float32)


def from_config(config: dict[str, Any]) -> DiT:
    """The transformer of a config.json of diffusers.

    Raises:
      UserError: it states another form.
    """
    found = stated(
        config,
        "DiT",
        free={
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": None,
            "num_layers": 28,
            "patch_size": 2,
            "num_embeds_ada_norm": 1000,
            "norm_eps": 1e-5,
        },
        fixed={
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        idle=("sample_size", "dropout", "norm_num_groups"),
    )
    channels = found["in_channels"]
    returned = found["out_channels"] or channels
    if returned not in (channels, 2 * channels):
        raise UserError(f"this DiT makes {returned} channels of {channels}; once or twice as many")
    width = found["num_attention_heads"] * found["attention_head_dim"]
    if width % 4:
        raise UserError(
            f"this DiT has num_attention_heads={found['num_attention_heads']} and "
            f"attention_head_dim={found['attention_head_dim']}; their product must be a multiple "
            f"of four. Download its config again"
        )
    return DiT(
        classes=found["num_embeds_ada_norm"],
        channels=channels,
        patch=found["patch_size"],
        width=width,
        depth=found["num_layers"],
        heads=found["num_attention_heads"],
        learned_variance=returned != channels,
        frequency_shift=1,
        mlp_epsilon=found["norm_eps"],
    )


def from_released(tensors: dict[str, np.ndarray]) -> DiT:
    """The transformer of a file in the released code's layout: its tensors say what it is.

    The published ones have heads of 64 channels but XL, which has 16 heads of 72.

    Raises:
      UserError: they are not those of such a transformer.
    """
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        rows = len(tensors["y_embedder.embedding_table.weight"])
        returned = len(tensors["final_layer.linear.bias"]) // patch**2
    except (KeyError, ValueError) as error:
        raise UserError(
            f"this file is no DiT in the released code's layout ({error} is not there); give one, "
            "or a directory with transformer/config.json"
        ) from None
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return DiT(
        classes=rows - 1,
        channels=channels,
        patch=patch,
        width=width,
        depth=len(blocks),
        heads=16 if width == 1152 else max(1, width // 64),
        learned_variance=returned == 2 * channels,
    )


# diffusers' names, below a block and outside the blocks.
_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
# Every block of diffusers' has an embedding of the time and the class; they are the same.
_REPEATED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}


def rename_diffusers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give diffusers' tensors our names; unknown names stay as they are.

    Raises:
      UserError: the embeddings of two blocks differ, which no one transformer can express.
    """
    found: dict[str, np.ndarray] = {}
    thirds: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        within = re.fullmatch(r"transformer_(blocks\.\d+)\.(.+)", module)
        if not within:
            found[f"{_OUTSIDE.get(module, module)}.{leaf}"] = tensor
            continue
        block, part = within.groups()
        if part in _REPEATED:
            first = found.setdefault(f"{_REPEATED[part]}.{leaf}", tensor)
            if not np.array_equal(first, tensor):
                raise UserError(
                    f"{name} is not what another block has; the time and class embeddings of all "
                    "blocks must be equal. Was the transformer trained with them untied?"
                )
        elif part in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            thirds.setdefault(f"{block}.attn.qkv.{leaf}", {})[part] = tensor
        else:
            found[f"{block}.{_BLOCK.get(part, part)}.{leaf}"] = tensor
    for name, parts in thirds.items():
        if len(parts) == 3:  # else it is missing
            found[name] = np.concatenate([parts[f"attn1.to_{letter}"] for letter in "qkv"])
    return found


def without_position_table(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drop the released code's position table, once it is seen to be ours.

    Raises:
      UserError: it is another one.
    """
    found = dict(tensors)
    table = found.pop("pos_embed", None)
    if table is not None:
        side = _tokens_a_side(table)
        ours = position_table(side, side, table.shape[-1])
        if table.shape != (1, *ours.shape) or not np.allclose(table[0], ours, atol=1e-5):
            raise UserError(
                "pos_embed is not the fixed table of sines and cosines; it was trained or belongs "
                "to other images, and this transformer cannot hold it"
            )
    return found


def trained_side(tensors: dict[str, np.ndarray]) -> int | None:
    """The side of the latents that a file in the released code's layout was trained on.

    Its position table tells it; None where there is none.
    """
    table, patches = tensors.get("pos_embed"), tensors.get("x_embedder.proj.weight")
    if table is None or patches is None:
        return None
    return _tokens_a_side(table) * patches.shape[-1]


def _tokens_a_side(table: np.ndarray) -> int:
    return round(table.shape[-2] ** 0.5) if table.ndim == 3 else 0
