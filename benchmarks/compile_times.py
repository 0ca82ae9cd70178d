"""Seconds until each architecture's programs are ready: tracing, and compiling by XLA.

    python benchmarks/compile_times.py --out=benchmarks/results/compile_cpu

The programs: forward + gradient by the pixels of cross entropy + BN alignment, inside the
engine's loop; and a training step from pixels to new weights. Nothing is run, and no cache of
compiled programs is used.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import time
from typing import Any

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import measuring
from jax import lax

from prism_jax import parallel
from prism_jax.core import losses, statistics
from prism_jax.core.augment import Augment
from prism_jax.core.pixels import IMAGENET
from prism_jax.environment import commit
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES, build, layers, registry
from prism_jax.training import OPTIMISERS, TrainBatch, TrainRecipe, TrainState, train_step


def array(*shape: int, dtype=jnp.float32) -> Any:
    """What stands for an array where a program is only traced."""
    return jax.ShapeDtypeStruct(shape, dtype)


def pixel_gradient(name: str, module, variables, batch: int, size: int):
    """A function of a loop over the objective's gradient, and its arguments."""
    first_bn = ARCHITECTURES[name].first_bn

    def energy(images_BHWC, variables, labels_B):
        logits_BK, told = module.apply(variables, images_BHWC, mutable=["bn_statistics"])
        loss = losses.cross_entropy(logits_BK, labels_B)
        if first_bn:
            loss += 0.01 * statistics.alignment(
                statistics.by_layer(layers.whole_statistics(told["bn_statistics"])),
                statistics.by_layer(variables["batch_stats"]),
                first=first_bn,
                first_multiplier=10.0,
            )
        return loss

    def run(variables, images_BHWC, labels_B, count):
        variables = layers.freeze(variables)
        step = lambda _, x: x - 0.001 * jax.grad(energy)(x, variables, labels_B)  # noqa: E731
        return lax.fori_loop(0, count, step, images_BHWC)

    images, labels = array(batch, size, size, 3), array(batch, dtype=jnp.int32)
    return run, (variables, images, labels, array(dtype=jnp.int32))


def training_step(module, variables, batch: int, size: int):
    """A function of the training step that squeeze and validate use, and its arguments."""
    recipe = TrainRecipe("squeeze/view", Augment(crop_min=0.25, flip=True))
    mesh = parallel.data_mesh(1)
    step = functools.partial(train_step, recipe, module, IMAGENET, mesh)
    params, number = variables["params"], array(dtype=jnp.int32)
    opt_state = jax.eval_shape(OPTIMISERS[recipe.optimiser](recipe).init, params)
    state = TrainState(number, params, variables.get("batch_stats", {}), opt_state)
    images, labels = array(batch, size, size, 3, dtype=jnp.uint8), array(batch, dtype=jnp.int32)
    examples = TrainBatch(number, number, images, labels)._replace(view_epoch=number)
    seed = array(dtype=jnp.uint32)
    return step, (seed, seed, number, state, examples)


def seconds(function, arguments) -> dict[str, float]:
    """How long tracing and compiling take."""
    began = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    traced = time.perf_counter()
    lowered.compile()
    return {"trace": traced - began, "compile": time.perf_counter() - traced}


def measure(name: str, batch: int, size: int) -> dict:
    stem = "small" if size <= 64 else "imagenet"
    registry.check_image_size(name, size, stem)
    module = build(name, ARCHITECTURES[name].classes, stem=stem)
    variables = jax.eval_shape(module.init, jax.random.key(0), array(1, size, size, 3))
    return {
        "architecture": name,
        "batch": batch,
        "size": size,
        "gradient": seconds(*pixel_gradient(name, module, variables, batch, size)),
        "step": seconds(*training_step(module, variables, batch, size)),
    }


def table(found: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    lines = [
        f"Commit {found['commit']}; {machine}. Seconds: tracing + compiling.",
        "",
        "| architecture | images | forward + pixel gradient | training step |",
        "|:--|--:|--:|--:|",
    ]
    for row in found["rows"]:
        times = (f"{row[p]['trace']:.1f} + {row[p]['compile']:.1f}" for p in ("gradient", "step"))
        images = f"{row['batch']} x {row['size']} px"
        lines.append(f"| {row['architecture']} | {images} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architectures", default="all", help="comma-separated, or all")
    parser.add_argument("--shapes", default="20x32,4x224", help="batch x size, comma-separated")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    names = arguments.architectures.split(",")
    names = list(ARCHITECTURES) if names == ["all"] else names
    found: dict[str, Any] = {
        "commit": commit(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "NPROC": os.environ["NPROC"],
        },
        "rows": [],
    }
    for shape in arguments.shapes.split(","):
        batch, size = map(int, shape.split("x"))
        for name in names:
            try:
                found["rows"].append(measure(name, batch, size))
            except UserError as error:
                print(f"{name} {shape}: left out, {error}", flush=True)
                continue
            print(table({**found, "rows": found["rows"][-1:]}).splitlines()[-1], flush=True)
    print(table(found))
    measuring.save(found, table(found), arguments.out)


if __name__ == "__main__":
    main()
