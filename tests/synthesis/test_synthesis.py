"""The objective against NumPy, what an undrawn teacher contributes, and one program for all."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import by_hand
from helpers.compiling import fast_alike, fast_programs, only_fast_alike
from helpers.networks import COLOUR, GREY, NoNorm, TwoConvs, random_variables, small_pool
from helpers.running import advance, begin, images_of, make_unit

import prism_jax
from prism_jax import rng, synthesis
from prism_jax.core import statistics, views
from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.synthesis import Recipe, course, sampling
from prism_jax.teachers import TeacherPool
from prism_jax.types import Draw

__all__ = ["fast_alike", "fast_programs", "only_fast_alike"]  # fixtures
pytestmark = pytest.mark.usefixtures("only_fast_alike")

SHAPE, BATCH, POOL = (8, 8, 3), 3, 3
LABELS = np.array([4, 0, 2], np.int32)
SEED, STEP, BUDGET = 5, 3, 10  # neither the first nor the last step, at which all are read


def colour_pool() -> TeacherPool:
    with jax.enable_x64(True):
        return small_pool(POOL, image_shape=SHAPE, normalisation=COLOUR, dtype=np.float64)


def draws(recipe, teachers, slots) -> list[Draw]:
    """What the engine draws for each slot, at ``STEP``."""

    def draw(unit):
        return synthesis.draw_teachers(recipe, teachers, rng.root(SEED), unit, np.int32(STEP))

    units = jax.tree.map(lambda *x: np.stack(x), *(make_unit(s, 0, BUDGET) for s in slots))
    table = jax.device_get(jax.jit(jax.vmap(draw))(units))
    return [Draw(*row) for row in zip(*table, strict=True)]


def slots_of_every_subset(recipe, teachers) -> dict[tuple[int, ...], int]:
    """A slot that draws each subset."""
    found = {}
    for slot, draw in enumerate(draws(recipe, teachers, range(40))):
        found.setdefault(tuple(np.flatnonzero(draw.statistic_weights_T).tolist()), slot)
    return found


def engine_says(step, pool, recipe, slot):
    """Loss, terms and gradient of one jitted ``synthesis_step`` from random float64 images."""
    images = np.random.default_rng(slot).standard_normal((BATCH, *SHAPE))
    state = synthesis.initial_state(pool, recipe, images)._replace(step=np.int32(STEP))
    unit = make_unit(slot, 0, BUDGET, LABELS)
    after, terms = jax.device_get(step(pool.variables, np.uint32(SEED), unit, state))
    gradient = after.opt_state.mu / (1 - recipe.betas[0])  # Adam's first moment started at zero
    return images, terms, gradient


@functools.partial(jax.jit, static_argnums=0)
def view_of(recipe, slot, step):
    key = rng.stream(rng.root(SEED), "recover/view", slot, np.int32(0), step)
    return views.sample_view(
        key, SHAPE[:2], crop_scale=(recipe.crop_min, 1.0), flip=recipe.flip, roll=recipe.roll
    )


def numpy_says(pool, recipe, slot, images, drawn):
    view = view_of(recipe, np.int32(slot), np.int32(STEP))
    return by_hand.objective(
        pool.variables, images, LABELS, jax.device_get(view),
        primary=recipe.primary, drawn=drawn, alpha=recipe.alpha_bn,
        first_multiplier=recipe.first_bn_multiplier,
    )  # fmt: skip


def disagreement(pool, recipe) -> dict[str, float]:
    """The largest relative difference between engine and NumPy over all subsets, per quantity."""
    worst: dict[str, float] = {}
    with jax.enable_x64(True):
        step = jax.jit(
            functools.partial(synthesis.synthesis_step, recipe, pool.teachers, pool.normalisation)
        )
        honest = dataclasses.replace(recipe, logits_by=None, statistics_by=None)
        subsets = slots_of_every_subset(honest, pool.teachers)
        assert len(subsets) == 2 ** (len(pool) - 1)
        for drawn, slot in subsets.items():
            images, terms, gradient = engine_says(step, pool, recipe, slot)
            assert gradient.dtype == np.float64
            loss, read, by_pixel = numpy_says(pool, recipe, slot, images, drawn)

            def note(name, engine, expected):
                expected = np.asarray(expected)
                off = np.abs(np.asarray(engine) - expected).max() / np.abs(expected).max()
                worst[name] = max(worst.get(name, 0.0), float(off))

            note("loss", terms.loss, loss)
            note("gradient", gradient, by_pixel)
            note("cross entropy", terms.ce_T[recipe.primary], read[recipe.primary].ce)
            for t in drawn:
                note("alignment", terms.bn_T[t], read[t].bn)
    return worst


# alpha is large, so that no error of the alignment hides behind the cross entropy, and exact in
# float32, in which weights are kept in any mode.
RECIPE = synthesis.Recipe(alpha_bn=0.25, roll=3)
TOLERANCE = 1e-10


def test_the_analytic_gradient_by_hand_is_its_own_central_difference():
    variables = random_variables(TwoConvs(), SHAPE, 0, np.float64)
    random = np.random.default_rng(1)
    images = random.standard_normal((BATCH, *SHAPE))
    view = (np.array([1, 2, 5, 4]), True, np.array([3, 1]))

    def loss(x):
        return by_hand.objective([variables], x, LABELS, view, primary=0, drawn=(0,), alpha=0.3)

    gradient = loss(images)[2]
    for _ in range(5):
        way = random.standard_normal(images.shape) * 1e-6
        slope = loss(images + way)[0] - loss(images - way)[0]
        np.testing.assert_allclose(slope / 2, (gradient * way).sum(), rtol=1e-6)


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("primary", range(POOL))
def test_loss_terms_and_pixel_gradient_equal_numpy_for_every_subset(primary):
    worst = disagreement(colour_pool(), dataclasses.replace(RECIPE, primary=primary))
    assert max(worst.values()) < TOLERANCE, worst


def without_primary(key, place, roles):
    others = sampling.subset(key, place, roles).at[roles.primary].set(0.0)
    return others / jnp.maximum(others.sum(), 1e-9)


def mean_over_pool(key, place, roles):
    return (sampling.subset(key, place, roles) > 0).astype("float32") / roles.size


def unbiased(moments):
    def twin(x_BHWC):
        mean_C, var_C = moments(x_BHWC)
        count = x_BHWC.size // x_BHWC.shape[-1]
        return mean_C, var_C * count / (count - 1)

    return twin


TWINS = ["unbiased", "squared", "another first layer", "no primary", "pool mean", "all logits"]


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("twin", TWINS)
def test_a_wrong_objective_does_not_pass(twin, monkeypatch):
    pool, recipe = colour_pool().select(["a", "b"]), RECIPE
    if twin == "unbiased":
        monkeypatch.setattr(layers, "moments", unbiased(layers.moments))
    elif twin == "squared":
        monkeypatch.setattr(statistics, "safe_norm", lambda x: (x * x).sum())
    elif twin == "another first layer":
        moved = tuple(dataclasses.replace(t, first_bn=("bn2",)) for t in pool.teachers)
        pool = dataclasses.replace(pool, teachers=moved)
    else:
        monkeypatch.setitem(sampling.SAMPLERS, "no primary", without_primary)
        monkeypatch.setitem(sampling.SAMPLERS, "pool mean", mean_over_pool)
        if twin == "all logits":
            recipe = dataclasses.replace(recipe, logits_by="subset")
        else:
            recipe = dataclasses.replace(recipe, statistics_by=twin)
    worst = disagreement(pool, recipe)
    assert worst["gradient"] > 1e3 * TOLERANCE
    assert worst["loss"] > 1e3 * TOLERANCE


# --- the teacher that is not drawn --------------------------------------------------------------


def poisoned(pool, t, factor):
    """The pool with one teacher's weights multiplied (NaN: made NaN)."""
    bad = jax.tree.map(lambda x: np.asarray(x * factor, x.dtype), pool.variables[t])
    return dataclasses.replace(
        pool, variables=tuple(bad if i == t else v for i, v in enumerate(pool.variables))
    )


