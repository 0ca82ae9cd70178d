"""prism_jax: dataset distillation in JAX.

The Python API, without config or working directory:

    pool = TeacherPool.of({"name": (module, variables), ...}, image_shape=..., normalisation=...)
    images = synthesise(pool, start_images, labels, iterations=1000)
    soft_labels = relabel(pool, images, epochs=100)
    student = fit(module, images, labels, soft_labels=soft_labels, epochs=100, normalisation=...)

Imports are lazy, and importing this package creates no JAX backend: on a CPU the bits of a run
depend on the size of XLA's thread pool, which ``NPROC`` in the environment sets, and only
before the first JAX call. ``main`` sets it; users of the API set it themselves.
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_HOMES = {
    "TeacherPool": "prism_jax.teachers",
    "synthesise": "prism_jax.synthesis.course",
    "relabel": "prism_jax.labelling",
    "fit": "prism_jax.training",
    "Normalisation": "prism_jax.types",
    "UserError": "prism_jax.errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
