"""Seconds from the command to the first step, cold and warm, and where they go.

    python benchmarks/startup.py --out=benchmarks/results/startup_cpu

cold   an empty compilation cache
warm   a new working directory, a filled cache

digits          the demo's command: the first step that trains a teacher
digits recover  with its teachers adopted (--from): the first iteration of recover
224 px recover  the PRISM pool at 224 px, ten images, random weights: the same

A peer's loop has no teachers to adopt, no images to read and nothing to compile: its row is the
import of PyTorch, the pool's random weights and one iteration.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import measuring

POOL = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5")
PARTS = ("import", "trace and lower", "compile or load", "rest", "first step")
DIGITS = ("--config=configs/digits_ipc10.py", "--config.squeeze.epochs=1")

# ImageNet's first ten classes; they are shown noise.
CLASSES = (
    "n01440764", "n01443537", "n01484850", "n01491361", "n01494475",
    "n01496331", "n01498041", "n01514668", "n01514859", "n01518878",
)  # fmt: skip


# --- in the measured process -----------------------------------------------------------------


class Spans:
    """Intervals of time, each counted once however they overlap."""

    def __init__(self):
        self._found: list[tuple[float, float]] = []

    def add(self, seconds: float) -> None:
        """One that ends now."""
        now = time.time()
        self._found.append((now - seconds, now))

    def total(self, since: float = 0.0) -> float:
        covered, end = 0.0, since
        for start, stop in sorted(self._found):
            covered += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return covered


@contextlib.contextmanager
def timed_imports(spans: Spans):
    """Count what the outermost imports take."""
    plain, depth = builtins.__import__, 0

    def timed(*arguments, **named):
        nonlocal depth
        began, depth = time.perf_counter(), depth + 1
        try:
            return plain(*arguments, **named)
        finally:
            depth -= 1
            if depth == 0:
                spans.add(time.perf_counter() - began)

    builtins.__import__ = timed
    try:
        yield
    finally:
        builtins.__import__ = plain


def measured(began: float, stage: str, argv: list[str]) -> None:
    """Run the command line up to the first step of a stage; print where the time went."""
    imports, traced, compiled = Spans(), Spans(), Spans()
    with timed_imports(imports):
        import jax

        from prism_jax import main, parallel, training

        def listen(event: str, duration_secs: float, **_) -> None:
            if event.endswith(("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")):
                traced.add(duration_secs)
            elif event.endswith("backend_compile_duration"):
                compiled.add(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(listen)
        owner, name = {
            "squeeze": (training.Trainer, "step"),
            "recover": (parallel.LaneMap, "__call__"),
        }[stage]
        plain = getattr(owner, name)

        def first(*arguments, **named):
            called = time.time()
            jax.block_until_ready(plain(*arguments, **named))
            ended = time.time()
            busy = traced.total(called) + compiled.total(called) + imports.total(called)
            step = ended - called - busy
            parts = [imports.total(), traced.total(), compiled.total()]
            parts += [ended - began - sum(parts) - step, step]
            print(json.dumps(dict(zip(PARTS, parts, strict=True))), flush=True)
            os._exit(0)

        setattr(owner, name, first)
        sys.exit(main.main(argv) or "the stage was never begun")


def peer(began: float) -> None:
    """The same for a PyTorch loop on the pool."""
    import torch_peer

    imported = time.time()
    loop = torch_peer.Recover(POOL, batch=10, size=224, small_stem=False, released=False, roll=32)
    ready = time.time()
    loop.step(range(len(POOL)))
    parts = imported - began, 0.0, 0.0, ready - imported, time.time() - ready
    print(json.dumps(dict(zip(PARTS, parts, strict=True))), flush=True)


# --- the driver ------------------------------------------------------------------------------


def run(cache: pathlib.Path, *arguments: str) -> str:
    """Run Python with a compilation cache of its own; what it prints."""
    paths = os.pathsep.join([str(measuring.ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONPATH": paths,
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=measuring.ROOT, check=True, text=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip


def child(cache: pathlib.Path, *arguments: str) -> dict[str, float]:
    """Measure one command in a process of its own."""
    return json.loads(run(cache, __file__, f"--began={time.time()}", *arguments).splitlines()[-1])


def prepare(folder: pathlib.Path) -> dict[str, tuple[str, list[str]]]:
    """Make teachers and images; the cases as name to (stage, arguments)."""
    import numpy as np
    import torch
    import torch_peer
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for wordnet in CLASSES:
            home = folder / "images" / split / wordnet
            home.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
                Image.fromarray(pixels).save(home / f"{number}.JPEG")
    large = [
        "--config=configs/imagenet_ipc1.py:smoke",
        f"--config.dataset.path={folder / 'images'}",
        "--config.recover.steps_per_dispatch=1",
        "--config.squeeze.least_top1=0",  # random weights
    ]
    for name in POOL:
        net = torch_peer.calibrate(torch_peer.network(name, small_stem=False), 224)
        torch.save(net.state_dict(), folder / f"{name}.pth")
        large.append(f"--config.networks.{name}.checkpoint={folder / name}.pth")
    adopted = {}
    for name, arguments in (("digits", [*DIGITS]), ("large", large)):
        source = folder / f"teachers-{name}"
        command = ["-m", "prism_jax.main", *arguments, f"--workdir={source}", "--stages=squeeze"]
        run(folder / "prepared", *command)
        adopted[name] = [*arguments, f"--from={source}"]
    one = "--config.recover.steps_per_dispatch=1"
    return {
        "digits": ("squeeze", [*DIGITS]),
        "digits recover": ("recover", [*adopted["digits"], one]),
        "224 px recover": ("recover", adopted["large"]),
    }


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| command | cache | until the first step | " + " | ".join(PARTS) + " |",
        "|:--|:--|--:|" + "--:|" * len(PARTS),
    ]
    for row in rows:
        parts = row["parts"]
        until = sum(parts.values()) - parts["first step"]
        shown = " | ".join(f"{parts[name]:.1f}" for name in PARTS)
        lines.append(f"| {row['command']} | {row['cache']} | **{until:.1f}** | {shown} |")
    lines += ["", "Seconds of the clock; medians."]
    return "\n".join(lines)


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--began", type=float, help=measuring.HIDDEN)
    parser.add_argument("--stage", help=measuring.HIDDEN)
    given, rest = parser.parse_known_args()
    if given.began:
        return measured(given.began, given.stage, rest) if given.stage else peer(given.began)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        for command, (stage, arguments) in prepare(folder).items():
            runs = []
            for number in range(1 + given.rounds):
                name = command.replace(" ", "-")
                workdir = f"--workdir={folder / f'{name}-{number}'}"
                cache = folder / f"cache-{name}"
                runs.append(child(cache, f"--stage={stage}", *arguments, workdir))
                print(command, "cold" if number == 0 else "warm", runs[-1], flush=True)
            rows.append({"command": command, "cache": "cold", "runs": runs[:1]})
            rows.append({"command": command, "cache": "warm", "runs": runs[1:]})
        runs = [child(folder) for _ in range(given.rounds)]
        rows.append({"command": "PyTorch loop, 224 px", "cache": "-", "runs": runs})
    for row in rows:
        row["parts"] = {p: statistics.median(run[p] for run in row["runs"]) for p in PARTS}
    found = {"machine": measuring.machine(), "rows": rows}
    measuring.write(found, table(rows), given.out)


if __name__ == "__main__":
    main()
