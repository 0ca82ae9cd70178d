"""Forward + pixel gradient of each architecture against torchvision's, in one run.

    python benchmarks/models.py --out=benchmarks/results/models

Needs torch and torchvision beside prism_jax. Both sides compute cross entropy + BN alignment and
its gradient by the images; ours inside the loop that the engine uses, torch eager and
channels-last. Rounds are interleaved; the table shows medians and their ratio.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any

os.environ.setdefault("NPROC", str(os.cpu_count()))

import jax
import jax.numpy as jnp
import measuring
import numpy as np
import torch
import torch_peer
from jax import lax

from prism_jax.core.pixels import IMAGENET
from prism_jax.environment import commit
from prism_jax.models import build, layers
from prism_jax.synthesis import Recipe, Shown, teacher_gradient
from prism_jax.teachers import describe

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")


def ours(name: str, size: int, batch: int, small_stem: bool):
    """Compile our side: a function of a number of iterations, and the compile seconds."""
    module = build(name, 1000, stem="small" if small_stem else "imagenet")
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, size, size, 3)), jnp.float32)
    labels = jnp.arange(batch, dtype=jnp.int32)
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    variables = jax.jit(module.init, compiler_options=options)(jax.random.key(0), images[:1])
    gradient = teacher_gradient(Recipe(), describe(name, module, (size, size, 3)), IMAGENET)

    def run(variables, images, labels, count):
        def body(_, x):
            shown = Shown(labels, jnp.float32(1), jnp.float32(1))
            return x - 1e-3 * gradient(variables, x, shown, None)[-1]

        variables = layers.freeze(variables)  # as the engine does
        return lax.fori_loop(0, count, body, images)

    began = time.perf_counter()
    program = jax.jit(run).lower(variables, images, labels, np.int32(1)).compile()
    seconds = time.perf_counter() - began
    temporaries = program.memory_analysis()

    def iterate(count: int) -> None:
        jax.block_until_ready(program(variables, images, labels, np.int32(count)))

    return iterate, seconds, temporaries.temp_size_in_bytes if temporaries else None


def peer(name: str, size: int, batch: int, small_stem: bool):
    """The torch side: a function of a number of iterations."""
    net = torch_peer.calibrate(torch_peer.network(name, small_stem=small_stem), size)
    teacher = torch_peer.Teacher(net).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch)

    def iterate(count: int) -> None:
        x = images
        for _ in range(count):
            x = x.detach().requires_grad_(True)
            logits, alignment = teacher(x)
            loss = torch.nn.functional.cross_entropy(logits, labels) + 0.01 * alignment
            x = x - 1e-3 * torch.autograd.grad(loss, x)[0]

    return iterate


def measure(name: str, size: int, batch: int, rounds: int, seconds: float) -> dict:
    """Interleaved rounds of about ``seconds`` each per side."""
    small_stem = size <= 64
    theirs = peer(name, size, batch, small_stem)
    mine, compile_seconds, temporaries = ours(name, size, batch, small_stem)
    mine(1), theirs(1)
    began = time.perf_counter()
    theirs(1)
    count = max(1, round(seconds / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {"jax": [], "torch": []}
    for _ in range(rounds):
        for side, iterate in (("torch", theirs), ("jax", mine)):
            began = time.perf_counter()
            iterate(count)
            times[side].append((time.perf_counter() - began) / count)
    jax_seconds, torch_seconds = (statistics.median(times[s]) for s in ("jax", "torch"))
    return {
        "architecture": name,
        "size": size,
        "batch": batch,
        "jax_seconds": jax_seconds,
        "torch_seconds": torch_seconds,
        "speedup": torch_seconds / jax_seconds,
        "compile_seconds": compile_seconds,
        "temporary_bytes": temporaries,
        "rounds": times,
    }


def table(found: dict) -> str:
    """The results in Markdown."""
    machine = ", ".join(f"{k} {v}" for k, v in found["machine"].items())
    lines = [
        f"Commit {found['commit']}; {machine}.",
        "",
        "| architecture | images | torch, ms | ours, ms | torch / ours | compile, s |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['architecture']} | {row['batch']} x {row['size']} px "
            f"| {1e3 * row['torch_seconds']:.1f} | {1e3 * row['jax_seconds']:.1f} "
            f"| **{row['speedup']:.2f}** | {row['compile_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--architectures", default=",".join(POOL))
    parser.add_argument("--shapes", default="20x32,4x224", help="batch x size, comma-separated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="per round and side")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found: dict[str, Any] = {
        "commit": commit(),
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "NPROC": os.environ["NPROC"],
            "torch threads": arguments.threads,
        },
        "rows": [],
    }
    for shape in arguments.shapes.split(","):
        batch, size = map(int, shape.split("x"))
        for name in arguments.architectures.split(","):
            row = measure(name, size, batch, arguments.rounds, arguments.seconds)
            found["rows"].append(row)
            print(
                f"{name} {shape}: {row['speedup']:.2f}x, "
                f"compiled in {row['compile_seconds']:.1f} s",
                flush=True,
            )
    print(table(found))
    measuring.save(found, table(found), arguments.out)


if __name__ == "__main__":
    main()
