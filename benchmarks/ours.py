"""The JAX side of the benchmarks: networks with random weights, their work, the machine's rates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import measuring


def begin(spec: dict[str, Any]) -> None:
    """Prepare the environment as the command line does, before JAX starts."""
    from prism_jax import environment

    deterministic = spec.get("deterministic", True)
    parallel = {"deterministic": deterministic, "matmul_precision": "high"}
    environment.prepare_environment({"parallel": parallel}, [])


def random_pool(names: tuple[str, ...], spec: dict[str, Any]):
    """A pool of networks with random weights, whose statistics are those of noise."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from prism_jax.core.pixels import IMAGENET
    from prism_jax.models import build
    from prism_jax.teachers import TeacherPool

    shape = (spec["size"], spec["size"], 3)
    cpu = jax.default_backend() == "cpu"
    quick = {"xla_backend_optimization_level": 0} if cpu else None  # it runs once
    noise = np.random.default_rng(0).standard_normal((8, *shape), np.float32)

    def statistics(module, variables, noise):
        sown = ["bn_statistics", "batch_stats"]
        dropout = {"dropout": jax.random.key(1)}
        _, found = module.apply(variables, noise, train=True, mutable=sown, rngs=dropout)
        return found["bn_statistics"]

    members = {}
    for name in names:
        stem, dtype = "small" if spec["small_stem"] else "imagenet", jnp.dtype(spec["precision"])
        module = build(name, spec["classes"], stem=stem, dtype=dtype)
        variables = jax.jit(module.init, compiler_options=quick)(jax.random.key(0), noise[:1])
        found = jax.jit(statistics, static_argnums=0, compiler_options=quick)(
            module, variables, noise
        )
        variables = {"params": variables["params"], "batch_stats": found}
        members[name] = module, jax.device_get(variables)
    jax.clear_caches()  # what compiled them is not what is measured
    return TeacherPool.of(members, image_shape=shape, normalisation=IMAGENET)


def count_work(module: Any, image_shape: tuple[int, int, int]) -> dict[str, float]:
    """What a forward pass of one image cannot do without.

    Returns:
      "flops" of its convolutions and dense layers, and "values": the elements that these read
      and write, maps and kernels, each once.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from prism_jax.models import layers

    work = {"flops": 0.0, "values": 0.0}

    def count(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        y = run(*args, **kwargs)
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, (layers.Conv, layers.Dense)):
            (x,) = args
            fan_in = x.shape[-1]
            if isinstance(layer, layers.Conv):
                fan_in = fan_in // layer.groups * layer.kernel_size**2
            work["flops"] += 2 * fan_in * y.size
            work["values"] += x.size + y.size + fan_in * y.shape[-1]
        return y

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), images)
    with nn.intercept_methods(count):
        jax.eval_shape(module.apply, variables, images)
    return work


def facts(work: dict[str, float], spec: dict[str, Any], lanes: int = 1) -> dict[str, Any]:
    """Memory by XLA's account and on the device; the least work of an iteration.

    Args:
      work: "flops" and "values" of an iteration, as ``count_work`` counts them.
      lanes: how many run at a time on the device.
    """
    import jax

    device = jax.local_devices()[0]
    account = 0
    for program in device.client.live_executables():
        memory = program.get_compiled_memory_stats()
        made = memory.output_size_in_bytes + memory.temp_size_in_bytes
        size = memory.argument_size_in_bytes - memory.alias_size_in_bytes
        account = max(account, size + lanes * made)
    stats = device.memory_stats() or {}  # None on a CPU
    return {
        "account_bytes": account,
        "device_peak_bytes": stats.get("peak_bytes_in_use"),
        "flops": work["flops"],
        "bytes": work["values"] * (4 if spec["precision"] == "float32" else 2),
    }


class Rates:
    """What the machine can do at best, as JAX gets it; the methods are timed by the driver.

    Their arrays are made when first asked for, after the memory of the work was looked at.
    """

    def __init__(self, device: str):
        self._device = device

    @functools.cached_property
    def _best(self) -> tuple[Callable[[], Any], Callable[[], Any], int, int]:
        import jax
        import jax.numpy as jnp

        side, block, dtype = measuring.SIZES[self._device]
        matrix, values = jnp.ones((side, side), dtype), jnp.zeros((block,), jnp.float32)
        matmul, copy = jax.jit(lambda x: x @ x), jax.jit(lambda x: x + 1)
        matmul(matrix).block_until_ready(), copy(values).block_until_ready()
        return (lambda: matmul(matrix)), (lambda: copy(values)), side, values.nbytes

    def matmul(self) -> float:
        """One product; returns its FLOP."""
        matmul, _, side, _ = self._best
        matmul().block_until_ready()
        return 2.0 * side**3

    def copy(self) -> float:
        """One copy; returns the bytes read and written."""
        _, copy, _, size = self._best
        copy().block_until_ready()
        return 2.0 * size
