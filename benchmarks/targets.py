"""One iteration of recover on machines that are not here, by the word of their compilers.

    python benchmarks/targets.py --out=benchmarks/results/targets
    python benchmarks/targets.py --out=benchmarks/results/targets --targets=h100,v5e:2x2 --again

100 images of 224 px, every target of the table with PRISM's four networks and with ResNet-18, in
float32 and bfloat16. A cell that is in OUT.json is kept unless ``--again``; each is written when
it is there, and one that nobody compiled stays "not compiled". Nothing is run: see
docs/accelerators.md for what such numbers are.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
from typing import Any

import jax
import measuring

from prism_jax.environment import commit

TARGETS = (
    "a100", "rtx4090", "l4", "h100", "h100x8", "h200", "b200",
    "v4:2x2x1", "v5e:2x2", "v5e:16x16", "v5p:2x2x1", "v6e:2x2",
)  # fmt: skip
POOLS = {
    "prism": ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2_x0_5"),
    "resnet18": ("resnet18",),
}
DTYPES = ("float32", "bfloat16")


def experiment(pool: str, dtype: str):
    """The paper's settings, with weights that squeeze would train."""
    from configs import base
    from prism_jax.config import resolve

    c = base.get_config()
    c.recover.pool, c.recover.dtype, c.recover.batch_size = POOLS[pool], dtype, 100
    return resolve(c)


def measure(target: str, pool: str, dtype: str, timeout: float) -> dict:
    """One cell."""
    from prism_jax.accelerators import compiling, forecast, targets

    made, machine = experiment(pool, dtype), targets.parse(target)
    found = compiling.compile_around(made, machine, "recover", timeout=timeout)
    row: dict[str, Any] = {
        "target": target, "pool": pool, "dtype": dtype, "commit": commit(),
        "outcome": found.outcome, "line": found.line, "around": found.around,
        "needed_bytes": found.needed_bytes,
        "lower_seconds": found.lower_seconds, "compile_seconds": found.compile_seconds,
        "memory": found.memory, "collectives": found.collectives,
    }  # fmt: skip
    if found.cost:
        for name, cost in (
            ("mean", found.cost.mean(forecast.shares(made))),
            ("all read", found.cost.mean({})),
            ("primary alone", found.cost.always),
        ):
            row[name] = {
                "milliseconds": 1e3 * forecast.seconds_of(cost, machine),
                "cycles": cost.cycles,
                "bytes": cost.bytes,
                "flops": cost.flops,
                "launches": cost.launches,
            }
    return row


def table(rows: list[dict]) -> str:
    """The results in Markdown."""
    cells = {(row["target"], row["pool"], row["dtype"]): row for row in rows}
    lines = [
        "| target | pool | dtype | compile, s | memory, GB | collectives | mean iteration, ms "
        "| all read | cycles or bytes, all read | launches |",
        "|:--|:--|:--|--:|--:|:--|--:|--:|--:|--:|",
    ]
    for target in TARGETS:
        for pool in POOLS:
            for dtype in DTYPES:
                row = cells.get((target, pool, dtype))
                lines.append(f"| {target} | {pool} | {dtype} | {_cells(row)} |")
    commits = dict.fromkeys(row["commit"] for row in rows)
    of = {c: ", ".join(sorted({r["target"] for r in rows if r["commit"] == c})) for c in commits}
    lines += [
        "",
        "Commits: " + "; ".join(f"{c} for {names}" for c, names in of.items()) + ".",
        "",
        "Of GPUs a lower bound, of TPUs the compiler's estimate of cycles at the clock of its peak "
        "rate; nothing was run. *Mean* is over PRISM's draws, *all read* an iteration that draws "
        "every teacher.",
    ]
    return "\n".join(lines)


def _cells(row: dict | None) -> str:
    if row is None:
        return "not compiled | | | | | |"
    if "mean" not in row:
        needed = row["needed_bytes"]
        return (
            f"{row['outcome']} | {needed / 1e9:.1f}" + " | " * 5
            if needed
            else (f"{row['outcome']}" + " | " * 6)
        )
    every = row["all read"]
    size = f"{every['cycles'] / 1e6:.1f} M" if every["cycles"] else f"{every['bytes'] / 1e9:.1f} GB"
    return (
        f"{row['compile_seconds']:.0f} | {row['memory']['total'] / 1e9:.2f} | "
        f"{len(row['collectives']) or 'none'} | {row['mean']['milliseconds']:.1f} | "
        f"{every['milliseconds']:.1f} | {size} | {every['launches']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", required=True, help="write OUT.json and OUT.md")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--pools", default=",".join(POOLS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--again", action="store_true", help="compile cells that are there, too")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one cell")
    given = parser.parse_args()
    path = pathlib.Path(f"{given.out}.json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
    }
    for target in given.targets.split(","):
        for pool in given.pools.split(","):
            for dtype in given.dtypes.split(","):
                where = [target, pool, dtype]
                there = [[r["target"], r["pool"], r["dtype"]] for r in rows]
                if where in there and not given.again:
                    continue
                row = measure(target, pool, dtype, given.timeout)
                rows = [r for r, w in zip(rows, there, strict=True) if w != where] + [row]
                print(json.dumps(row), flush=True)
                found = {"machine": machine, "rows": rows}
                measuring.write(found, table(rows), given.out)


if __name__ == "__main__":
    main()
