from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.core.schedules import (
    BUDGETS,
    SCHEDULES,
    joined,
    smallest_crop,
    values_of,
    warmed_up,
)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {0: 1, 150: 1, 300: 1}),
        ("cosine", {0: 1, 100: 0.75, 150: 0.5, 200: 0.25, 300: 0}),
        ("half_cosine", {0: 1, 150: 0.853553, 200: 0.75, 300: 0.5}),
        ("linear", {0: 1, 75: 0.75, 300: 0}),
        ("half_linear", {0: 1, 75: 0.875, 300: 0.5}),
        ("cos2", {0: 1, 100: 0.956773, 200: 0.834565, 250: 0.75, 251: 0.1225, 299: 0.0025}),
        ("cos2_continuous", {0: 1, 100: 0.956773, 250: 0.75, 251: 0.735, 275: 0.375, 300: 0}),
    ],
)
def test_values_of_300_epochs(name, values):
    for step, expected in values.items():
        np.testing.assert_allclose(SCHEDULES[name](step, 300), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "given", "values"),
    [
        ("cosine", {"zeta": 2.0}, {0: 1, 150: 0.853553, 300: 0.5}),
        ("cosine", {"zeta": 4.0}, {300: 0.853553}),
        ("linear", {"zeta": 2.0}, {0: 1, 75: 0.875, 300: 0.5}),
        # EDC on CIFAR-100: the cosine's value at the knee is (1 + cos(75 degrees)) / 2.
        ("cos2", {"zeta": 2.0}, {0: 1, 150: 0.853553, 250: 0.629410, 251: 0.102804}),
        ("cos2_continuous", {"zeta": 2.0}, {250: 0.629410, 275: 0.314705, 300: 0}),
        # EDC on CIFAR-10: halved after 800, 900 and 950 of 1,000 epochs.
        ("multistep", {"milestones": (0.8, 0.9, 0.95), "gamma": 0.5},
         {0: 1, 239: 1, 240: 0.5, 269: 0.5, 270: 0.25, 285: 0.125, 299: 0.125}),
    ],
)  # fmt: skip
def test_values_of_schedules_with_values(name, given, values):
    assert set(given) == set(values_of(name))
    for step, expected in values.items():
        np.testing.assert_allclose(SCHEDULES[name](step, 300, **given), expected, atol=2e-6)


@pytest.mark.parametrize("total", [10, 20, 40, 300, 1000])
def test_milestones_are_on_the_right_side(total):
    given = {"milestones": (0.5, 0.8, 0.9), "gamma": 0.5}
    found = [float(SCHEDULES["multistep"](step, total, **given)) for step in range(total)]
    marks = [total * m for m in (5, 8, 9)]  # in tenths of a step
    assert found == [0.5 ** sum(10 * step >= mark for mark in marks) for step in range(total)]


def test_a_warm_up_by_hand():
    """Tiny-ImageNet of DWA: five epochs from 0.01, then a cosine over the 195 that follow."""
    how = {"warmup": 5, "warmup_start": 0.01}
    rate = [float(warmed_up("cosine", s, 200, **how)) for s in range(200)]
    np.testing.assert_allclose(rate[:7], [0.01, 0.208, 0.406, 0.604, 0.802, 1, 0.999935], atol=1e-6)
    expected = [0.5 * (1 + math.cos(math.pi * (s - 5) / 195)) for s in range(5, 200)]
    np.testing.assert_allclose(rate[5:], expected, atol=1e-6)
    # Twin: a cosine over all 200 epochs.
    assert abs(rate[100] - float(SCHEDULES["cosine"](100, 200))) > 0.01
    none = warmed_up("cos2", 251, 300, warmup=0, warmup_start=0.01, zeta=2.5)
    assert none == SCHEDULES["cos2"](251, 300)


def test_warm_up_and_milestones_are_pytorchs():
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    lr = torch.optim.lr_scheduler

    def theirs(make, epochs):
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler, found = make(optimiser), []
        for _ in range(epochs):
            found.append(scheduler.get_last_lr()[0])
            optimiser.step()
            scheduler.step()
        return found

    def warm_cosine(optimiser):
        warm = lr.LinearLR(optimiser, start_factor=0.01, total_iters=5)
        cosine = lr.CosineAnnealingLR(optimiser, T_max=35)
        return lr.SequentialLR(optimiser, [warm, cosine], milestones=[5])

    ours = [warmed_up("cosine", s, 40, warmup=5, warmup_start=0.01) for s in range(40)]
    np.testing.assert_allclose(ours, theirs(warm_cosine, 40), atol=1e-6)
    steps = {"milestones": (0.8, 0.9, 0.95), "gamma": 0.5}
    ours = [SCHEDULES["multistep"](s, 40, **steps) for s in range(40)]
    expected = theirs(lambda o: lr.MultiStepLR(o, [32, 36, 38], gamma=0.5), 40)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def cos2_in_exact_arithmetic(s: int, total: int) -> float:
    if 6 * s <= 5 * total:
        return 0.5 * (1 + math.cos(math.pi * s / (2.5 * total)))
    return 0.75 * (6 * total - 6 * s) / (6 * total)


