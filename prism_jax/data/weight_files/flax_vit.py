"""The vision transformers of Flax's code bases (vision_transformer, big_vision) under timm's names.

Their attention keeps query, key and value apart, each as (features, heads, features of a head).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

Path = tuple[str, ...]

_BLOCK = r"Transformer/encoderblock_(\d+)/"
_RULES = (
    (rf"{_BLOCK}LayerNorm_0/", r"blocks.\1.norm1/"),
    (rf"{_BLOCK}LayerNorm_[12]/", r"blocks.\1.norm2/"),
    (rf"{_BLOCK}MlpBlock_\d/Dense_0/", r"blocks.\1.mlp.fc1/"),
    (rf"{_BLOCK}MlpBlock_\d/Dense_1/", r"blocks.\1.mlp.fc2/"),
    (rf"{_BLOCK}MultiHeadDotProductAttention_\d/out/", r"blocks.\1.attn.proj/"),
    (rf"{_BLOCK}MultiHeadDotProductAttention_\d/(query|key|value)/", r"blocks.\1.attn.qkv/\2/"),
    (r"Transformer/encoder_norm/", "norm/"),
    (r"(Transformer/posembed_input/)?pos_embedding$", "pos_embed"),
    (r"embedding/(kernel|bias)$", r"patch_embed.proj/\1"),
    (r"cls$", "cls_token"),
)


def rename(arrays: Mapping[Path, np.ndarray]) -> Mapping[Path, np.ndarray]:
    """Rename and lay out a Flax vision transformer as ours; other trees are left as they are."""
    if not any("encoderblock_0" in path for path in arrays):
        return arrays
    found: dict[Path, np.ndarray] = {}
    qkv: dict[Path, dict[str, np.ndarray]] = {}
    for path, array in arrays.items():
        name = "/".join(path)
        for pattern, new in _RULES:
            name = re.sub(rf"(?:^|(?<=/)){pattern}", new, name)
        *parents, leaf = name.split("/")
        if parents and parents[-1] in ("query", "key", "value"):
            each = array.reshape(array.shape[0], -1) if leaf == "kernel" else array.reshape(-1)
            qkv.setdefault((*parents[:-1], leaf), {})[parents[-1]] = each
            continue
        if name.endswith(".attn.proj/kernel"):
            array = array.reshape(-1, array.shape[-1])
        found[*parents, leaf] = array
    for path, parts in qkv.items():
        found[path] = np.concatenate([parts[k] for k in ("query", "key", "value")], axis=-1)
    return found
