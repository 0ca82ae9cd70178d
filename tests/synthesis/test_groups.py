"""A set of BatchNorm targets for every slot: against NumPy, and one program for all of them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers import by_hand
from helpers.compiling import fast_alike, fast_programs
from helpers.networks import COLOUR, small_pool
from helpers.running import advance, begin, collectives, images_of, make_unit

from prism_jax import synthesis
from prism_jax.core import views
from prism_jax.errors import UserError
from prism_jax.synthesis.objective import GROUPS

__all__ = ["fast_alike", "fast_programs"]  # fixtures

SHAPE, SLOTS, BUDGET = (8, 8, 3), 3, 5
# The whole image: what is compared is the alignment, not the view.
RECIPE = synthesis.Recipe(
    method="psm", targets="groups", alpha_bn=0.5, crop_min=1.0, flip=False, roll=0
)


def pool_of(groups, dtype=np.float32):
    """Two teachers with a table of targets each, random or as given by ``groups``."""
    pool = small_pool(2, image_shape=SHAPE, normalisation=COLOUR, dtype=dtype)
    variables = [v | {GROUPS: groups(t, v)} for t, v in enumerate(pool.variables)]
    return dataclasses.replace(pool, variables=tuple(variables))


def random_groups(t, variables):
    random = np.random.default_rng(t)
    return jax.tree.map(
        lambda x: np.exp(random.standard_normal((SLOTS, *x.shape))).astype(x.dtype),
        variables["batch_stats"],
    )


def running_groups(t, variables):
    return jax.tree.map(lambda x: np.stack([x] * SLOTS), variables["batch_stats"])


@functools.cache
def in_doubles():
    with jax.enable_x64(True):
        return pool_of(random_groups, np.float64)


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("slot", [0, 2])
def test_alignment_and_gradient_against_numpy(slot):
    """The slot's targets are matched; the network normalises with its running statistics."""
    labels, step = np.array([4, 0, 2], np.int32), 3  # the second teacher's turn
    images = np.random.default_rng(9).standard_normal((3, *SHAPE))
    with jax.enable_x64(True):
        pool = in_doubles()
        state = synthesis.initial_state(pool, RECIPE, images)._replace(step=np.int32(step))
        chunk = functools.partial(
            synthesis.synthesis_chunk, RECIPE, pool.teachers, pool.normalisation
        )
        unit = make_unit(slot, 0, 10, labels)
        after, report = jax.device_get(
            jax.jit(chunk)(pool.variables, np.uint32(0), unit, state, np.int32(1))
        )
        view = synthesis.view_of(RECIPE, jax.random.key(0), unit, np.int32(step), SHAPE[:2])
        shown = np.asarray(views.apply_view(images, view))
    np.testing.assert_allclose(shown, images, atol=1e-12)

    variables = pool.variables[1]

    def by_numpy(group):
        targets = jax.tree.map(lambda x: x[group], variables[GROUPS])
        return by_hand.energy(variables, images, labels, targets=targets)

    found = by_numpy(slot)
    assert report.first.bn_T[1] == pytest.approx(found.bn, rel=1e-10)
    assert report.first.ce_T[1] == pytest.approx(found.ce, rel=1e-10)
    gradient = after.opt_state.mu / (1 - RECIPE.betas[0])
    expected = found.ce_gradient_BHWC + 0.5 * found.bn_gradient_BHWC
    np.testing.assert_allclose(gradient, expected, rtol=1e-8, atol=1e-12)
    for twin in (by_numpy(1), by_hand.energy(variables, images, labels)):
        assert abs(twin.bn / found.bn - 1) > 1e-3


@pytest.mark.usefixtures("fast_alike")
def test_groups_of_running_statistics_change_no_bit():
    units = [make_unit(slot, 0, BUDGET) for slot in range(SLOTS)]
    plain = dataclasses.replace(RECIPE, targets="running")
    found = {}
    for name, pool, recipe in (
        ("plain", pool_of(running_groups), plain),
        ("running", pool_of(running_groups), RECIPE),
        ("random", pool_of(random_groups), RECIPE),
    ):
        found[name] = images_of(advance(pool, recipe, units, begin(pool, recipe, units)))
    np.testing.assert_array_equal(found["running"], found["plain"])
    assert not np.array_equal(found["random"], found["plain"])  # twin


@pytest.mark.usefixtures("fast_alike")
def test_every_slot_is_one_program_without_a_collective_and_the_same_on_any_devices():
    pool = pool_of(random_groups)
    units = [make_unit(slot, 0, BUDGET + slot) for slot in range(SLOTS)]
    states = begin(pool, RECIPE, units)
    one = images_of(advance(pool, RECIPE, units, states))
    three = images_of(advance(pool, RECIPE, units, states, devices=3, chunk=2))
    np.testing.assert_array_equal(one, three)
    run = synthesis.engine(pool, RECIPE, devices=jax.devices()[:SLOTS])
    lanes = [
        (run.place(unit, i), run.place(state, i), run.place(np.int32(1), i))
        for i, (unit, state) in enumerate(zip(units, states, strict=True))
    ]
    assert collectives(run.compile(0, lanes)) == []
    assert run.traces == 1
    run(0, lanes)
    assert run.traces == 1


def test_groups_that_were_not_measured_are_asked_for():
    pool = small_pool(1, image_shape=SHAPE, normalisation=COLOUR)
    unit = make_unit(0, 0, BUDGET)
    with pytest.raises(UserError, match="teacher a has no statistics of groups"):
        advance(pool, RECIPE, [unit], begin(pool, RECIPE, [unit]))