@pytest.mark.parametrize("total", [6, 30, 90, 100, 180, 300, 400, 1000, 1200])
def test_the_knee_of_cos2_is_on_the_right_side(total):
    steps = np.arange(total)
    values = jax.vmap(SCHEDULES["cos2"], (0, None))(jnp.asarray(steps, jnp.int32), total)
    expected = [cos2_in_exact_arithmetic(int(s), total) for s in steps]
    np.testing.assert_allclose(values, expected, atol=2e-6)


def test_cos2_jumps_sixfold_and_its_continuous_twin_does_not():
    jump = {
        name: float(SCHEDULES[name](250, 300) / SCHEDULES[name](251, 300))
        for name in ("cos2", "cos2_continuous")
    }
    np.testing.assert_allclose(jump["cos2"], 0.75 / 0.1225, rtol=1e-5)
    np.testing.assert_allclose(jump["cos2_continuous"], 0.75 / 0.735, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_schedule_starts_at_one_falls_and_stays_in_the_unit_interval(name):
    steps = jnp.arange(301, dtype=jnp.int32)
    values = jax.vmap(SCHEDULES[name], (0, None))(steps, jnp.int32(300))
    assert values.dtype == jnp.float32
    assert values[0] == 1
    assert (np.diff(values) <= 1e-7).all()
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_traced_steps_and_x64_change_nothing(name):
    eager = [np.asarray(SCHEDULES[name](s, 300)) for s in (0, 7, 250, 251)]
    jitted = jax.jit(SCHEDULES[name])
    np.testing.assert_allclose([jitted(s, 300) for s in (0, 7, 250, 251)], eager, atol=1e-7)
    with jax.enable_x64(True):
        wide = SCHEDULES[name](jnp.int64(7), 300)
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(wide, eager[1])


def test_budgets_by_hand():
    slots = range(10)
    assert [BUDGETS["constant"](4000, s) for s in slots] == [4000] * 10
    official = [4000, 3500, 3000, 2500, 2000, 1500, 1000, 500, 4000, 3500]
    assert [BUDGETS["mod8"](4000, s) for s in slots] == official
    assert np.mean(official) == 2550
    assert [BUDGETS["mod8"](20, s) for s in slots] == [20, 18, 16, 14, 12, 10, 8, 6, 20, 18]
    assert min(BUDGETS["mod8"](n, s) for n in range(1, 40) for s in slots) >= 1


# --- crop curricula ---------------------------------------------------------------------------


def test_crop_curricula_by_hand():
    def at(name, *steps, milestone=1.0):
        values = [smallest_crop(name, 0.08, s, 4000, milestone=milestone) for s in steps]
        return np.asarray(values, np.float64)

    np.testing.assert_allclose(
        at("cosine", 0, 1000, 2000, 3000, 4000),
        [1.0, 0.08 + 0.46 * (1 + 2**-0.5), 0.54, 0.08 + 0.46 * (1 - 2**-0.5), 0.08],
        rtol=1e-6,
    )
    np.testing.assert_allclose(at("linear", 0, 1000, 3999), [1.0, 0.77, 0.08023], rtol=1e-5)
    np.testing.assert_allclose(at("step", 0, 3999, 4000), [1.0, 1.0, 0.08], rtol=1e-6)
    # Half of the run, then the smallest crop; by hand for the middle of that half.
    np.testing.assert_allclose(
        at("cosine", 0, 1000, 1999, 2000, 3999, milestone=0.5),
        [1.0, 0.54, 0.08 + 0.46 * (1 + math.cos(math.pi * 1999 / 2000)), 0.08, 0.08],
        rtol=1e-5,
    )
    over_the_whole_run = at("cosine", 1000, milestone=1.0)  # twin
    assert abs(over_the_whole_run[0] - at("cosine", 1000, milestone=0.5)[0]) > 0.3


def test_a_curriculum_that_is_over_at_once_is_the_constant_itself():
    assert smallest_crop("cosine", 0.08, jnp.int32(3), 10, milestone=0.0) == 0.08
    assert smallest_crop("constant", 0.08, jnp.int32(3), 10, milestone=1.0) == 0.08
    # Traced, and just before the milestone is passed, it is float32's 0.08 to the bit.
    late = jax.jit(lambda s: smallest_crop("cosine", 0.08, s, 10, milestone=0.5))(5)
    assert late == np.float32(0.08)


# --- early-late -------------------------------------------------------------------------------


def reference_rounds(slots: int, rounds: int) -> list[int]:
    """Slot by slot: the round in which it joins, then how many have joined."""
    sizes = [slots // rounds] * rounds
    for g in range(slots % rounds):
        sizes[g] += 1
    joins = [g for g, size in enumerate(sizes) for _ in range(size)]
    return [sum(j <= g for j in joins) for g in range(rounds)]


def test_slots_join_in_rounds():
    assert joined(10, 8) == (2, 4, 5, 6, 7, 8, 9, 10)
    assert joined(50, 8) == (7, 14, 20, 26, 32, 38, 44, 50)
    assert joined(1, 8) == (1,) * 8
    assert joined(10, 1) == (10,)
    for slots, rounds in ((10, 8), (50, 8), (7, 3), (3, 5), (100, 8)):
        assert list(joined(slots, rounds)) == reference_rounds(slots, rounds)
