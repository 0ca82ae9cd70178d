"""Our side of the benchmarks on the device at hand, beside what its compiler led to expect.

    python benchmarks/on_device.py --out=benchmarks/results/on_device

Started by ``on_device.sh``, which says what comes before and after. Each row is written as soon
as it is there; the estimates are those of ``targets.py`` for this device, where it has any.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import measuring

# In order of worth: what is timed, with what.
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("recover", {"pool": "prism", "precision": "float32"}),
    ("recover", {"pool": "resnet18", "precision": "float32"}),
    ("recover", {"pool": "prism", "precision": "bfloat16"}),
    ("recover", {"pool": "resnet18", "precision": "bfloat16"}),
    ("recover", {"pool": "resnet18", "precision": "float32", "deterministic": False}),
    ("relabel", {"teachers": "resnet18", "precision": "float32"}),
    ("relabel", {"teachers": "four networks", "precision": "float32"}),
    ("validate", {"network": "resnet18", "precision": "bfloat16"}),
)
ROUNDS = 5
ESTIMATES = measuring.ROOT / "benchmarks" / "results" / "targets.json"


def side_of(what: str, spec: dict):
    """Our side of a benchmark."""
    import recover
    import relabel
    import validate

    return {"recover": recover, "relabel": relabel, "validate": validate}[what].our_side(spec)


def measure(side, least: int, seconds: float, began: float) -> dict:
    """Milliseconds of one iteration, batch or step; seconds from ``began`` to the first's end."""
    side.run(least)
    first = time.perf_counter() - began

    def turn(count: int) -> float:
        began = time.perf_counter()
        side.run(count)
        return time.perf_counter() - began

    count = least * max(1, round(seconds / max(turn(least), 1e-6)))
    turn(count)  # another program or another draw may come with another count
    each = [turn(count) / count for _ in range(ROUNDS)]
    return {
        "milliseconds": 1e3 * statistics.median(each),
        "spread": 1e3 * (max(each) - min(each)),
        "iterations": count * ROUNDS,
        "seconds to the first": first,
        "facts": _facts(side),
        "trace": {},
    }


def traced(side, count: int) -> dict:
    """What the device did in so many more iterations, by JAX's profiler; empty without a device.

    Returns:
      Per iteration "busy" milliseconds, in which a kernel or a copy ran, and their number,
      "launches"; of the "dearest" names, milliseconds and number, the kernels' of XLA by the
      operation that they are.
    """
    import jax

    side.run(count)  # a program of its own may come with this count
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            side.run(count)
        files = pathlib.Path(folder).rglob("*.xplane.pb")
        planes = [p for f in files for p in jax.profiler.ProfileData.from_file(str(f)).planes]
    spent: dict[str, list[float]] = {}
    spans = []
    for plane in planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if plane.name.startswith("/device:TPU") and line.name != "XLA Ops":
                continue  # the same again, by step and by program
            for event in line.events:
                stats = {key: value for key, value in event.stats if key}
                name = f"{stats.get('hlo_op', '')} {event.name}".strip()
                one = spent.setdefault(name, [0.0, 0.0])
                one[0] += event.duration_ns / 1e6 / count
                one[1] += 1 / count
                spans.append((event.start_ns, event.end_ns))
    if not spans:
        return {}
    busy, end = 0.0, 0.0
    for start, stop in sorted(spans):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    dearest = sorted(spent.items(), key=lambda item: -item[1][0])[:150]
    return {
        "busy": busy / 1e6 / count,
        "launches": sum(number for _, number in spent.values()),
        "dearest": [[name, *map(lambda x: round(x, 4), one)] for name, one in dearest],
    }


def _facts(side) -> dict:
    """What the side says of its program; where it cannot, it has been timed all the same."""
    try:
        return side.facts()
    except Exception as error:  # the compiler's account of a program that came from a cache
        return {"not known": str(error)}


@functools.cache
def _estimates() -> list[dict]:
    return json.loads(ESTIMATES.read_text())["rows"] if ESTIMATES.exists() else []


