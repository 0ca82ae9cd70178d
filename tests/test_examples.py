"""The example of the README runs, and gives what it says."""

from __future__ import annotations

import importlib.util
import pathlib

import numpy as np
from helpers.compiling import fast_programs

__all__ = ["fast_programs"]  # a fixture

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "own_data_own_teacher.py"


def test_own_data_own_teacher(fast_programs):
    spec = importlib.util.spec_from_file_location("own_data_own_teacher", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    images, records, top1 = example.main(iterations=20, epochs=2)
    assert images.shape == (10, 8, 8, 1) and images.dtype == np.uint8
    assert len(records) == 100
    for record in records:
        assert sorted(record.index_B) == list(range(10))
        assert record.logits_BK.shape == (10, 10) and np.isfinite(record.logits_BK).all()
    assert len({record.logits_BK.tobytes() for record in records}) == 100  # always other views
    assert top1 > 0.3


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 70
