"""Kill a run once in every stage, let it go on, and compare it with an uninterrupted one.

    python benchmarks/killed.py --workdir=DIR --reference=DIR -- --config=FILE [--config.A.B=...]

Kills with SIGKILL, in the middle of each stage's work. The reference is a run of the same config,
or its first stages. Prints what each start said of going on, the seconds, and whether everything
that the reference has (teachers, images, labels, metrics, students' records) came out as the same
bits. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# stage -> a path that appears in the middle of it, and the seconds to let pass after that
MOMENTS = {
    "squeeze": ("squeeze/*/checkpoints/[0-9]*", 1.0),
    "recover": ("recover/checkpoints/*/[0-9]*", 1.0),
    "relabel": ("relabel/fingerprint.json", 15.0),
    "validate": ("validate/*/*/checkpoints/[0-9]*", 1.0),
    "analyse": ("analyse/grid.png", 0.0),
}
OFTEN = ("--config.recover.checkpoint_seconds=2.0", "--config.validate.checkpoint_seconds=2.0")


def start(workdir: pathlib.Path, arguments: list[str], log, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "prism_jax.main", f"--workdir={workdir}", *OFTEN, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environ}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--reference", type=pathlib.Path, required=True)
    parser.add_argument("arguments", nargs="+", help="the flags of prism_jax.main, after --")
    given = parser.parse_args()
    workdir, began = given.workdir.resolve(), time.monotonic()
    with (workdir.parent / f"{workdir.name}.log").open("w+") as log:
        for stage, (pattern, delay) in MOMENTS.items():
            process, at = start(workdir, given.arguments, log), time.monotonic()
            while not any(workdir.glob(pattern)):
                if process.poll() is not None:
                    sys.exit(f"the run ended before {stage}; see {log.name}")
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            killed = process.wait() == -signal.SIGKILL
            print(f"{stage}: {'killed' if killed else 'had ended'} {time.monotonic() - at:.0f} s "
                  f"after its start", flush=True)  # fmt: skip
        if status := start(workdir, given.arguments, log).wait():
            sys.exit(f"the last start ended with {status}; see {log.name}")
        log.seek(0)
        for line in log.read().splitlines():
            if "continues after" in line:
                print(f"said: {line}")
    print(f"{time.monotonic() - began:.0f} s in all")

    from helpers.command import results

    ours, theirs = results(workdir), results(given.reference)
    differ = sorted(k for k in theirs if ours.get(k) != theirs[k])
    print(f"{len(theirs) - len(differ)} of {len(theirs)} results are the same bits", *differ)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
