"""Published data and weights: ``$PRISM_JAX_SHARED_DATA``, or shared/data beside the repository."""

from __future__ import annotations

import os
import pathlib

import pytest

BESIDE = pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data"
DATA = pathlib.Path(os.environ.get("PRISM_JAX_SHARED_DATA", BESIDE))


def data_file(name: str) -> pathlib.Path:
    """A file or folder of them; the test is skipped where it is not there."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {path}")
    return path
