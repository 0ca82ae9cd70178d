"""One machine for all tests: eight forced devices and a thread pool of fixed size.

XLA reads both when the first backend is made, so they stand here, before anything imports JAX.
"""

from __future__ import annotations

import os
import pathlib
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
DEVICES = 8

os.environ.setdefault("NPROC", "8")  # the size of XLA's CPU thread pool decides bits
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The second as the command line sets it: it is a part of what a cached program is known by.
OURS = (f"--xla_force_host_platform_device_count={DEVICES}", "--xla_gpu_deterministic_ops=true")
os.environ["XLA_FLAGS"] = " ".join(
    [*(f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f), *OURS]
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# As the command line sets it: a test that runs it in this process would change every later program,
# and what is in the cache for one order of tests would not be there for another.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "high")
os.environ.setdefault("JAX_LEGACY_PRNG_KEY", "error")  # untyped keys take their kind from a default

# `from helpers import ...` in tests, `from configs import ...` without an installation.
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

# The longest files begin first, so that no worker is left alone with one of them at the end.
LONG = (
    "test_hosts.py", "models/test_parity.py", "test_pipeline.py", "test_recover_methods.py",
    "stages/test_generate.py", "test_labelling.py", "models/test_stem.py", "test_compare.py",
    "stages/test_generate_released.py", "test_parallel.py", "synthesis/test_synthesis.py",
    "test_training.py", "test_kill.py", "models/test_layers.py", "models/test_fitting.py",
    "diffusion/test_parity.py", "synthesis/test_course.py", "synthesis/test_methods.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    place = {TESTS / name: at for at, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))  # others keep their order


def pytest_collection_finish():
    from prism_jax.environment import collect_less

    collect_less()  # as the real command does


@pytest.fixture
def compilations():
    """One entry for every program that JAX lowers, whether or not a cache then holds it."""
    import jax

    seen = []

    def listen(event, *_, **__):
        if event.endswith("jaxpr_to_mlir_module_duration"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)
