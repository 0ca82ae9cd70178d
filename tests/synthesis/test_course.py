"""A batch's course: identities between methods, and DELT's and FADRM's phases by hand."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import by_hand
from helpers.compiling import fast_alike, fast_programs
from helpers.networks import COLOUR, small_pool
from helpers.running import advance, begin, images_of, make_unit

from prism_jax import rng, synthesis
from prism_jax.core.views import resize
from prism_jax.synthesis import course

__all__ = ["fast_alike", "fast_programs"]  # fixtures

SHAPE, SEED = (8, 8, 3), 5
UNITS = [make_unit(slot, 0, 30) for slot in range(2)]


# --- one method is another with its own part left out ---------------------------------------


def images(pool, **fields):
    recipe = synthesis.Recipe(roll=2, **fields)
    return images_of(advance(pool, recipe, UNITS, begin(pool, recipe, UNITS)))


@functools.cache
def sre2l():
    return images(small_pool(1), method="sre2l")


@pytest.mark.usefixtures("fast_alike")
def test_cda_whose_curriculum_is_over_at_once_is_sre2l():
    cda = functools.partial(images, small_pool(1), method="cda", crop_curriculum="cosine")
    np.testing.assert_array_equal(cda(crop_milestone=0.0), sre2l())
    assert not np.array_equal(cda(crop_milestone=0.5), sre2l())


@pytest.mark.usefixtures("fast_alike")
def test_dwa_without_a_perturbation_and_a_variance_weight_is_sre2l():
    np.testing.assert_array_equal(
        images(small_pool(1), method="dwa", variance_weight=1.0, perturb_rho=0.0), sre2l()
    )
    assert not np.array_equal(
        images(small_pool(1), method="dwa", variance_weight=2.0, perturb_rho=0.0), sre2l()
    )


@pytest.mark.usefixtures("fast_alike")
@pytest.mark.parametrize("method", ["gvbsm", "fadrm", "cvdd"])
def test_a_sampler_that_has_one_teacher_to_choose_from_is_sre2l(method):
    np.testing.assert_array_equal(images(small_pool(1), method=method), sre2l())
    assert not np.array_equal(images(small_pool(2), method=method), sre2l())


@pytest.mark.usefixtures("fast_alike")
def test_one_round_and_one_size_are_no_phases_at_all():
    start = np.zeros((6, 8, 8, 1), np.float32)
    for fields in ({}, {"rounds": 1, "slots": 2}, {"phase_sizes": (8,)}):
        phases = course.phases_of(synthesis.Recipe(**fields), 40, start)
        assert phases == (course.Phase(40, 8, 6),)


# --- perturbation ---------------------------------------------------------------------------


def perturbed(batches, *, pool=None, **fields):
    recipe = synthesis.Recipe(method="dwa", roll=2, perturb_rho=0.3, perturb_steps=2, **fields)
    return jax.device_get(course.prepare(pool or small_pool(1), recipe, batches, SEED))


def a_batch(block):
    random = np.random.default_rng(block)
    return make_unit(0, block, 10), random.standard_normal((3, 8, 8, 1)).astype(np.float32)


@pytest.mark.usefixtures("fast_alike")
def test_a_perturbation_that_is_not_undone_is_that_of_one_batch_after_the_other():
    first, second = a_batch(0), a_batch(1)
    pool = small_pool(1)
    once = perturbed([first])
    moved = ({**pool.variables[0], "params": once.weights},)
    expected = perturbed([second], pool=dataclasses.replace(pool, variables=moved))
    found = perturbed([first, second])
    jax.tree.map(np.testing.assert_array_equal, found.weights, expected.weights)
    alone = perturbed([second])  # twin, and the default: the weights begin anew
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (found.weights, alone.weights)), strict=True)
    )
    assert (found.block, found.probes_BHWC) == (1, None)


@pytest.mark.usefixtures("fast_programs")
def test_perturbed_weights_read_the_images_and_probes_count_once():
    pool, (unit, start) = small_pool(1), a_batch(0)

    def go(count, **fields):
        recipe = synthesis.Recipe(method="dwa", roll=2, perturb_rho=0.3, **fields)
        run = synthesis.engine(pool, recipe)
        batch = course.prepare(pool, recipe, [(unit, start)], SEED)
        state = run.place(synthesis.initial_state(pool, recipe, start), 0)
        [(state, report)] = run(SEED, [(run.place(batch, 0), state, run.place(np.int32(count), 0))])
        return batch, run.fetch(state), run.fetch(report)

    batch, plain, plain_report = go(1, perturb_steps=2)
    _, unmoved, report = go(1, perturb_steps=0)
    assert plain_report.first.ce_T[0] > report.first.ce_T[0] + 1e-3  # uphill
    assert not np.array_equal(plain.images_BHWC, unmoved.images_BHWC)
    with_probes, state, _ = go(1, perturb_steps=2, perturb_probes=True)
    jax.tree.map(np.testing.assert_array_equal, batch.weights, with_probes.weights)
    # Adam's first moment is half the first gradient: the probes add their half, and only once.
    added = state.opt_state.mu - plain.opt_state.mu
    np.testing.assert_allclose(added, 0.5 * np.asarray(with_probes.probes_BHWC), atol=1e-6)
    # From the state after it, one more step is the same with probes and without them.
    recipe = synthesis.Recipe(method="dwa", roll=2, perturb_rho=0.3, perturb_steps=2,
                              perturb_probes=True)  # fmt: skip
    run = synthesis.engine(pool, recipe)
    without = with_probes._replace(probes_BHWC=np.zeros_like(with_probes.probes_BHWC))

    def one_more(state, batch):
        lane = tuple(run.place(x, 0) for x in jax.device_get((batch, state, np.int32(1))))
        return run.fetch(run(SEED, [lane])[0][0]).images_BHWC

    later = [one_more(state, batch) for batch in (with_probes, without)]
    np.testing.assert_array_equal(*later)
    begun = jax.device_get(synthesis.initial_state(pool, recipe, start))
    first = [one_more(begun, batch) for batch in (with_probes, without)]
    assert np.abs(first[0] - first[1]).max() > 0


# --- phases by hand ---------------------------------------------------------------------------


def double_pool(size):
    with jax.enable_x64(True):
        return small_pool(size, image_shape=SHAPE, normalisation=COLOUR, dtype=np.float64)


class Adam:
    """Adam(0.5, 0.9) in NumPy, its state the size of the images."""

    def __init__(self, like):
        self.m, self.v, self.t = np.zeros_like(like), np.zeros_like(like), 0

    def direction(self, g):
        self.t += 1
        self.m, self.v = 0.5 * self.m + 0.5 * g, 0.9 * self.v + 0.1 * g * g
        return self.m / (1 - 0.5**self.t) / (np.sqrt(self.v / (1 - 0.9**self.t)) + 1e-8)


def clip(images):
    mean, std = np.array(COLOUR.mean), np.array(COLOUR.std)
    return np.clip(images, -mean / std, (1 - mean) / std)


@functools.partial(jax.jit, static_argnums=(0, 3))
def view_of(recipe, unit, step, size):
    return synthesis.view_of(recipe, rng.root(SEED), unit, step, size)


def gradient_by_hand(pool, recipe, unit, images, labels, step, teacher):
    with jax.enable_x64(True):
        view = view_of(recipe, unit, np.int32(step), images.shape[1:3])
    return by_hand.objective(
        [pool.variables[teacher]], images, labels, jax.device_get(view),
        primary=0, drawn=(0,), alpha=recipe.alpha_bn,
    )[2]  # fmt: skip


def run_course(pool, recipe, unit, start, *, per_dispatch=2):
    """All phases through the engine; the images, and those at the end of every phase."""
    phases, done, ends = course.phases_of(recipe, int(unit.budget), start), 0, []
    with jax.enable_x64(True):
        run = synthesis.engine(pool, recipe)
        lane, state = run.place(unit, 0), course.begin(pool, recipe, phases[0], start)
        for i, phase in enumerate(phases):
            state = run.place(course.enter(recipe, phase, state, start) if i else state, 0)
            while done < phase.stop:
                count = min(per_dispatch, phase.stop - done)
                [(state, _)] = run(SEED, [(lane, state, run.place(np.int32(count), 0))])
                done += count
            state = run.fetch(state)
            ends.append(state.images_BHWC)
    return ends


DELT = synthesis.Recipe(
    method="delt", alpha_bn=0.25, roll=0, crop_curriculum="cosine", learning_rate=0.3,
    slots=3, rounds=3,
)  # fmt: skip


def delt_by_hand(start, labels, *, own_optimiser=False, all_at_once=False):
    """One Adam over all images; those that have not joined have a gradient of zero."""
    pool, unit = double_pool(1), make_unit(0, 0, 9, labels)
    images, adam, ends = start.copy(), Adam(start), []
    for step in range(9):
        joined = 6 if all_at_once else 2 * (step // 3 + 1)
        if own_optimiser and step % 3 == 0:
            adam = Adam(start)
        gradient = np.zeros_like(images)
        gradient[:joined] = gradient_by_hand(
            pool, DELT, unit, images[:joined], labels[:joined], step, 0
        )
        rate = 0.3 * 0.5 * (1 + np.cos(np.pi * step / 9))
        images = images - rate * adam.direction(gradient)
        images[:joined] = clip(images[:joined])
        ends.append(images[:joined].copy())
    return ends[2::3]


@pytest.mark.usefixtures("fast_programs")
def test_early_late_by_hand():
    labels = np.tile(np.array([3, 1], np.int32), 3)  # slot by slot
    start = clip(np.random.default_rng(0).standard_normal((6, *SHAPE)) * 0.8)
    ends = run_course(double_pool(1), DELT, make_unit(0, 0, 9, labels), start)
    assert [len(images) for images in ends] == [2, 4, 6]
    for ours, theirs in zip(ends, delt_by_hand(start, labels), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for twin in ({"own_optimiser": True}, {"all_at_once": True}):
        assert np.abs(delt_by_hand(start, labels, **twin)[-1] - ends[-1]).max() > 1e-3
    # The images that join last have moved for one round only.
    moved = np.abs(ends[-1] - start).reshape(6, -1).mean(1)
    assert moved[4:].max() < moved[:2].min()


FADRM = synthesis.Recipe(
    method="fadrm", alpha_bn=0.25, roll=2, learning_rate=0.3,
    phase_sizes=(6, 8, 6, 8), inject=0.25,
)  # fmt: skip


def fadrm_by_hand(start, labels, *, inject=0.25, at_the_end=False):
    pool, unit = double_pool(2), make_unit(0, 0, 12, labels)

    def to(size, x):
        with jax.enable_x64(True):
            return np.asarray(resize(x, (size, size)))

    images, ends = to(6, start), []
    for phase, size in enumerate((6, 8, 6, 8)):
        if phase:
            images = (1 - inject) * to(size, images) + inject * to(size, start)
        adam = Adam(images)
        for step in range(3 * phase, 3 * phase + 3):
            gradient = gradient_by_hand(pool, FADRM, unit, images, labels, step, step % 2)
            rate = 0.3 * 0.5 * (1 + np.cos(np.pi * step / 12))
            images = clip(images - rate * adam.direction(gradient))
        ends.append(images)
    if at_the_end:
        ends[-1] = (1 - inject) * images + inject * start
    return ends


@pytest.mark.usefixtures("fast_programs")
def test_residual_injection_by_hand():
    labels = np.array([3, 1, 0], np.int32)
    start = clip(np.random.default_rng(0).standard_normal((3, *SHAPE)) * 0.8)
    ends = run_course(double_pool(2), FADRM, make_unit(0, 0, 12, labels), start)
    assert [images.shape[1] for images in ends] == [6, 8, 6, 8]
    for ours, theirs in zip(ends, fadrm_by_hand(start, labels), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    for twin in ({"inject": 0.75}, {"at_the_end": True}):
        assert np.abs(fadrm_by_hand(start, labels, **twin)[-1] - ends[-1]).max() > 1e-3


@pytest.mark.usefixtures("fast_programs")
def test_phases_that_keep_one_size_still_begin_with_a_new_optimiser():
    recipe = dataclasses.replace(FADRM, phase_sizes=(8, 8), inject=0.0)
    start = clip(np.random.default_rng(0).standard_normal((3, *SHAPE)))
    unit = make_unit(0, 0, 6, np.array([3, 1, 0], np.int32))
    ours = run_course(double_pool(2), recipe, unit, start)[-1]
    one_phase = dataclasses.replace(recipe, phase_sizes=())
    assert np.abs(ours - run_course(double_pool(2), one_phase, unit, start)[-1]).max() > 1e-3


@pytest.mark.usefixtures("fast_programs")
def test_any_division_into_dispatches_is_the_same_course():
    labels = np.array([3, 1, 0], np.int32)
    start = clip(np.random.default_rng(0).standard_normal((3, *SHAPE)))
    unit = make_unit(0, 0, 12, labels)
    ends = [run_course(double_pool(2), FADRM, unit, start, per_dispatch=n)[-1] for n in (1, 3)]
    np.testing.assert_array_equal(*ends)


def test_the_phase_of_a_saved_state():
    start = np.zeros((10, 8, 8, 1), np.float32)
    recipe = synthesis.Recipe(slots=10, rounds=8)
    phases = course.phases_of(recipe, 4000, start)
    assert [p.stop for p in phases] == list(range(500, 4001, 500))
    assert [p.images for p in phases] == [2, 4, 5, 6, 7, 8, 9, 10]
    at = [course.phase_after(phases, done) for done in (0, 1, 500, 501, 3500, 3501, 4000)]
    assert at == [0, 0, 0, 1, 6, 7, 7]