def test_an_undrawn_teacher_contributes_exactly_nothing():
    pool, recipe = small_pool(POOL), synthesis.Recipe(roll=2)
    step = jax.jit(
        functools.partial(synthesis.synthesis_step, recipe, pool.teachers, pool.normalisation)
    )
    subsets = slots_of_every_subset(recipe, pool.teachers)
    bad = {(t, factor): poisoned(pool, t, factor) for t in range(POOL) for factor in (np.nan, 1.5)}
    # At both ends every teacher is read, for the log; in between it is not even run.
    for (drawn, slot), at in itertools.product(subsets.items(), (0, STEP, BUDGET - 1)):
        unit = make_unit(slot, 0, BUDGET)
        [state] = begin(pool, recipe, [unit])
        state = state._replace(step=np.int32(at))

        def run(pool, state=state, unit=unit):
            return jax.device_get(step(pool.variables, np.uint32(SEED), unit, state))

        clean = run(pool)[0].images_BHWC
        for (t, factor), other in bad.items():
            after, terms = run(other)
            assert np.array_equal(after.images_BHWC, clean) == (t not in drawn)
            if t not in drawn:
                assert np.isnan(terms.bn_T[t]) == (at == STEP or np.isnan(factor))
            assert np.isfinite(terms.loss) == (t not in drawn or factor == 1.5)


