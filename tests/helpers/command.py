"""The real command in processes of its own, and what its working directory says."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from prism_jax.data import label_store
from prism_jax.data.metrics import read_lines
from prism_jax.main import main

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TINY = f"--config={ROOT / 'tests' / 'configs' / 'tiny.py'}"
TIMEOUT = 600


def environment(**more: str) -> dict[str, str]:
    """An environment of its own: one device, the tests' thread pool, their compilation cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "NPROC"))}
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return {
        **kept, "NPROC": "8", "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache, **more
    }  # fmt: skip


COMMAND = ("-m", "prism_jax.main")


def start(*arguments: str, command: Sequence[str] = COMMAND, **environ: str) -> subprocess.Popen:
    """``python -m prism_jax.main ...``, or another command of Python, in the background."""
    return subprocess.Popen(
        [sys.executable, *command, *map(str, arguments)],
        cwd=ROOT, env=environment(**environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def run(
    *arguments: str, command: Sequence[str] = COMMAND, **environ: str
) -> subprocess.CompletedProcess:
    """The same, to its end."""
    process = start(*arguments, command=command, **environ)
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def signal_when(
    condition: Callable[[], bool], signum: int, *arguments: str, **environ: str
) -> subprocess.CompletedProcess:
    """Run the command and send it a signal as soon as a condition holds."""
    process = start(*arguments, **environ)
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"the run ended before the moment to stop it:\n{out}\n{err}")
        time.sleep(0.002)
    process.send_signal(signum)
    out, err = process.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call(*arguments: str, main: Callable[[list[str]], int] = main) -> tuple[int, str, str]:
    """A ``main`` in this process: (exit status, stdout, stderr). Signals and environment stay."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    environ, path = dict(os.environ), list(sys.path)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(map(str, arguments)))
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        os.environ.clear()
        os.environ.update(environ)
        sys.path[:] = path
    return status, out.getvalue(), err.getvalue()


# --- what a working directory says ------------------------------------------------------------


def snapshot(root: pathlib.Path, *parts: str) -> dict[str, tuple]:
    """Every file and folder with size and time; a file made and removed shows in its folder's."""
    roots = [root / part for part in parts] or [root]
    found = [p for r in roots for p in (r, *sorted(r.rglob("*")))]
    return {
        str(p.relative_to(root)): (p.stat().st_mtime_ns, p.stat().st_size if p.is_file() else None)
        for p in found
    }


def results(root: pathlib.Path) -> dict[str, object]:
    """Everything that is promised to be the same bits, however a run got there."""
    found: dict[str, object] = {}
    for path in sorted(root.glob("squeeze/*/weights.safetensors")):
        found[str(path.relative_to(root))] = _sha(path.read_bytes())
    for path in sorted(root.glob("**/images/*/*.png")):
        found[str(path.relative_to(root))] = _sha(_pixels(path))
    for folder in sorted(p.parent for p in root.glob("**/relabel/manifest.json")):
        reader = label_store.LabelReader(folder)
        records = [(r.index_B.tobytes(), r.logits_BK.tobytes()) for r in reader.read()]
        found[str(folder.relative_to(root))] = records
    units = root.glob("recover/units/*.json")
    for path in sorted([*root.glob("**/record.json"), *units]):
        record = json.loads(path.read_text())
        found[str(path.relative_to(root))] = {
            k: v for k, v in record.items() if k not in ("seconds", "checksum")
        }
    for path in sorted(root.glob("**/metrics.jsonl")):
        lines = read_lines(path)
        lines.sort(key=lambda line: (line.get("unit", ""), line["step"]))
        found[str(path.relative_to(root))] = lines
    if (root / "analyse" / "diversity.json").exists():
        found["diversity"] = json.loads((root / "analyse" / "diversity.json").read_text())
    return found


def tree(root: pathlib.Path) -> list[str]:
    """The names of all files but trainings' checkpoints, TensorBoard's, and a dead run's lock."""
    names = (p.relative_to(root) for p in root.rglob("*") if p.is_file())
    left_out = {"checkpoints", "tensorboard", ".lock"}
    return sorted(str(n) for n in names if not left_out & set(n.parts))


def assert_same(root: pathlib.Path, reference: pathlib.Path) -> None:
    """The results of two working directories are the same bits, in the same files."""
    ours, theirs = results(root), results(reference)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if ours[k] != theirs[k]] == []
    assert tree(root) == tree(reference)


def _pixels(path: pathlib.Path) -> bytes:
    from PIL import Image

    with Image.open(path) as image:
        return np.array(image).tobytes()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- one finished run for all tests -----------------------------------------------------------


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The tiny experiment, run once by the real command without interruption. Only to be read.

    Several pytest workers share it: the first makes it, the others wait.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    root, log = shared / "reference", shared / "reference.json"
    try:
        root.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + TIMEOUT
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        done = run(TINY, f"--workdir={root}")
        temporary = log.with_suffix(".tmp")
        temporary.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
        temporary.replace(log)
    status, out, err = json.loads(log.read_text())
    assert status == 0, f"{out}\n{err}"
    return root


@pytest.fixture
def finished(reference: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the finished run, to be changed."""
    return shutil.copytree(reference, tmp_path / "run")
