"""Our side of the parity tests, in float64: the directory read, the network run, as published."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from diffusion import parity

from prism_jax.diffusion import huggingface

FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def nhwc(x_BCHW):
    return jnp.moveaxis(x_BCHW, 1, -1)


def nchw(x_BHWC):
    return jnp.moveaxis(x_BHWC, -1, 1)


def _transformer(module, params, noisy, time, labels):
    return {"prediction": nchw(module.predict(params, nhwc(noisy), time, labels))}


CALLS = {"transformer": _transformer}
# What a directory does not say.
FORMS = {"dit_released": {"frequency_shift": 0}}


def run(case: parity.Case, loaded: huggingface.Loaded) -> dict[str, np.ndarray]:
    """The same outputs by the same names as ``torch_networks.run``."""
    with jax.enable_x64(True):
        module = loaded.module.clone(dtype=jnp.float64, **FORMS.get(case.name, {}))
        params = jax.tree.map(jnp.float64, loaded.params)
        first, *rest = parity.inputs_of(case).values()

        def weighted(first):
            outputs = CALLS[case.part](module, params, first, *rest)
            output = next(iter(outputs.values()))
            return (output * parity.cotangent(output.shape)).sum(), outputs

        run = jax.jit(jax.grad(weighted, has_aux=True), compiler_options=FAST_COMPILATION)
        gradient, outputs = run(first)
        return {k: np.asarray(v) for k, v in {**outputs, "gradient": gradient}.items()}


def outputs(case: parity.Case, folder: pathlib.Path) -> dict[str, np.ndarray]:
    return run(case, huggingface.load(str(folder), case.part))
