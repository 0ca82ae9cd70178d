"""Who supervises what: the reference's distribution, and what a draw is shared by."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST
from helpers.networks import GREY, NoNorm, random_variables, small_pool
from helpers.running import make_unit

from prism_jax import rng, synthesis
from prism_jax.synthesis import sampling
from prism_jax.teachers import TeacherPool

DRAWS = 4000


def draws(sampler, size: int, primary: int, count: int = DRAWS, well: bool = False):
    """(count, T) weights."""
    keys = jax.random.split(rng.root(11), count)
    roles, place = sampling.Roles(size, primary), sampling.Place(np.int32(3), np.int32(8))
    options = None if well else FAST
    draw = jax.jit(jax.vmap(lambda k: sampler(k, place, roles)), compiler_options=options)
    return np.asarray(draw(keys))


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
    weights = draws(sampling.subset, size, primary)
    assert follows(expected_subsets(size, primary), weights)
    assert (weights[:, primary] > 0).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    shares = weights.max(1, keepdims=True)
    assert ((weights == shares) | (weights == 0)).all()  # the drawn ones count equally


def test_one_to_four_statistic_teachers_with_one_three_three_one_eighths():
    drawn = (draws(sampling.subset, 5, 0) > 0).sum(1)
    shares = np.bincount(drawn, minlength=5)[1:] / DRAWS
    np.testing.assert_allclose(shares, [1 / 8, 3 / 8, 3 / 8, 1 / 8], atol=0.03)


def with_replacement(key, place, roles):
    """Twin: three slots filled independently, so that a teacher can fill two."""
    fill, which = jax.random.split(key)
    filled = jax.random.bernoulli(fill, jnp.float32(0.5), (3,))
    other = jax.random.randint(which, (3,), 0, roles.size - 1, jnp.int32)
    other += other >= roles.primary
    chosen = jnp.zeros((roles.size,), jnp.float32).at[other].max(filled.astype(jnp.float32))
    chosen = chosen.at[roles.primary].set(1.0)
    return chosen / chosen.sum()


def biased(probability):
    """Twin: slots filled with another probability."""

    def sampler(key, place, roles):
        return sampling.subset(key, place, dataclasses.replace(roles, probability=probability))

    return sampler


def each_other_alone(key, place, roles):
    """Twin: every other teacher tosses its own coin (more than three can come)."""
    chosen = jax.random.bernoulli(key, jnp.float32(0.5), (roles.size,)).astype(jnp.float32)
    chosen = chosen.at[roles.primary].set(1.0)
    return chosen / chosen.sum()


def test_the_check_itself_accepts_one_half_and_rejects_wrong_samplers():
    law = expected_subsets(5, 0)
    assert follows(law, draws(biased(0.5), 5, 0))
    for twin in (with_replacement, biased(0.4), biased(0.6), each_other_alone):
        assert not follows(law, draws(twin, 5, 0))


@functools.cache
def weighing(name, roles):
    def weights(key, *place):
        return sampling.SAMPLERS[name](rng.root(key), sampling.Place(*place), roles)

    return jax.jit(weights, compiler_options=FAST)


def weigh(name, *, slot=0, iteration=0, key=0, **roles) -> np.ndarray:
    weights = weighing(name, sampling.Roles(**roles))
    return np.asarray(weights(np.uint32(key), np.int32(slot), np.int32(iteration)))


def test_fixed_is_the_primary_alone_and_uniform_is_everybody():
    np.testing.assert_array_equal(weigh("fixed", size=4, primary=2), [0, 0, 1, 0])
    np.testing.assert_array_equal(weigh("uniform", size=4, primary=2), [0.25] * 4)


def test_exactly_so_many_others_where_the_probability_is_one():
    drawn = [
        weigh("subset", key=k, size=6, primary=1, others=2, probability=1.0) for k in range(40)
    ]
    assert {(w > 0).sum() for w in drawn} == {3}
    assert all(w[1] > 0 for w in drawn) and len({tuple(w > 0) for w in drawn}) == 10


def test_round_robin_takes_turns_in_order():
    turns = [weigh("round_robin", size=4, iteration=i).argmax() for i in range(10)]
    assert turns == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert (weigh("round_robin", size=4, iteration=4000 * 12_500 + 3) == [0, 0, 0, 1]).all()


# Prior accuracies of ResNet-18, -50, ShuffleNetV2, MobileNetV2, DenseNet-121 on ImageNet-1K, and
# the votes of every pair, from CV-DD's code and formula (section A.3 of its description).
PRIORS = (56.4, 42.3, 52.5, 44.2, 40.6)
VOTES = {
    (0, 1): (0.944, 0.056), (0, 2): (0.686, 0.314), (0, 3): (0.920, 0.080), (0, 4): (0.959, 0.041),
    (1, 2): (0.115, 0.885), (1, 3): (0.406, 0.594), (1, 4): (0.584, 0.416), (2, 3): (0.840, 0.160),
    (2, 4): (0.915, 0.085), (3, 4): (0.673, 0.327),
}  # fmt: skip


def test_a_listed_committee_goes_through_all_pairs_and_votes_with_its_priors():
    for slot, (pair, votes) in enumerate(VOTES.items()):
        expected = np.zeros(5)
        expected[list(pair)] = votes
        for turn in (slot, slot + 10):
            found = weigh("committee", slot=turn, size=5, committee="listed", priors=PRIORS)
            np.testing.assert_allclose(found, expected, atol=6e-4)
        warmer = weigh("committee", slot=slot, size=5, committee="listed", priors=PRIORS,
                       temperature=10.0)  # fmt: skip
        assert np.abs(warmer - expected).max() > 0.02  # twin: the label ensemble's temperature


def test_other_committees():
    best = weigh("committee", slot=7, size=5, committee="best", priors=PRIORS)
    np.testing.assert_allclose(best, [0.686, 0, 0.314, 0, 0], atol=6e-4)
    equal = weigh("committee", slot=1, size=3, committee="listed")
    np.testing.assert_array_equal(equal, [0.5, 0, 0.5])
    drawn = draws(sampling.committee, 4, 0) > 0
    pairs, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(pairs) == 6 and (pairs.sum(1) == 2).all()
    np.testing.assert_allclose(counts / DRAWS, 1 / 6, atol=0.03)
    np.testing.assert_array_equal(weigh("committee", size=1), [1])


@pytest.mark.parametrize("sampler", sampling.SAMPLERS.values(), ids=sampling.SAMPLERS)
def test_x64_mode_changes_no_draw(sampler):
    plain = draws(sampler, 6, 2, count=200, well=True)
    with jax.enable_x64(True):
        wide = draws(sampler, 6, 2, count=200, well=True)
    assert plain.dtype == wide.dtype == np.float32
    np.testing.assert_array_equal(plain, wide)


# --- granularity: which coordinates a draw has ------------------------------------------------

SLOTS, BLOCKS, STEPS = 24, 6, 6


@functools.cache
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
    flat = jax.jit(jax.vmap(draw), compiler_options=FAST)(*(axis.ravel() for axis in grid))
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


def test_what_was_drawn_for_another_unit_is_found_by_the_same_program(compilations):
    recipe, teachers = synthesis.Recipe(granularity="per_iteration"), small_pool(4).teachers
    shares = [synthesis.drawn_share(recipe, teachers, 9, make_unit(0, 0, 30))]
    before = len(compilations)
    shares += [synthesis.drawn_share(recipe, teachers, 8, make_unit(i, 2, 30)) for i in range(3)]
    assert len(compilations) == before > 0 and len({share.tobytes() for share in shares}) > 1


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
    subset = jax.jit(lambda slot: sampling.subset(
        rng.stream(rng.root(0), "recover/draw/per_slot", slot), None, sampling.Roles(3)
    ))  # fmt: skip
    engine_draw = jax.jit(
        lambda unit: synthesis.draw_teachers(recipe, teachers, rng.root(0), unit, np.int32(0))
    )
    for slot in range(20):
        unit = make_unit(slot, 0, 10)
        drawn = np.flatnonzero(subset(np.int32(slot)))
        draw = engine_draw(unit)
        real = [t for t in drawn if t != 2]
        expected = np.zeros(3)
        expected[real] = 1 / (len(drawn) if count_no_bn else len(real))
        np.testing.assert_allclose(draw.statistic_weights_T, expected, rtol=1e-6)
        seen.add(tuple(drawn.tolist()))
    assert len(seen) == 4  # every subset came


def test_the_statistics_have_a_primary_of_their_own():
    """Logits by the first, statistics by the third alone, or by it and some others."""
    pool = small_pool(3)
    unit = make_unit(0, 0, 20)

    def drawn(**fields):
        recipe = synthesis.Recipe(statistic_primary=2, **fields)
        draws = [
            synthesis.draw_teachers(recipe, pool.teachers, rng.root(seed), unit, np.int32(0))
            for seed in range(8)
        ]
        return tuple(np.stack(found) for found in zip(*draws, strict=True))

    logits, statistics = drawn(statistics_by="fixed")
    assert (logits == [1, 0, 0]).all() and (statistics == [0, 0, 1]).all()
    logits, statistics = drawn()
    assert (logits == [1, 0, 0]).all() and (statistics[:, 2] > 0).all()
    assert (statistics[:, 0] == 0).any()  # the primary of the logits is one of the others here


def test_a_centred_roll_is_one_of_twice_the_range_shifted_back():
    unit, key, seen = make_unit(1, 2, 20), rng.root(3), set()
    for step in map(np.int32, range(20)):
        centred = synthesis.view_of(
            synthesis.Recipe(roll=2, roll_centred=True), key, unit, step, (8, 8)
        )
        twice = synthesis.view_of(synthesis.Recipe(roll=4), key, unit, step, (8, 8))
        np.testing.assert_array_equal(np.asarray(centred.roll) + 2, twice.roll)
        rest = (centred._replace(roll=0), twice._replace(roll=0))
        jax.tree.map(np.testing.assert_array_equal, *rest)
        seen |= {*np.asarray(centred.roll).tolist()}
    assert seen == {-2, -1, 0, 1, 2}
