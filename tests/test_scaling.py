"""The simulation of many devices, where its outcome is known by hand."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
from helpers.command import ROOT

from prism_jax import parallel
from prism_jax.parallel import longest_first
from prism_jax.stages.makers.optimise import iterations_ahead

spec = importlib.util.spec_from_file_location("scaling", ROOT / "benchmarks" / "scaling.py")
scaling = importlib.util.module_from_spec(spec)
__import__("sys").modules["scaling"] = scaling  # dataclasses look their module up
spec.loader.exec_module(scaling)

WORK = scaling.Work("small", 40, 6, 10, iterations=120, checkpoint_seconds=np.inf)  # 24 units
COSTS = scaling.Costs(image_iteration=0.01, start=7.0)
UNIT = 120 * 10 * 0.01  # seconds


@pytest.mark.parametrize(
    ("devices", "per_host", "rounds"), [(1, 8, 24), (8, 8, 3), (16, 8, 2), (24, 4, 1), (48, 8, 1)]
)
def test_equal_units_without_failures(devices, per_host, rounds):
    """Start, and so many units one after the other; what is left over is idle."""
    found = scaling.simulate(WORK, COSTS, devices=devices, per_host=per_host)
    assert found.seconds == pytest.approx(7.0 + rounds * UNIT)
    assert found.busy == pytest.approx(24 * UNIT)
    assert (found.checkpoints, found.starts, found.lost) == (0, 1, 0.0)


def test_checkpoints_and_finished_units_stop_every_device_of_a_host():
    """Dispatches of five seconds: a checkpoint after the second, per lane; then the unit ends."""
    work = dataclasses.replace(WORK, checkpoint_seconds=6.0)
    costs = dataclasses.replace(COSTS, save_per_byte=1.0 / work.checkpoint_bytes,
                                finish_per_image=0.3)  # fmt: skip
    found = scaling.simulate(work, costs, devices=8)
    assert found.checkpoints == 24
    assert found.seconds == pytest.approx(7.0 + 3 * (UNIT + 8 * 1.0 + 8 * 3.0))


def test_a_batch_that_spans_devices_takes_its_part_of_the_time():
    found = scaling.simulate(WORK, COSTS, devices=48, span=2)
    assert found.seconds == pytest.approx(7.0 + UNIT / 2)
    assert found.busy == pytest.approx(24 * UNIT)


def test_failures_cost_what_was_not_saved():
    """Everything is done in the end; without checkpoints a host's work is lost, with them less."""
    kept = scaling.simulate(WORK, COSTS, devices=16)
    lost = {}
    for every in (np.inf, 5.0):
        work = dataclasses.replace(WORK, iterations=1200, checkpoint_seconds=every)
        costs = dataclasses.replace(COSTS, host_hours=0.1)
        found = scaling.simulate(work, costs, devices=16, seed=1)
        assert found.starts > 1 and found.busy == pytest.approx(24 * 10 * UNIT)
        assert found.seconds > 10 * kept.seconds / 2
        lost[every] = found.lost
    assert lost[np.inf] > 4 * lost[5.0]


def test_the_scheduler_is_the_stage_s_own():
    assert scaling.share is parallel.share
    assert scaling.iterations_ahead is iterations_ahead
    assert scaling.longest_first is longest_first


def test_the_longest_begin_first_and_equal_ones_keep_their_order():
    budgets = {"a": 100, "b": 500, "c": 100, "d": 300}
    assert longest_first(budgets, budgets.get) == ["b", "d", "a", "c"]
    # Dealt to two in turn, they end closer together than in their given order.
    for ordered, apart in ((longest_first(budgets, budgets.get), 200), (list(budgets), 600)):
        loads = [sum(budgets[u] for u in parallel.share(ordered, i, 2)) for i in range(2)]
        assert abs(loads[0] - loads[1]) == apart


def test_a_dispatch_ends_at_a_multiple_or_at_the_end():
    assert [iterations_ahead(n, 120, 50) for n in (0, 23, 50, 100, 120)] == [50, 27, 50, 20, 0]


def test_a_checkpoint_of_imagenet_s_unit_has_180_megabytes():
    assert scaling.WORKS[0].checkpoint_bytes == 3 * 100 * 224 * 224 * 3 * 4 == 180_633_600
    assert [w.units for w in scaling.WORKS] == [100, 500, 1000, 2000, 1100, 2200]
