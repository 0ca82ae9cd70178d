"""Programs compiled fast, not well: a sixth of the time, where what is checked has a tolerance.

A comparison with NumPy or PyTorch says as much of a program that is compiled in either way. Where
two programs must have the same bits, they are compiled as users get them, or ``FAST_ALIKE``: XLA's
older emitters, which ``FAST`` has where there still are any (JAX 0.10), round otherwise on eight
devices than on one.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import pytest

from prism_jax import training
from prism_jax.diffusion import fit
from prism_jax.stages import relabel
from prism_jax.synthesis import course, lanes

FAST_ALIKE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
OLDER = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
FAST = FAST_ALIKE | OLDER
jit = functools.partial(jax.jit, compiler_options=FAST)

# What the package keeps of compiled functions: none of here elsewhere, nor of elsewhere here.
KEPT = (
    training._jitted_step, training._jitted_optimiser, training.jitted_forward, course.ascent_of,
    fit.jitted_step, lanes._drawn, relabel._online_labeller,
)  # fmt: skip
WELL = jax.jit


@contextlib.contextmanager
def compiled_fast(how=FAST):
    """Let ``jax.jit`` compile fast, here and in the package; None: as users get it."""

    def jit(function=None, /, **options):
        if function is None:
            return functools.partial(jit, **options)
        return WELL(function, **{"compiler_options": how, **options})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", WELL if how is None else jit)
        for kept in KEPT:
            kept.cache_clear()
        try:
            yield
        finally:
            for kept in KEPT:
                kept.cache_clear()


@pytest.fixture
def fast_programs():
    """The same for a test."""
    with compiled_fast():
        yield


@pytest.fixture
def fast_alike():
    """The same for a test that compares bits."""
    with compiled_fast(FAST_ALIKE):
        yield


@pytest.fixture
def as_users():
    """A test of a module whose others compile fast has the programs that users get."""
    with compiled_fast(None):
        yield


@pytest.fixture(scope="module")
def only_fast_alike():
    """``fast_alike`` for a module, with what its fixtures make after this one."""
    with compiled_fast(FAST_ALIKE):
        yield


@pytest.fixture(scope="module")
def only_fast_programs():
    """The same for a module, whose tests share what the package keeps."""
    with compiled_fast():
        yield
