"""Which bits come again when a run is made again, and what determinism costs.

    python benchmarks/bits.py --workdir=DIR --out=benchmarks/results/bits_gpu
    python benchmarks/bits.py --workdir=DIR -- --config=FILE [--config.A.B=...]

With ``parallel.deterministic`` on and off, each in a process of its own:

first    a run
again    the same command in another working directory, every program compiled anew
same     the first's teachers, everything else made again
killed   the first's teachers; SIGKILL in the middle of recover, then the same command

Counts, against the first, the results that are the same bits: every teacher's weights, every
image's pixels, every set's soft labels, every student's record. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import killed
import measuring

DEFAULT = ("--config=configs/digits_ipc10.py", "--config.recover.iterations=2000")
GROUPS = {
    "teachers": lambda name: name.endswith("weights.safetensors"),
    "images": lambda name: name.startswith("recover/images/"),
    "labels": lambda name: name.endswith("relabel"),
    "students": lambda name: "validate/" in name and name.endswith("record.json"),
}


def run(workdir: pathlib.Path, arguments: list[str], *, stop: bool = False, **environ: str) -> None:
    """The command, to its end; with ``stop`` once more before, killed in recover."""
    with (workdir.parent / f"{workdir.name}.log").open("a") as log:
        if stop:
            pattern, delay = killed.MOMENTS["recover"]
            process = killed.start(workdir, arguments, log, **environ)
            while not any(workdir.glob(pattern)) and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            if process.wait() != -signal.SIGKILL:
                sys.exit(f"the run ended before it was killed in recover; see {log.name}")
        if status := killed.start(workdir, arguments, log, **environ).wait():
            sys.exit(f"the run ended with {status}; see {log.name}")


def same_bits(workdir: pathlib.Path, first: pathlib.Path) -> dict[str, list[int]]:
    """Per kind of result: how many are the same bits, and of how many."""
    from helpers.command import results

    ours, theirs = results(workdir), results(first)
    found = {}
    for kind, belongs in GROUPS.items():
        names = [name for name in theirs if belongs(name)]
        found[kind] = [sum(ours.get(name) == theirs[name] for name in names), len(names)]
    return found


def measure(root: pathlib.Path, arguments: list[str], write: Callable[[dict], None]) -> dict:
    """All four runs of one mode; what is known is written after each."""
    root.mkdir(parents=True)
    first = root / "first"
    run(first, arguments)
    found: dict[str, Any] = {"same bits": {}}
    for name in ("again", "same", "killed"):
        workdir = root / name
        if name == "again":
            run(workdir, arguments, JAX_COMPILATION_CACHE_DIR=str(root / "cache"))
        else:
            shutil.copytree(first / "squeeze", workdir / "squeeze")
            run(workdir, arguments, stop=name == "killed")
        found["same bits"][name] = same_bits(workdir, first)
        if name == "same":  # with a filled cache
            summary = json.loads((workdir / "summary.json").read_text())
            found["recover seconds"] = summary["recover"]["seconds"]
        write(found)
    return found


def table(rows: dict[str, dict]) -> str:
    """The results in Markdown."""
    lines = [
        "| deterministic | run | " + " | ".join(GROUPS) + " | recover, s |",
        "|:--|:--|" + "--:|" * (len(GROUPS) + 1),
    ]
    for mode, row in rows.items():
        for name, found in row["same bits"].items():
            kinds = tuple(GROUPS) if name == "again" else tuple(GROUPS)[1:]
            cells = [f"{found[k][0]} of {found[k][1]}" if k in kinds else "" for k in GROUPS]
            cells.append(f"{row['recover seconds']:.1f}" if name == "same" else "")
            lines.append(f"| {mode} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Results that have the bits of the first run."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", help="write OUT.json and OUT.md")
    parser.add_argument("--modes", default="on,off", help="of parallel.deterministic")
    parser.add_argument("arguments", nargs="*", help="the flags of prism_jax.main, after --")
    given = parser.parse_args()
    if importlib.util.find_spec("pytest") is None:
        sys.exit("this needs the extra `test`: pip install -e '.[test]'")
    root = given.workdir.resolve()
    if root.exists():
        sys.exit(f"--workdir={given.workdir} is there already; name a new one")
    machine, rows = measuring.machine(), {}
    for mode in given.modes.split(","):
        arguments = [
            *(given.arguments or DEFAULT),
            f"--config.parallel.deterministic={mode == 'on'}",
        ]

        def write(found: dict, mode: str = mode) -> None:
            rows[mode] = found
            print(mode, json.dumps(found), flush=True)
            measuring.write({"machine": machine, "rows": rows}, table(rows), given.out)

        measure(root / mode, arguments, write)


if __name__ == "__main__":
    main()
