"""Our side of the parity tests, in float64: the directory read, the network run, as published."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from diffusion import parity
from helpers.compiling import FAST

from prism_jax.diffusion import huggingface


def nhwc(x_BCHW):
    return jnp.moveaxis(x_BCHW, 1, -1)


def nchw(x_BHWC):
    return jnp.moveaxis(x_BHWC, -1, 1)


def _transformer(case, module, params, noisy, time, labels):
    return {"prediction": nchw(module.predict(params, nhwc(noisy), time, labels))}


def _unet(case, module, params, noisy, time, context):
    return {"prediction": nchw(module.predict(params, nhwc(noisy), time, context))}


def _vae(case, module, params, latents=None, images=None):
    if images is None:
        return {"images": nchw(module.decode(params, nhwc(latents)))}
    mean, deviation = module.encode(params, nhwc(images))
    return {"mean": nchw(mean), "deviation": nchw(deviation)}


def _text(case, module, params, tokens):
    states, embedding = module.encode(params, tokens)
    return {"states": states, "embedding": embedding}


def _image(case, module, params, images):
    return {"embedding": module.embed(params, nhwc(images))}


CALLS = {
    "transformer": _transformer,
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text,
    "image_encoder": _image,
}
# What a directory does not say.
FORMS = {"dit_released": {"frequency_shift": 0}}


def run(
    case: parity.Case, loaded: huggingface.Loaded, *, forward: bool = False
) -> dict[str, np.ndarray]:
    """The same outputs by the same names as ``torch_networks.run``; ``forward``: no gradient."""
    with jax.enable_x64(True):
        module = loaded.module.clone(dtype=jnp.float64, **FORMS.get(case.name, {}))
        params = jax.tree.map(jnp.float64, loaded.params)
        inputs = parity.inputs_of(case)
        name, first = next(iter(inputs.items()))

        def weighted(first):
            outputs = CALLS[case.part](case, module, params, **{**inputs, name: first})
            output = next(iter(outputs.values()))
            return (output * parity.cotangent(output.shape)).sum(), outputs

        if forward or np.issubdtype(first.dtype, np.integer):
            outputs = jax.jit(weighted, compiler_options=FAST)(first)[1]
        else:
            run = jax.jit(jax.grad(weighted, has_aux=True), compiler_options=FAST)
            gradient, outputs = run(first)
            outputs = {**outputs, "gradient": gradient}
        return {key: np.asarray(value) for key, value in outputs.items()}


def outputs(
    case: parity.Case, folder: pathlib.Path, *, forward: bool = False
) -> dict[str, np.ndarray]:
    return run(case, huggingface.load(str(folder), case.part), forward=forward)