# --- one executable -----------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_programs")
def test_subsets_units_and_iteration_counts_are_one_compilation(compilations):
    pool = small_pool(POOL)
    recipe = synthesis.Recipe(granularity="per_iteration", roll=2)
    run = synthesis.engine(pool, recipe)
    subsets = set()

    def go(slot, block, budget, count):
        unit = make_unit(slot, block, budget, np.array([slot, block, 1]) % 5)
        [state] = begin(pool, recipe, [unit])
        [(_, report)] = run(slot, [(run.place(unit, 0), run.place(state, 0), run.place(count, 0))])
        drawn = run.fetch(report).last.draw.statistic_weights_T
        subsets.add(tuple(np.flatnonzero(drawn).tolist()))

    go(0, 0, 20, np.int32(3))
    compilations.clear()
    for slot in range(8):
        go(slot, slot % 3, 20 + slot, np.int32(slot + 1))
    assert len(subsets) == 4
    assert run.traces == 1
    assert not compilations

    # Twin: a count that is a constant of the program is a program per count.
    chunk = functools.partial(
        synthesis.synthesis_chunk, recipe, pool.teachers, pool.normalisation, pool.variables
    )
    unit = make_unit(0, 0, 20)
    [state] = begin(pool, recipe, [unit])
    static = jax.jit(lambda state, count: chunk(np.uint32(0), unit, state, count), static_argnums=1)
    compilations.clear()
    for count in (1, 2):
        static.lower(state, count)
    assert len(compilations) == 2


