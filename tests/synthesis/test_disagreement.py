"""Teachers' gradients and the noise of drawing them, against direct differentiation and draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import only_fast_programs
from helpers.networks import GREY, NoNorm, random_variables, small_pool
from helpers.running import make_unit

from prism_jax import rng, synthesis
from prism_jax.core import losses, statistics, views
from prism_jax.synthesis import disagreement
from prism_jax.teachers import TeacherPool

__all__ = ["only_fast_programs"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_programs")

RECIPE = synthesis.Recipe(roll=1, subset_others=2)
STEP, SEED = np.int32(3), np.uint32(7)


@pytest.fixture(scope="module")
def case():
    pool = small_pool(3)
    images = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    unit = make_unit(1, 0, 10)
    found = jax.jit(
        lambda variables: disagreement.pixel_gradients(
            RECIPE, pool.teachers, GREY, variables, SEED, unit, STEP, images
        )
    )(pool.variables)
    return pool, images, unit, found


def test_their_weighted_sum_is_the_gradient_of_the_loss(case):
    pool, images, unit, found = case
    view = synthesis.view_of(RECIPE, rng.root(SEED), unit, STEP, (8, 8))
    weights = (0.5, 0.2, 0.3)

    def loss(images):
        seen, total = views.apply_view(images, view), 0.0
        for t, (teacher, variables) in enumerate(zip(pool.teachers, pool.variables, strict=True)):
            reading = teacher.read(variables, seen, GREY, statistics=True)
            far = statistics.alignment(
                statistics.by_layer(reading.statistics),
                statistics.by_layer(variables["batch_stats"]),
                first=teacher.first_bn, first_multiplier=10.0, variance_weight=1.0,
            )  # fmt: skip
            total += 0.01 * weights[t] * far
            total += losses.cross_entropy(reading.logits_BK, unit.labels_B) * (t == 0)
        return total

    directly = jax.jit(jax.grad(loss))(jnp.asarray(images))
    summed = found.ce_TBHWC[0] + 0.01 * sum(
        w * g for w, g in zip(weights, found.bn_TBHWC, strict=True)
    )
    np.testing.assert_allclose(summed, directly, rtol=2e-4, atol=1e-5)
    # Twin: another iteration's view.
    view = synthesis.view_of(RECIPE, rng.root(SEED), unit, STEP + 1, (8, 8))
    other = jax.jit(jax.grad(loss))(jnp.asarray(images))
    assert np.abs(other - directly).max() > 1e-2


def test_a_teacher_without_statistics_has_no_gradient_of_them():
    module = NoNorm()
    pool = TeacherPool.of(
        {"plain": (module, random_variables(module, (8, 8, 1), 0))},
        image_shape=(8, 8, 1), normalisation=GREY,
    )  # fmt: skip
    found = jax.jit(
        lambda images: disagreement.pixel_gradients(
            RECIPE, pool.teachers, GREY, pool.variables, SEED, make_unit(1, 0, 10), STEP, images
        )
    )(jnp.ones((3, 8, 8, 1)))
    assert not found.bn_TBHWC.any() and np.abs(found.ce_TBHWC).max() > 0


def test_weights_are_those_that_slots_draw(case):
    pool, _, unit, _ = case
    weights = disagreement.drawn_weights(RECIPE, pool.teachers, 7, unit, 64)

    @jax.jit
    def one(slot):
        where = unit._replace(slot=slot)
        return synthesis.draw_teachers(RECIPE, pool.teachers, rng.root(SEED), where, np.int32(0))

    for slot in (0, 5, 63):
        np.testing.assert_array_equal(weights[slot], one(np.int32(slot)).statistic_weights_T)
    assert weights.sum(1) == pytest.approx(1.0) and len(np.unique(weights, axis=0)) == 4


def test_cosines_by_hand():
    found = disagreement.cosines(np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found[:2, :2], [[1, 0.5**0.5], [0.5**0.5, 1]])
    assert not found[2].any()  # no gradient, no angle


def test_noise_and_change_are_those_of_the_draws_one_by_one():
    draw = np.random.default_rng(1)
    bn, other_bn = draw.standard_normal((2, 3, 20))
    ce, other_ce = draw.standard_normal((2, 20))
    weights, alphas = draw.dirichlet(np.ones(3), 50), np.array([0.01, 1.0, 5.0])
    found = disagreement.noise_and_change((ce, bn), (other_ce, other_bn), weights, alphas)
    for i, alpha in enumerate(alphas):
        ours = np.stack([ce + alpha * b @ bn for b in weights])
        theirs = np.stack([other_ce + alpha * b @ other_bn for b in weights])
        change = theirs.mean(0) - ours.mean(0)
        around = ours - ours.mean(0)
        assert found.change_A[i] == pytest.approx(np.linalg.norm(change))
        assert found.noise_A[i] == pytest.approx((around**2).sum(1).mean() ** 0.5)
        along = around @ change / np.linalg.norm(change)
        assert found.along_A[i] == pytest.approx((along**2).mean() ** 0.5)
        # Twin: a draw that never varies makes no noise.
        still = disagreement.noise_and_change(
            (ce, bn), (other_ce, other_bn), weights[:1].repeat(9, 0), alphas
        )
        assert still.noise_A[i] == pytest.approx(0.0, abs=1e-9) and found.noise_A[i] > 1e-3
