"""Write the working directory that an earlier commit makes: python tests/old/make_workdir.py

The tiny experiment by the code of ``COMMIT``, taken from the history; without what only helps to
continue a training, it is packed as ``workdir-0.1.tar.xz`` beside this file.
"""

from __future__ import annotations

import io
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile

COMMIT = "b538e7656624c7cca63f954420c45fef00c098a6"  # the last one of version 0.1
ARCHIVE = pathlib.Path(__file__).with_name("workdir-0.1.tar.xz")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def known() -> bool:
    """Whether the history has the commit."""
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{COMMIT}^{{commit}}"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def make(folder: pathlib.Path) -> pathlib.Path:
    """Check the commit's files out into a folder and run its tiny experiment there."""
    files = subprocess.run(
        ["git", "-C", str(ROOT), "archive", COMMIT], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        archive.extractall(folder, filter="data")
    arguments = ["-m", "prism_jax.main", "--config=tests/configs/tiny.py", "--workdir=run"]
    environ = {**os.environ, "PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu", "NPROC": "8"}
    environ.pop("XLA_FLAGS", None)
    subprocess.run([sys.executable, *arguments], cwd=folder, env=environ, check=True)
    return folder / "run"


def main() -> None:
    """Make it and pack it."""
    with tempfile.TemporaryDirectory() as folder:
        root = make(pathlib.Path(folder))
        for path in [*root.rglob("checkpoints"), *root.rglob("tensorboard")]:
            shutil.rmtree(path)
        with tarfile.open(ARCHIVE, "w:xz") as archive:
            archive.add(root, "run", filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    main()
