"""Who supervises what: the reference's distribution, and what a draw is shared by."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import GREY, NoNorm, random_variables, small_pool
from helpers.running import make_unit

from prism_jax import rng, sampling, synthesis
from prism_jax.teachers import TeacherPool

DRAWS = 4000


def draws(sampler, size: int, primary: int, count: int = DRAWS):
    """(count, T) logit and statistic weights."""
    keys = jax.random.split(rng.root(11), count)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda k: sampler(k, size, primary)))(keys))


def expected_subsets(size: int, primary: int) -> dict[frozenset[int], float]:
    """The reference's law: n ~ Binomial(min(3, others), 1/2), then a uniform subset of n others."""
    others = [t for t in range(size) if t != primary]
    slots = min(3, len(others))
    law = {}
    for n in range(slots + 1):
        choices = list(itertools.combinations(others, n))
        binomial = len(list(itertools.combinations(range(slots), n))) / 2**slots
        for choice in choices:
            law[frozenset({primary, *choice})] = binomial / len(choices)
    return law


def follows(law: dict[frozenset[int], float], weights_NT: np.ndarray) -> bool:
    """Whether draws pass a chi-square test: at the fixed seed, six deviations from the mean."""
    size = weights_NT.shape[1]
    found = np.bincount((weights_NT > 0) @ 2 ** np.arange(size), minlength=2**size)
    expected = np.zeros(2**size)
    for subset, probability in law.items():
        expected[sum(2**t for t in subset)] = probability * len(weights_NT)
    allowed = expected > 0
    if found[~allowed].any():
        return False
    chi_square = ((found - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = len(law) - 1
    return chi_square <= freedom + 6 * np.sqrt(2 * freedom)


@pytest.mark.parametrize(("size", "primary"), [(1, 0), (2, 1), (3, 1), (4, 0), (5, 0), (6, 4)])
def test_subsets_follow_the_reference(size, primary):
    draw = draws(sampling.subset, size, primary)
    weights = draw.statistic_weights_T
    assert follows(expected_subsets(size, primary), weights)
    assert (weights[:, primary] > 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    shares = weights.max(1, keepdims=True)
    assert ((weights == shares) | (weights == 0)).all()  # the drawn ones count equally
    only_primary = np.eye(size, dtype=np.float32)[primary]
    np.testing.assert_array_equal(draw.logit_weights_T, np.tile(only_primary, (DRAWS, 1)))


def test_one_to_four_statistic_teachers_with_one_three_three_one_eighths():
    drawn = (draws(sampling.subset, 5, 0).statistic_weights_T > 0).sum(1)
    shares = np.bincount(drawn, minlength=5)[1:] / DRAWS
    np.testing.assert_allclose(shares, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.03)


def with_replacement(key, size, primary):
    """Twin: three slots filled independently, so that a teacher can fill two."""
    fill, which = jax.random.split(key)
    filled = jax.random.bernoulli(fill, jnp.float32(0.5), (3,))
    other = jax.random.randint(which, (3,), 0, size - 1, jnp.int32)
    other += other >= primary
    chosen = jnp.zeros((size,), jnp.float32).at[other].max(filled.astype(jnp.float32))
    chosen = chosen.at[primary].set(1.0)
    return sampling.Draw(chosen, chosen / chosen.sum())


def biased(probability):
    """Twin: slots filled with another probability."""

    def sampler(key, size, primary):
        count_key, order_key = jax.random.split(key)
        filled = jax.random.bernoulli(count_key, jnp.float32(probability), (3,)).sum()
        order = jnp.argsort(jnp.argsort(jax.random.uniform(order_key, (size - 1,), "float32")))
        chosen = jnp.insert((order < filled).astype(jnp.float32), primary, 1.0)
        return sampling.Draw(chosen, chosen / chosen.sum())

    return sampler


def each_other_alone(key, size, primary):
    """Twin: every other teacher tosses its own coin (more than three can come)."""
    chosen = jax.random.bernoulli(key, jnp.float32(0.5), (size,)).astype(jnp.float32)
    chosen = chosen.at[primary].set(1.0)
    return sampling.Draw(chosen, chosen / chosen.sum())


def test_the_check_itself_accepts_one_half_and_rejects_wrong_samplers():
    law = expected_subsets(5, 0)
    assert follows(law, draws(biased(0.5), 5, 0).statistic_weights_T)
    for twin in (with_replacement, biased(0.4), biased(0.6), each_other_alone):
        assert not follows(law, draws(twin, 5, 0).statistic_weights_T)


def test_fixed_is_the_primary_alone():
    draw = sampling.fixed(rng.root(0), 4, 2)
    np.testing.assert_array_equal(draw.logit_weights_T, [0, 0, 1, 0])
    np.testing.assert_array_equal(draw.statistic_weights_T, [0, 0, 1, 0])


@pytest.mark.parametrize("sampler", sampling.SAMPLERS.values(), ids=sampling.SAMPLERS)
def test_x64_mode_changes_no_draw(sampler):
    plain = draws(sampler, 6, 2, count=200)
    with jax.enable_x64(True):
        wide = draws(sampler, 6, 2, count=200)
    for a, b in zip(plain, wide, strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_array_equal(a, b)


# --- granularity: which coordinates a draw has ------------------------------------------------

SLOTS, BLOCKS, STEPS = 24, 6, 6


def table(granularity: str) -> np.ndarray:
    """Statistic weights by (slot, block, step, teacher)."""
    recipe = synthesis.Recipe(granularity=granularity)
    teachers = small_pool(4).teachers

    def draw(slot, block, step):
        unit = make_unit(0, 0, 100)._replace(slot=slot, block=block)
        return synthesis.draw_teachers(recipe, teachers, rng.root(0), unit, step)

    grid = np.meshgrid(
        *(np.arange(n, dtype=np.int32) for n in (SLOTS, BLOCKS, STEPS)), indexing="ij"
    )
    flat = jax.jit(jax.vmap(draw))(*(axis.ravel() for axis in grid))
    return np.asarray(flat.statistic_weights_T).reshape(SLOTS, BLOCKS, STEPS, 4)


def constant_along(array: np.ndarray, axis: int) -> bool:
    return bool((array == np.take(array, [0], axis)).all())


@pytest.mark.parametrize(
    ("granularity", "shared"),
    [("per_slot", (1, 2)), ("per_batch", (2,)), ("per_iteration", ())],
)
def test_a_draw_is_shared_by_exactly_what_the_granularity_says(granularity, shared):
    weights = table(granularity)
    for axis in range(3):
        assert constant_along(weights, axis) == (axis in shared)


def test_granularities_draw_from_one_law():
    for granularity in ("per_slot", "per_batch", "per_iteration"):
        weights = table(granularity)
        distinct = weights[:, :1, :1] if granularity == "per_slot" else weights
        mean = (distinct > 0).mean((0, 1, 2))
        assert mean[0] == 1
        np.testing.assert_allclose(mean[1:], 0.5, atol=0.3 if granularity == "per_slot" else 0.15)


def test_drawn_share_counts_the_iterations_of_a_unit():
    recipe = synthesis.Recipe(granularity="per_iteration")
    teachers, unit = small_pool(4).teachers, make_unit(1, 2, 40)
    share = synthesis.drawn_share(recipe, teachers, 9, unit)
    draw = jax.jit(lambda s: synthesis.draw_teachers(recipe, teachers, rng.root(9), unit, s))
    drawn = [np.asarray(draw(np.int32(s)).statistic_weights_T) > 0 for s in range(40)]
    np.testing.assert_array_equal(share, np.mean(drawn, 0))
    assert share[0] == 1 and 0 < share[1] < 1


# --- a teacher without BatchNorm --------------------------------------------------------------


@pytest.fixture(scope="module")
def with_alexnet() -> TeacherPool:
    """Two teachers with BatchNorm and one without."""
    pool = small_pool(2)
    shape = (8, 8, 1)
    plain = NoNorm()
    members = {
        name: (teacher.module, variables)
        for name, teacher, variables in zip(pool.names, pool.teachers, pool.variables, strict=True)
    }
    members["plain"] = plain, random_variables(plain, shape, 9)
    return TeacherPool.of(members, image_shape=shape, normalisation=GREY)


@pytest.mark.parametrize("count_no_bn", [False, True])
def test_a_teacher_without_batch_norm_counts_in_the_mean_only_if_asked(with_alexnet, count_no_bn):
    recipe = synthesis.Recipe(count_no_bn=count_no_bn)
    teachers = with_alexnet.teachers
    assert [t.has_batch_norm for t in teachers] == [True, True, False]
    seen = set()
    engine_draw = jax.jit(
        lambda unit: synthesis.draw_teachers(recipe, teachers, rng.root(0), unit, np.int32(0))
    )
    for slot in range(20):
        unit = make_unit(slot, 0, 10)
        key = rng.stream(rng.root(0), "recover/draw/per_slot", slot)
        drawn = np.flatnonzero(sampling.subset(key, 3, 0).statistic_weights_T)
        draw = engine_draw(unit)
        real = [t for t in drawn if t != 2]
        expected = np.zeros(3)
        expected[real] = 1 / (len(drawn) if count_no_bn else len(real))
        np.testing.assert_allclose(draw.statistic_weights_T, expected, rtol=1e-6)
        seen.add(tuple(drawn.tolist()))
    assert len(seen) == 4  # every subset came
