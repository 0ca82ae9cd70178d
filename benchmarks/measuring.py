"""What the benchmarks share: sides that take turns, what a machine can do, tables.

Each side of a comparison is a process of its own, with fresh memory, its own threads and no
other framework beside it. The driver lets one work at a time, so that all see the same load.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HIDDEN = argparse.SUPPRESS
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout, wherever the command is run

# Side of the matrices, values of the copy, and the matrices' type.
SIZES = {"cpu": (1536, 1 << 24, "float32"), "gpu": (8192, 1 << 28, "bfloat16")}
PRECISION = {"cpu": "float32", "gpu": "bfloat16"}  # of ours


# --- the worker's end ------------------------------------------------------------------------


def serve(side: Any) -> None:
    """Answer the driver's lines: ``{"call": method, "with": arguments}``, timed.

    Standard output is the driver's; whatever else is printed goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    forget_peak()
    loaded = resident("VmRSS")
    print(json.dumps({"loaded_bytes": loaded}), file=answers, flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began, cpu = time.perf_counter(), time.process_time()
        value = getattr(side, order["call"])(*order["with"])
        answer = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": resident("VmHWM"),
            "value": value,
        }
        print(json.dumps(answer), file=answers, flush=True)


def resident(field: str) -> int | None:
    """Bytes of resident memory, now ("VmRSS") or at most ("VmHWM"); None where unknown."""
    try:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak() -> None:
    """Let the peak of resident memory begin anew, where the system allows it."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


# --- the driver's end ------------------------------------------------------------------------


class Worker:
    """One side in a process of its own: ``script --side=name --spec=...``."""

    def __init__(self, script: str, side: str, spec: Mapping[str, Any], *, threads: int):
        command = [sys.executable, script, f"--side={side}", f"--spec={json.dumps(spec)}"]
        self._process = subprocess.Popen(
            command, env=environment(threads), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        if threads == 1:
            os.sched_setaffinity(self._process.pid, {max(os.sched_getaffinity(0))})
        self.loaded_bytes = self._read()["loaded_bytes"]
        self.peak_bytes = None

    def time(self, method: str, *arguments: Any) -> dict[str, float]:
        """Call a method of the side; its "seconds", "cpu_seconds" and "value"."""
        order = {"call": method, "with": arguments}
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()
        answer = self._read()
        self.peak_bytes = answer["peak_bytes"]
        return answer

    def ask(self, method: str) -> Any:
        return self.time(method)["value"]

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            sys.exit(f"a worker ended with {self._process.wait()}; see above")
        return json.loads(line)

    def close(self) -> None:
        self._orders.close()
        self._process.wait()


def environment(threads: int) -> dict[str, str]:
    """A worker's: the same number of threads for every framework, and nothing held in advance."""
    return {
        **os.environ,
        "NPROC": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }


