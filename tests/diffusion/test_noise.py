"""Noise schedules, predictions, and what each refuses."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.diffusion import noise
from prism_jax.diffusion.noise import COSINE, DIT, STABLE_DIFFUSION, Schedule
from prism_jax.errors import UserError


def product(name: str, first: float, last: float, until: int) -> float:
    """Signal left after the trained step ``until``, term by term."""
    left = 1.0
    for t in range(until + 1):
        at = t / 999
        beta = first + at * (last - first)
        if name == "scaled_linear":
            beta = (math.sqrt(first) + at * (math.sqrt(last) - math.sqrt(first))) ** 2
        left *= 1 - beta
    return left


@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, DIT])
def test_levels_are_products_of_betas(schedule):
    at = np.array([0, 1, 500, 999])
    alpha, sigma = noise.levels(schedule, at)
    expected = [product(schedule.name, schedule.first, schedule.last, t) for t in at]
    np.testing.assert_allclose(alpha**2, expected, rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)
    traced = noise.levels(schedule, jnp.asarray(at))
    np.testing.assert_allclose(traced[0], alpha, rtol=1e-6)
    np.testing.assert_allclose(traced[1], sigma, rtol=1e-6)


def test_stable_diffusion_ends_at_its_known_signal():
    # The published scheduler's last cumulative product.
    np.testing.assert_allclose(
        noise.levels(STABLE_DIFFUSION, np.array(999))[0] ** 2, 0.00466, atol=5e-6
    )


def test_the_cosine_is_an_angle():
    alpha, sigma = noise.levels(COSINE, np.array([0.0, 0.5, 1.0]))
    angles = [0.002, 0.9975 * math.pi / 4 + 0.002, 0.9975 * math.pi / 2 + 0.002]
    np.testing.assert_allclose(sigma / alpha, np.tan(angles))


@pytest.mark.parametrize("schedule, times", [
    (STABLE_DIFFUSION, [981, 961, 941, 1]),
    (dataclasses.replace(STABLE_DIFFUSION, spacing="trailing"), [999, 979, 959, 19]),
    (DIT, [999, 979, 958, 0]),  # 999, 978.6, 958.2: evenly, each rounded
    (COSINE, [1.0, 0.98, 0.96, 0.02]),
])  # fmt: skip
def test_fifty_steps(schedule, times):
    grid = noise.grid(schedule, 50)
    assert len(grid.time_S) == 50 and len(grid.alpha_N) == 51
    np.testing.assert_allclose(grid.time_S[[0, 1, 2, -1]], times)
    assert (np.diff(grid.alpha_N) > 0).all()
    assert (grid.alpha_N[-1] == 1) == schedule.ends_clean


def test_a_grid_that_does_not_end_clean_ends_at_the_first_trained_step():
    assert noise.grid(STABLE_DIFFUSION, 50).alpha_N[-1] ** 2 == pytest.approx(1 - 0.00085)


@pytest.mark.parametrize("prediction", noise.PREDICTIONS)
def test_a_right_prediction_gives_back_what_was_mixed(prediction):
    clean, added = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    alpha, sigma = np.float32(0.6), np.float32(0.8)
    noisy = alpha * clean + sigma * added
    kind = noise.PREDICTIONS[prediction]
    found = kind.estimate(noisy, kind.target(clean, added, alpha, sigma), alpha, sigma)
    np.testing.assert_allclose(found.clean, clean, atol=1e-6)
    np.testing.assert_allclose(found.noise, added, atol=1e-6)
    other = next(k for name, k in noise.PREDICTIONS.items() if name != prediction)
    twin = other.estimate(noisy, kind.target(clean, added, alpha, sigma), alpha, sigma)
    assert np.abs(twin.clean - clean).max() > 0.1


def test_v_by_hand():
    # 0.6 * 2 + 0.8 * 1 = 2 and v = 0.6 * 1 - 0.8 * 2 = -1
    found = noise.from_v(2.0, -1.0, 0.6, 0.8)
    assert found.clean == pytest.approx(2.0) and found.noise == pytest.approx(1.0)


def test_bounds_clip_the_clean_latent_and_the_noise_explains_the_rest():
    noisy, alpha, sigma = np.full((1, 1, 1, 2), 2.0), 0.6, 0.8
    bounds = noise.Bounds(np.array([-1.0, -1.0]), np.array([1.0, 3.0]))
    found = noise.within(bounds, noise.Estimate(noisy, noisy), noisy, alpha, sigma)
    np.testing.assert_allclose(found.clean.ravel(), [1.0, 2.0])
    np.testing.assert_allclose(found.noise.ravel(), [(2 - 0.6) / 0.8, (2 - 1.2) / 0.8])


@pytest.mark.parametrize("schedule, steps, said", [
    (Schedule(name="quadratic"), 50, "scaled_linear, linear, cosine"),
    (Schedule(spacing="random"), 50, "leading, trailing, even"),
    (Schedule(prediction="x"), 50, "epsilon, v"),
    (Schedule(), 0, "at least one"),
    (Schedule(), 1001, "at most 1000"),
    (Schedule(), 1000, "offset 0"),
])  # fmt: skip
def test_refused(schedule, steps, said):
    with pytest.raises(UserError, match=said):
        noise.grid(schedule, steps)
