"""What both sides of a parity test share: cases, weights, inputs, golden files.

A golden file holds what the published code says of its own network: the config and the names
and shapes that it wrote to a directory, its outputs and their gradient. The weights are drawn by
``models.parity``, per tensor, from the tensor's name.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy
from models import parity

GOLDEN = pathlib.Path(__file__).parent / "golden"
TOLERANCE = 2e-6  # of the largest value: both sides round the time's waves to float32


@dataclasses.dataclass(frozen=True)
class Case:
    """One network of one directory.

    Attributes:
      name: of the golden file.
      part: a key of ``huggingface.PARTS``.
      reference: the published class.
      config: its arguments.
      inputs: name to shape, or to a list of integers; the gradient is by the first.
    """

    name: str
    part: str
    reference: str
    config: dict[str, Any]
    inputs: dict[str, Any]

    @property
    def golden(self) -> pathlib.Path:
        return GOLDEN / f"{self.name}.npz"


_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 10,
}
_DIT_INPUTS = {"noisy": (3, 4, 8, 8), "time": [0, 3, 7], "labels": [0, 10, 4]}

_UNET = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16, 24],
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "sample_size": 8,
}
_UNET_INPUTS = {"noisy": (2, 4, 8, 12), "time": [1, 7], "context": (2, 5, 12)}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 8,
}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
_TEXT = {**_CLIP, "vocab_size": 40, "max_position_embeddings": 7, "bos_token_id": 38}
_IMAGE = {**_CLIP, "image_size": 12, "patch_size": 4}
_WHOLE = {
    "text_config": {**_TEXT, "eos_token_id": 39},
    "vision_config": _IMAGE,
    "projection_dim": 8,
}
_TOKENS = {"tokens": [[38, 3, 39, 39, 39, 39, 39], [38, 17, 0, 30, 5, 39, 0]]}

CASES = [
    Case("dit", "transformer", "DiTTransformer2DModel", {**_DIT, "out_channels": 8}, _DIT_INPUTS),
    Case(
        "dit_released",  # its frequencies and epsilons, in diffusers' module
        "transformer",
        "DiTTransformer2DModel",
        {**_DIT, "out_channels": 8, "norm_eps": 1e-6},
        _DIT_INPUTS,
    ),
    Case(
        "unet_1",
        "unet",
        "UNet2DConditionModel",
        {
            **_UNET,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "block_out_channels": [8, 16],
            "attention_head_dim": 2,
            "layers_per_block": 2,
        },
        _UNET_INPUTS,
    ),
    Case(
        "unet_2",
        "unet",
        "UNet2DConditionModel",
        {
            **_UNET,
            "attention_head_dim": [1, 2, 4],
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 2, 1],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        _UNET_INPUTS,
    ),
    Case("vae_decode", "vae", "AutoencoderKL", _VAE, {"latents": (2, 4, 4, 6)}),
    Case("vae_encode", "vae", "AutoencoderKL", _VAE, {"images": (2, 3, 8, 12)}),
    Case("clip_text", "text_encoder", "CLIPTextModel", {**_TEXT, "eos_token_id": 2}, _TOKENS),
    Case(
        "clip_text_projection",
        "text_encoder",
        "CLIPTextModelWithProjection",
        {**_TEXT, "eos_token_id": 39, "hidden_act": "gelu"},
        _TOKENS,
    ),
    Case(
        "clip_image",
        "image_encoder",
        "CLIPVisionModelWithProjection",
        _IMAGE,
        {"images": (2, 3, 12, 12)},
    ),
    Case("clip_whole_text", "text_encoder", "CLIPModel", _WHOLE, _TOKENS),
    Case("clip_whole_image", "image_encoder", "CLIPModel", _WHOLE, {"images": (2, 3, 12, 12)}),
]
BY_NAME = {case.name: case for case in CASES}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of one tensor; what is repeated per block is the same in all."""
    name = re.sub(r"^transformer_blocks\.\d+\.(norm1\.emb)", r"transformer_blocks.0.\1", name)
    return np.asarray(parity.tensor(name, shape), np.float32)


def inputs_of(case: Case) -> dict[str, np.ndarray]:
    """Arrays in the published layout, float64 and int64."""
    return {
        name: parity.generator(name).standard_normal(what)
        if isinstance(what, tuple)
        else np.array(what)
        for name, what in case.inputs.items()
    }


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """What an output is multiplied by before the sum whose gradient is compared."""
    return parity.generator("cotangent").standard_normal(shape)


def save(case: Case, folder: pathlib.Path, outputs: dict[str, np.ndarray]) -> None:
    """Write a golden file from the directory that the published code wrote, and its outputs."""
    (weights,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(weights)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    np.savez_compressed(
        case.golden,
        config=(folder / "config.json").read_text(),
        weights=weights.name,
        shapes=json.dumps(shapes),
        **{name: value.astype(np.float32) for name, value in outputs.items()},
    )


def write(case: Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Write again the directory that the published code wrote.

    Returns:
      The outputs that it computed.
    """
    with np.load(case.golden) as file:
        found = dict(file)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(str(found.pop("config")))
    shapes = json.loads(str(found.pop("shapes")))
    tensors = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, folder / str(found.pop("weights")))
    return found


def compare(outputs: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> list[str]:
    """Names of the outputs that are off the golden file by more than the tolerance."""
    assert outputs.keys() == golden.keys()
    return [
        name
        for name, expected in golden.items()
        if outputs[name].shape != expected.shape
        or np.abs(outputs[name] - expected).max() > TOLERANCE * np.abs(expected).max()
    ]