def estimate(kind: str, what: str, spec: dict) -> float | None:
    """Milliseconds by the compiler, every other teacher drawn in half of the iterations."""
    if (spec["batch"], spec["size"]) != (100, 224) or not spec["deterministic"]:
        return None  # another program than the one that was compiled
    name = kind.lower().replace("rtx ", "rtx")
    kinds = {"tpu v5 lite": "v5e", "tpu v6 lite": "v6e", "tpu v5p": "v5p", "tpu v5": "v5p"}
    name = kinds.get(name, name)
    for row in _estimates():
        same = (row["pool"], row["dtype"]) == (spec.get("pool"), spec["precision"])
        device, _, shape = row["target"].partition(":")
        here = re.search(rf"\b{device}\b", name) and shape != "16x16"  # of one host
        if what == "recover" and same and here and "mean" in row:
            ends = row["primary alone"], row["all read"]
            return statistics.fmean(end["milliseconds"] for end in ends)
    return None


def prepare(deadline: float) -> None:
    """Compile what will be timed, a process for each row, into JAX's compilation cache.

    But what XLA would choose by timing it, which is for a device without other work.
    """
    fixed = [n for n, (_, chosen) in enumerate(ROWS) if chosen.get("deterministic", True)]
    started = {
        n: subprocess.Popen([sys.executable, __file__, *sys.argv[1:], f"--row={n}"]) for n in fixed
    }
    for number, process in started.items():
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        print(f"{ROWS[number]}: {'compiled' if status == 0 else f'status {status}'}", flush=True)


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| what | with | measured, ms | spread | estimate, ms | measured / estimate | busy, ms "
        "| launches | memory, GB | by the account | first, s |",
        "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        expected = row["estimate"]
        more = f"{expected:.2f} | {row['milliseconds'] / expected:.2f}" if expected else "– | –"
        given = ", ".join(str(v) for v in row["with"].values())
        trace, facts = row["trace"], row["facts"]
        busy = f"{trace['busy']:.2f} | {trace['launches']:.0f}" if trace else "– | –"
        memory = " | ".join(
            f"{facts[name] / 1e9:.2f}" if facts.get(name) else "–"
            for name in ("device_peak_bytes", "account_bytes")
        )
        lines.append(
            f"| {row['what']} | {given} | {row['milliseconds']:.2f} | {row['spread']:.2f} | {more} "
            f"| {busy} | {memory} | {row['seconds to the first']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="write OUT.json and OUT.md")
    parser.add_argument("--row", type=int, help="of ROWS: measure it in this process")
    parser.add_argument(
        "--prepare", action="store_true", help="compile all rows at once, time none"
    )
    parser.add_argument("--shape", default="100x224", help="batch x side")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for all rows")
    given = parser.parse_args()
    path = pathlib.Path(f"{given.out}.json")
    if given.row is None and given.prepare:
        prepare(time.monotonic() + given.limit)
        return
    if given.row is None:
        path.unlink(missing_ok=True)
        deadline = time.monotonic() + given.limit
        for number in range(len(ROWS)):  # a process each: one that ends takes no other with it
            left = deadline - time.monotonic()
            one = [sys.executable, __file__, *sys.argv[1:], f"--row={number}"]
            command = ["timeout", "--foreground", f"{left:.0f}", *one]
            if left < 10 or os.spawnvp(os.P_WAIT, command[0], command):
                print(f"not measured: {ROWS[number][0]} with {ROWS[number][1]}", flush=True)
        return
    what, chosen = ROWS[given.row]
    batch, size = map(int, given.shape.split("x"))
    import ours

    spec = {
        "device": "gpu", "batch": batch, "size": size, "classes": 1000, "small_stem": size <= 32,
        "roll": size // 7, "deterministic": True, "profile": None, "threads": 1, **chosen,
    }  # fmt: skip
    ours.begin(spec)
    import jax

    from prism_jax.environment import commit

    device = jax.devices()[0]
    spec["device"] = "cpu" if device.platform == "cpu" else "gpu"
    least = 2 if what == "recover" and spec["pool"] == "prism" else 1
    began = time.perf_counter()
    side = side_of(what, spec)
    if given.prepare:
        side.run(least)
        return
    row = {"what": what, "with": chosen, "estimate": estimate(device.device_kind, what, spec)}
    row |= measure(side, least, given.seconds, began)
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    machine = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "commit": commit(),
        "images": given.shape,
    }
    rows.append(row)
    found = {"machine": machine, "rows": rows}
    measuring.save(found, table(rows), given.out)  # a profiler can take the process with it
    row["trace"] = traced(side, 4 * least)
    measuring.write(found, table(rows), given.out)


if __name__ == "__main__":
    main()
