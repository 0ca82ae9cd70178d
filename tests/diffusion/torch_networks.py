"""The reference side of the parity tests: diffusers' and transformers' networks, in float64."""

from __future__ import annotations

import pathlib

import diffusers
import numpy as np
import torch
from diffusion import parity


def build(case: parity.Case) -> torch.nn.Module:
    """The published network with the case's weights."""
    module = getattr(diffusers, case.reference)(**case.config).eval()
    tensors = {n: parity.draw(n, tuple(t.shape)) for n, t in module.state_dict().items()}
    module.load_state_dict({name: torch.from_numpy(t) for name, t in tensors.items()})
    return module


def run(case: parity.Case, module: torch.nn.Module) -> dict[str, np.ndarray]:
    """Outputs, and the gradient by the first input of the sum of the first, weighted."""
    arrays = {name: torch.from_numpy(value) for name, value in parity.inputs_of(case).items()}
    first = next(iter(arrays.values())).requires_grad_(True)
    outputs = CALLS[case.part](case, module.double(), **arrays)
    output = next(iter(outputs.values()))
    (output * torch.from_numpy(parity.cotangent(tuple(output.shape)))).sum().backward()
    return {
        **{name: value.detach().numpy() for name, value in outputs.items()},
        "gradient": first.grad.numpy(),
    }


def _transformer(case, module, noisy, time, labels):
    if case.name == "dit_released":
        for block in module.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return {"prediction": module(noisy, timestep=time, class_labels=labels).sample}


CALLS = {"transformer": _transformer}


def outputs(case: parity.Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Write the network to a directory and run it."""
    module = build(case)
    module.save_pretrained(folder)
    return run(case, module)