def compare(
    script: str,
    sides: Sequence[str],
    spec: Mapping[str, Any],
    *,
    threads: int,
    rounds: int,
    seconds: float,
    least: int = 1,
    agree: Callable[[Mapping[str, Worker]], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Let sides work in turns.

    Args:
      script: the benchmark; its side has ``run(count)``, ``facts()``, ``matmul()`` and ``copy()``.
      sides: "ours" first, then its peers.
      spec: what each is started with.
      threads: of each side; one is pinned to a core.
      rounds: turns of each side that count.
      seconds: that a turn of ours should take.
      least: a turn does a multiple of so many iterations.
      agree: is asked, once all are ready, whether sides compute the same; what it finds is kept.

    Returns:
      Per side its ``seconds`` and ``cpu_seconds`` per iteration and round, their medians,
      memory and ``facts``; per peer the median of the rounds' ratios to ours.
    """
    workers = {side: Worker(script, side, spec, threads=threads) for side in sides}
    for worker in workers.values():
        worker.time("run", least)
    agreed = agree(workers) if agree else {}
    turn = workers["ours"].time("run", least)["seconds"]
    count = least * max(1, round(seconds / turn))
    found: dict[str, dict[str, Any]]
    found = {side: {"seconds": [], "cpu_seconds": []} for side in sides}
    for _ in range(rounds):
        for side, worker in workers.items():
            answer = worker.time("run", count)
            for clock, times in found[side].items():
                times.append(answer[clock] / count)
    for side, worker in workers.items():
        found[side] |= {
            "median_seconds": statistics.median(found[side]["seconds"]),
            "median_cpu_seconds": statistics.median(found[side]["cpu_seconds"]),
            "loaded_bytes": worker.loaded_bytes,
            "peak_resident_bytes": worker.peak_bytes,
            **worker.ask("facts"),
        }
    clock = "cpu_seconds" if threads == 1 and spec["device"] == "cpu" else "seconds"
    best = {
        method: max(rate(worker, method, clock) for worker in workers.values() for _ in range(5))
        for method in ("matmul", "copy")
    }
    for worker in workers.values():
        worker.close()
    ours = found["ours"]
    ratios = {
        peer: {
            clock: statistics.median(
                theirs / mine for theirs, mine in zip(found[peer][clock], ours[clock], strict=True)
            )
            for clock in ("seconds", "cpu_seconds")
        }
        for peer in sides[1:]
    }
    return {
        "iterations_a_turn": count,
        "threads": threads,
        "clock": clock,
        "sides": found,
        "ratios": ratios,
        "rates": best,
        **agreed,
    }


def lanes(spec: Mapping[str, Any]) -> int:
    """How many batches ours works on at a time: two on the cores of a CPU."""
    return 2 if spec["device"] == "cpu" and spec["threads"] > 1 else 1


def rate(worker: Worker, method: str, clock: str) -> float:
    """What a side attains in one product or copy: FLOP or bytes per second."""
    answer = worker.time(method)
    return answer["value"] / answer[clock]


# --- what is written -------------------------------------------------------------------------


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark; ``--side`` and ``--spec`` are for its own workers."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="1 is pinned to a core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of ours in a round")
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    parser.add_argument("--side", help=HIDDEN)
    parser.add_argument("--spec", help=HIDDEN)
    return parser


def machine() -> dict[str, Any]:
    """Where this runs, and on what versions."""
    from prism_jax.environment import commit

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def printed(*command: str) -> str | None:
        if not shutil.which(command[0]):
            return None
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return next(iter(done.stdout.splitlines()), None)

    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpu": printed("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "torch", "torchvision", "diffusers")},
    }


def used_bytes(row: Mapping[str, Any], side: str) -> int:
    """Peak memory of a side: the allocator's on a GPU, else XLA's account or torch's growth."""
    found = row["sides"][side]
    if found["device_peak_bytes"] is not None:
        return found["device_peak_bytes"]
    if found["account_bytes"] is not None:
        return found["account_bytes"]
    return found["peak_resident_bytes"] - found["loaded_bytes"]


ROOFLINE_NOTE = (
    "Matmul, copy: the work that cannot be left out (convolutions and dense layers; their inputs, "
    "outputs and kernels, read or written once) as shares of the measured rates."
)
MEMORY_NOTE = (
    "Memory of ours: arguments (weights too), results and temporaries by XLA's account. Theirs: "
    "growth of the process over the loaded model. On a GPU both are the allocator's peak. "
    "Resident: each whole process, at its peak after compiling."
)


def memory_cells(row: Mapping[str, Any]) -> str:
    """Cells for the memory of every side, ours as a share of the last one's, resident sizes."""
    used = [used_bytes(row, side) for side in row["sides"]]
    resident = (side["peak_resident_bytes"] for side in row["sides"].values())
    sizes = " | ".join(f"{size / 1e6:.0f}" for size in used)
    whole = ", ".join(f"{size / 1e6:.0f}" for size in resident)
    return f"{sizes} | **{used[0] / used[-1]:.2f}** | {whole}"


def roofline_cells(row: Mapping[str, Any]) -> str:
    """Cells for the shares of the matrix-product and copy rates that ours attains."""
    ours = row["sides"]["ours"]
    seconds = ours[f"median_{row['clock']}"]
    shares = (
        ours[work] / seconds / row["rates"][rate]
        for work, rate in (("flops", "matmul"), ("bytes", "copy"))
    )
    return " | ".join(f"{100 * share:.0f} %" for share in shares)


def images_table(rows: Sequence[Mapping[str, Any]], what: str) -> str:
    """Images per second of ours and of PyTorch in Markdown; ``what`` names the first column."""
    lines = [
        f"| {what} | images | threads | ours, images/s | torch, images/s | ours / torch | matmul "
        "| copy | ours, MB | torch, MB | ours / torch | resident, MB |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|:--|",
    ]
    for row in rows:
        clock = row["clock"]
        speeds = (row["batch"] / side[f"median_{clock}"] for side in row["sides"].values())
        lines.append(
            f"| {row[what]} | {row['batch']} x {row['size']} px | {row['threads']} | "
            + " | ".join(f"{speed:.1f}" for speed in speeds)
            + f" | **{row['ratios']['torch'][clock]:.2f}** | {roofline_cells(row)} "
            f"| {memory_cells(row)} |"
        )
    lines += ["", "Images per second (of a thread's time with one thread, else of the clock)."]
    return "\n".join([*lines, ROOFLINE_NOTE, MEMORY_NOTE])


def write(found: Mapping[str, Any], table: str, out: str | None) -> None:
    """Print a table under what it was measured on; with ``out`` also write it."""
    where = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    text = f"{where}.\n\n{table}\n"
    print(text)
    save(found, text, out)


def save(found: Mapping[str, Any], text: str, out: str | None) -> None:
    """Write OUT.json, everything found, and OUT.md, the same for a reader; without OUT nothing."""
    if out:
        path = pathlib.Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".md").write_text(text)