@pytest.mark.usefixtures("fast_programs")
def test_every_chunk_reports_its_first_and_last_iteration():
    pool, recipe = small_pool(2), synthesis.Recipe(granularity="per_iteration", roll=2)
    run, unit = synthesis.engine(pool, recipe), make_unit(0, 0, 6)
    lane, state = run.place(unit, 0), run.place(begin(pool, recipe, [unit])[0], 0)
    reports = []
    for _ in range(6):
        [(state, report)] = run(0, [(lane, state, run.place(np.int32(1), 0))])
        reports.append(run.fetch(report))
    state = run.place(begin(pool, recipe, [unit])[0], 0)
    [(_, whole)] = run(0, [(lane, state, run.place(np.int32(6), 0))])
    whole = run.fetch(whole)
    assert [int(r.last.step) for r in reports] == list(range(6))
    assert (int(whole.first.step), int(whole.last.step), int(whole.failed.step)) == (0, 5, -1)
    for name, single in (("first", reports[0]), ("last", reports[-1])):
        expected = getattr(single, name)
        for a, b in zip(
            jax.tree.leaves(getattr(whole, name)), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert np.isfinite(whole.first.bn_T).all() and np.isfinite(whole.last.bn_T).all()


# --- methods -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_alike")
def test_prism_with_a_pool_of_one_is_sre2l_bit_for_bit():
    units = [make_unit(slot, 0, 40) for slot in range(2)]

    def images(pool, method):
        recipe = synthesis.Recipe(method=method, roll=2)
        return images_of(advance(pool, recipe, units, begin(pool, recipe, units)))

    sre2l = images(small_pool(1), "sre2l")
    np.testing.assert_array_equal(images(small_pool(1), "prism"), sre2l)
    # Twin: with another teacher to draw they part.
    assert not np.array_equal(images(small_pool(2), "prism"), sre2l)


@pytest.mark.usefixtures("fast_programs")
def test_adam_step_schedule_and_clip_by_hand():
    """Two iterations of images against Adam, the cosine and the clamp written out."""
    with jax.enable_x64(True):
        pool = colour_pool().select(["a"])
        recipe = synthesis.Recipe(alpha_bn=0.25, roll=3, learning_rate=0.5)
        step = jax.jit(
            functools.partial(synthesis.synthesis_step, recipe, pool.teachers, pool.normalisation)
        )
        images = np.random.default_rng(0).standard_normal((BATCH, *SHAPE)) * 0.8
        unit = make_unit(0, 0, BUDGET, LABELS)
        state = synthesis.initial_state(pool, recipe, images)
        m = v = 0.0
        mean, std = np.array(COLOUR.mean), np.array(COLOUR.std)
        clipped = False
        for t in (1, 2):
            view = view_of(recipe, np.int32(0), np.int32(t - 1))
            _, _, g = by_hand.objective(
                pool.variables, images, LABELS, jax.device_get(view),
                primary=0, drawn=(0,), alpha=recipe.alpha_bn,
            )  # fmt: skip
            m, v = 0.5 * m + 0.5 * g, 0.9 * v + 0.1 * g * g
            rate = 0.5 * 0.5 * (1 + np.cos(np.pi * (t - 1) / BUDGET))
            moved = images - rate * (m / (1 - 0.5**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
            images = np.clip(moved, -mean / std, (1 - mean) / std)
            clipped |= not np.array_equal(images, moved)
            state, _ = step(pool.variables, np.uint32(SEED), unit, state)
            np.testing.assert_allclose(state.images_BHWC, images, rtol=0, atol=1e-6)
        assert clipped
        assert int(state.step) == 2


# --- failures ----------------------------------------------------------------------------------


def break_leaf(pool, name, path, value=np.nan):
    """The pool with one array of one teacher filled with a value."""
    at = pool.index(name)
    variables = jax.tree.map(np.array, pool.variables[at])
    leaf = functools.reduce(lambda tree, key: tree[key], path, variables)
    leaf[...] = value
    return dataclasses.replace(
        pool, variables=tuple(variables if i == at else v for i, v in enumerate(pool.variables))
    )


def failure(pool, recipe, unit):
    run = synthesis.engine(pool, recipe)
    state = begin(pool, recipe, [unit])[0]
    lane = (run.place(unit, 0), run.place(state, 0), run.place(np.int32(unit.budget), 0))
    [(_, report)] = run(0, [lane])
    return synthesis.explain_failure(run.fetch(report).failed, pool.names)


@pytest.mark.usefixtures("fast_programs")
def test_a_loss_that_is_not_finite_names_step_term_and_teacher():
    recipe = synthesis.Recipe(granularity="per_iteration", roll=2)
    pool, unit = small_pool(2), make_unit(0, 0, 12)

    def draw(step):
        return synthesis.draw_teachers(recipe, pool.teachers, rng.root(0), unit, step)

    drawn = np.asarray(jax.vmap(draw)(np.arange(12, dtype=np.int32)).statistic_weights_T) > 0
    drawn_first = int(drawn[:, 1].argmax())

    assert failure(pool, recipe, unit) is None
    assert failure(break_leaf(pool, "a", ("params", "head", "bias")), recipe, unit) == (
        "the cross entropy of teacher a is nan at step 0"
    )
    # A NaN in b's statistics, and in b's weights, fails when b is first drawn and not before.
    for path in (("batch_stats", "bn2", "mean"), ("params", "conv1", "kernel")):
        assert failure(break_leaf(pool, "b", path), recipe, unit) == (
            f"the BN alignment of teacher b is nan at step {drawn_first}"
        )
    huge = break_leaf(pool, "b", ("batch_stats", "bn2", "var"), np.inf)
    assert "BN alignment of teacher b is inf" in failure(huge, recipe, unit)


def test_the_first_draw_of_the_second_teacher_is_not_the_first_step():
    """Guards the test above: with another seed it could not tell 'first drawn' from 'first'."""
    recipe = synthesis.Recipe(granularity="per_iteration")
    pool, unit = small_pool(2), make_unit(0, 0, 12)
    first = synthesis.draw_teachers(recipe, pool.teachers, rng.root(0), unit, np.int32(0))
    assert first.statistic_weights_T[1] == 0


# --- the public function ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels_and_labels():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), np.uint8)
    return pixels, np.array([0, 1, 2])


@pytest.mark.usefixtures("fast_programs")
def test_synthesise_moves_pixels_reports_chunks_and_repeats(pixels_and_labels):
    pool, reports = small_pool(2), []
    run = functools.partial(
        prism_jax.synthesise, pool, *pixels_and_labels, iterations=23, primary="b", roll=2
    )
    images = run(steps_per_dispatch=10, on_chunk=reports.append)
    assert images.dtype == np.uint8 and images.shape == pixels_and_labels[0].shape
    assert not np.array_equal(images, pixels_and_labels[0])
    assert [int(r.last.step) for r in reports] == [9, 19, 22]
    assert reports[-1].last.loss < reports[0].first.loss
    np.testing.assert_array_equal(images, run(steps_per_dispatch=7))
    assert not np.array_equal(images, run(slot=1))
    assert not np.array_equal(images, run(seed=1))


def test_synthesise_without_iterations_returns_the_start(pixels_and_labels):
    images = prism_jax.synthesise(small_pool(1), *pixels_and_labels, iterations=0)
    np.testing.assert_array_equal(images, pixels_and_labels[0])


@pytest.mark.usefixtures("fast_programs")
def test_synthesise_stops_at_a_nan_and_names_it(pixels_and_labels):
    pool = break_leaf(small_pool(1), "a", ("params", "head", "bias"))
    with pytest.raises(UserError, match="cross entropy of teacher a is nan at step 0"):
        prism_jax.synthesise(pool, *pixels_and_labels, iterations=2)


@pytest.mark.usefixtures("fast_programs")
def test_a_pool_without_statistics_is_refused_unless_alignment_is_off(pixels_and_labels):
    module = NoNorm()
    members = {"plain": (module, random_variables(module, (8, 8, 1), 0))}
    pool = TeacherPool.of(members, image_shape=(8, 8, 1), normalisation=GREY)
    with pytest.raises(UserError, match="no teacher of the pool .plain. has BatchNorm"):
        prism_jax.synthesise(pool, *pixels_and_labels, iterations=2)
    prism_jax.synthesise(pool, *pixels_and_labels, iterations=2, alpha_bn=0.0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "prsm"}, r"method is 'prsm' \(did you mean 'prism'\?\); allowed: prism, sre2l"),
        ({"statistics_by": "some"}, "statistics_by is 'some'; allowed: fixed, subset"),
        ({"granularity": "never"}, "granularity is 'never'; allowed: per_slot, per_batch"),
        ({"iterations": -1}, "iterations=-1; it must be zero or positive"),
        ({"phase_sizes": (8, 4)}, "the last must be the images' own size, 8"),
        ({"alpha_BN": 1.0}, r"a keyword of synthesise is 'alpha_BN' \(did you mean 'alpha_bn'"),
        ({"alpha_bn": -1.0}, "alpha_bn=-1.0; it must be zero or positive"),
        ({"total_variation": -1.0}, "total_variation=-1.0; it must be zero or positive"),
        ({"match": ("bn", "convs")}, r"match is 'convs' \(did you mean 'conv'\?\); allowed: bn"),
        ({"densification": 1.0}, "give several of each, class by class"),
    ],
)
def test_words_and_numbers_that_nothing_has_are_refused(pixels_and_labels, given, said):
    with pytest.raises(UserError, match=said):
        prism_jax.synthesise(small_pool(1), *pixels_and_labels, **given)


def test_statistics_of_convolutions_need_some_of_ours(pixels_and_labels):
    module = NoNorm()
    members = {"plain": (module, random_variables(module, (8, 8, 1), 0))}
    pool = TeacherPool.of(members, image_shape=(8, 8, 1), normalisation=GREY)
    with pytest.raises(UserError, match="match names conv, and plain has no convolution of models"):
        prism_jax.synthesise(pool, *pixels_and_labels, iterations=2, match=("bn", "conv"))
    # Its BatchNorms are aligned alone where they are matched, too.
    known = dataclasses.replace(pool.teachers[0], first_bn=("bn",))
    course._check(Recipe(match=("bn", "conv")), dataclasses.replace(pool, teachers=(known,)), 1,
                  pixels_and_labels[0])  # fmt: skip


def test_an_unknown_primary_lists_the_pool(pixels_and_labels):
    with pytest.raises(UserError, match="no teacher 'c' in the pool; there are: a, b"):
        prism_jax.synthesise(small_pool(2), *pixels_and_labels, primary="c")
