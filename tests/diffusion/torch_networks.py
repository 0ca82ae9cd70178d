"""The reference side of the parity tests: diffusers' and transformers' networks, in float64."""

from __future__ import annotations

import pathlib

import diffusers
import numpy as np
import torch
import transformers
from diffusion import parity


def build(case: parity.Case) -> torch.nn.Module:
    """The published network with the case's weights."""
    if hasattr(diffusers, case.reference):
        module = getattr(diffusers, case.reference)(**case.config).eval()
    else:
        kind = getattr(transformers, case.reference)
        module = kind(kind.config_class(**case.config)).eval()
    tensors = {n: parity.draw(n, tuple(t.shape)) for n, t in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    return module


def run(case: parity.Case, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Outputs, and the gradient by the first input of the sum of the first, weighted."""
    arrays = {name: torch.from_numpy(value) for name, value in parity.inputs_of(case).items()}
    first = next(iter(arrays.values()))
    if first.is_floating_point():
        first.requires_grad_(True)
    found = CALLS[case.part](case, module.double(), **arrays)
    outputs = {name: value.detach().numpy() for name, value in found.items()}
    if first.is_floating_point():
        output = next(iter(found.values()))
        (output * torch.from_numpy(parity.cotangent(tuple(output.shape)))).sum().backward()
        outputs["gradient"] = first.grad.numpy()
    return outputs


def _transformer(case, module, noisy, time, labels):
    if case.name == "dit_released":
        for block in module.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return {"prediction": module(noisy, timestep=time, class_labels=labels).sample}


def _unet(case, module, noisy, time, context):
    return {"prediction": module(noisy, time, context).sample}


def _vae(case, module, latents=None, images=None):
    scale = module.config.scaling_factor
    if images is None:
        return {"images": module.decode(latents / scale).sample}
    found = module.encode(images).latent_dist
    return {"mean": found.mean * scale, "deviation": found.std * scale}


def _text(case, module, tokens):
    if case.name == "clip_whole_text":
        states = module.text_model(tokens).last_hidden_state
        return {"states": states, "embedding": module.get_text_features(tokens).pooler_output}
    found = module(tokens, output_hidden_states=True)
    if case.name == "clip_text_projection":
        return {"states": found.last_hidden_state, "embedding": found.text_embeds}
    return {"states": found.last_hidden_state, "embedding": found.pooler_output}


def _image(case, module, images):
    if case.name == "clip_whole_image":
        return {"embedding": module.get_image_features(images).pooler_output}
    return {"embedding": module(images).image_embeds}


CALLS = {
    "transformer": _transformer,
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text,
    "image_encoder": _image,
}


def outputs(case: parity.Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Write the network to a directory and run it."""
    module = build(case)
    module.save_pretrained(folder)
    return run(case, module)
