"""A benchmark ends where its sides do not compute the same."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
from helpers.command import ROOT


def test_sides_that_disagree_end_the_benchmark():
    sys.path.append(str(ROOT / "benchmarks"))
    path = ROOT / "benchmarks" / "diffusion.py"  # tests/diffusion has its name
    spec = importlib.util.spec_from_file_location("benchmark_of_diffusion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def workers(*values):
        return {
            side: types.SimpleNamespace(ask=lambda _, value=value: value)
            for side, value in zip(module.SIDES, values, strict=True)
        }

    assert module.agree(workers([3.0, 4.0], [3.0, 4.001]))["apart"] == pytest.approx(2e-4, rel=0.01)
    with pytest.raises(SystemExit, match="do not compute the same"):
        module.agree(workers([3.0, 4.0], [3.0, 4.01]))
    with pytest.raises(SystemExit):
        module.agree(workers([3.0, 4.0], [3.0, float("nan")]))
