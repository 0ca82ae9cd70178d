"""Pyramids: components that are stored and optimised one by one, in NumPy; and what is kept."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from helpers import by_hand
from helpers.compiling import fast_alike, fast_programs
from helpers.networks import COLOUR, small_pool
from helpers.running import advance, begin, images_of, make_unit, start_images

from prism_jax import rng, synthesis
from prism_jax.synthesis import course, parametrisation

__all__ = ["fast_alike", "fast_programs"]  # fixtures

SHAPE, SEED, BUDGET, STEPS = (8, 8, 3), 5, 10, 4
SIDES = (1, 3, 8)
LABELS = np.array([4, 0, 2], np.int32)
RECIPE = synthesis.Recipe(
    method="sre2l", alpha_bn=0.25, roll=3, learning_rate=0.3,
    parametrisation="pyramid", resolutions=SIDES,
)  # fmt: skip
BLACK, WHITE = ((level - np.array(COLOUR.mean)) / np.array(COLOUR.std) for level in (0, 1))
UNITS = [make_unit(slot, 0, 30) for slot in range(3)]


# --- by hand: the components are kept, and each has an Adam of its own -------------------------


def enlarging(side: int, size: int) -> np.ndarray:
    """(size, side): what one pixel of a row of ``side`` adds to each of ``size``, by np.interp."""
    at, centres = (np.arange(size) + 0.5) * side / size - 0.5, np.arange(side)
    return np.stack([np.interp(at, centres, row) for row in np.eye(side)], axis=1)


def components_say(start, views, gradient_of, *, sides=SIDES, transposed=True, own=True):
    """The images after every step.

    Args:
      gradient_of: (images, view) -> the gradient by the images.
      transposed: gradients are pulled back; the twin samples them.
      own: every component has moments of its own; the twin's share those of the image.
    """
    size, (b1, b2) = start.shape[1], RECIPE.betas
    ways = [enlarging(side, size) for side in sides]

    def enlarge(part, way):
        return np.einsum("ir,brsc,js->bijc", way, part, way)

    def reduce(gradient, way, side):
        if transposed:
            return np.einsum("ir,bijc,js->brsc", way, gradient, way)
        at = np.arange(side) * size // side
        return gradient[:, at][:, :, at]

    parts = [np.zeros((len(start), side, side, 3)) for side in sides]
    parts[-1] = start.copy()
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parts]
    found = []
    for step, view in enumerate(views):
        image = sum(enlarge(p, w) for p, w in zip(parts, ways, strict=True))
        gradient = gradient_of(image, view)
        rate = RECIPE.learning_rate * 0.5 * (1 + np.cos(np.pi * step / BUDGET))
        for i, (side, way) in enumerate(zip(sides, ways, strict=True)):
            g = reduce(gradient, way, side)
            m, v = moments[i]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[i] = m, v
            m, v = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
            parts[i] = parts[i] - rate * m / (np.sqrt(v if own else v.mean()) + 1e-8)
        image = sum(enlarge(p, w) for p, w in zip(parts, ways, strict=True))
        parts[-1] += np.clip(image, BLACK, WHITE) - image
        found.append(np.clip(image, BLACK, WHITE))
    return found


@functools.cache
def both() -> tuple:
    """The engine's images after every step, and what the components by hand are given."""
    with jax.enable_x64(True):
        pool = small_pool(1, image_shape=SHAPE, normalisation=COLOUR, dtype=np.float64)
        unit = make_unit(2, 1, BUDGET, LABELS)
        start = start_images(unit, COLOUR).astype(np.float64)
        state, ours, views = synthesis.initial_state(pool, RECIPE, start), [], []
        step = jax.jit(
            functools.partial(synthesis.synthesis_step, RECIPE, pool.teachers, pool.normalisation)
        )
        view_of = jax.jit(functools.partial(synthesis.view_of, RECIPE), static_argnums=3)
        for number in range(STEPS):
            view = view_of(rng.root(SEED), unit, np.int32(number), SHAPE[:2])
            views.append(jax.device_get(view))
            state, _ = step(pool.variables, np.uint32(SEED), unit, state)
            ours.append(np.asarray(state.images_BHWC))

    def gradient_of(images, view):
        return by_hand.objective(
            pool.variables, images, LABELS, view, primary=0, drawn=(0,), alpha=RECIPE.alpha_bn
        )[2]

    return ours, start, views, gradient_of


def off(**twin) -> float:
    ours, *given = both()
    theirs = components_say(*given, **twin)
    return max(np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.usefixtures("fast_programs")
def test_images_are_the_sum_of_components_that_are_optimised_together():
    ours, start, *_ = both()
    assert (np.abs(ours[-1] - start) > 0.1).mean() > 0.5  # they have moved,
    clipped = (ours[-1] <= BLACK + 1e-9) | (ours[-1] >= WHITE - 1e-9)
    assert clipped.mean() > 0.02  # and some were clipped
    assert off() < 1e-6  # the learning rate is a float32


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize(
    "twin", [{"sides": (8,)}, {"sides": (1, 2, 8)}, {"transposed": False}, {"own": False}]
)
def test_another_parametrisation_is_seen(twin):
    assert off(**twin) > 1e-2


def test_an_enlarged_gradient_is_the_transposed_of_an_enlarged_component():
    rows = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
    with jax.enable_x64(True):
        found = np.asarray(parametrisation.reduced(rows, 3))
    way = enlarging(3, 8)
    np.testing.assert_allclose(found, np.einsum("ir,bijc,js->brsc", way, rows, way), atol=1e-12)


# --- what is kept, and what it does not depend on ----------------------------------------------


@pytest.mark.parametrize(
    ("size", "sides"),
    [(1, (1,)), (2, (1, 2)), (16, (1, 2, 4, 8, 16)), (24, (1, 2, 4, 8, 16, 24)),
     (224, (1, 2, 4, 8, 16, 32, 64, 128, 224))],
)  # fmt: skip
def test_resolutions_that_are_not_stated(size, sides):
    assert synthesis.resolutions_of((), size) == sides
    assert synthesis.resolutions_of((size,), size) == (size,)


@pytest.mark.usefixtures("fast_alike")
def test_a_pyramid_of_the_image_alone_is_its_pixels():
    pool = small_pool(1)
    fields = {"method": "sre2l", "roll": 2}
    of_pixels, alone, whole = (
        images_of(advance(pool, recipe, UNITS[:1], begin(pool, recipe, UNITS[:1])))
        for recipe in (
            synthesis.Recipe(**fields),
            synthesis.Recipe(**fields, parametrisation="pyramid", resolutions=(8,)),
            synthesis.Recipe(**fields, parametrisation="pyramid"),
        )
    )
    np.testing.assert_array_equal(alone, of_pixels)
    assert not np.array_equal(whole, of_pixels)


def test_the_state_is_the_images_and_the_moments_of_components():
    pool = small_pool(1)
    (state,) = begin(pool, synthesis.Recipe(parametrisation="pyramid"), UNITS[:1])
    assert state.images_BHWC.shape == (3, 8, 8, 1)
    for moments in (state.opt_state.mu, state.opt_state.nu):
        assert [m.shape for m in moments] == [(3, r, r, 1) for r in (1, 2, 4, 8)]


@pytest.mark.usefixtures("fast_alike")
def test_the_same_bits_on_any_device_in_any_chunk_and_resumed():
    pool = small_pool(2)
    recipe = synthesis.Recipe(roll=2, parametrisation="pyramid", view_noise=0.1)
    start = begin(pool, recipe, UNITS)
    whole = images_of(advance(pool, recipe, UNITS, start))
    half = advance(pool, recipe, UNITS, start, devices=3, chunk=7, until=11)
    again = images_of(advance(pool, recipe, UNITS, half, chunk=4))
    np.testing.assert_array_equal(again, whole)


def test_images_that_join_bring_moments_of_zero():
    pool = small_pool(1)
    recipe = synthesis.Recipe(slots=2, rounds=2, parametrisation="pyramid")
    start = np.random.default_rng(0).standard_normal((6, 8, 8, 1)).astype(np.float32)
    phases = course.phases_of(recipe, 20, start)
    state = course.begin(pool, recipe, phases[0], start)
    state = state._replace(opt_state=jax.tree.map(lambda x: x + 1, state.opt_state))
    after = course.enter(recipe, phases[1], state, start)
    np.testing.assert_array_equal(after.images_BHWC, start)
    assert after.opt_state.count == 1
    for moment, side in zip(after.opt_state.mu, (1, 2, 4, 8), strict=True):
        assert moment.shape == (6, side, side, 1)
        assert (moment[:3] == 1).all() and (moment[3:] == 0).all()


def test_a_phase_of_another_size_has_a_pyramid_of_its_own():
    pool = small_pool(1)
    recipe = synthesis.Recipe(phase_sizes=(4, 8), inject=0.5, parametrisation="pyramid")
    start = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype(np.float32)
    phases = course.phases_of(recipe, 20, start)
    state = course.begin(pool, recipe, phases[0], start)
    assert [m.shape[1] for m in state.opt_state.mu] == [1, 2, 4]
    state = course.enter(recipe, phases[1], state, start)
    assert [m.shape[1] for m in state.opt_state.mu] == [1, 2, 4, 8]
    assert state.images_BHWC.shape == start.shape


# --- noise of views -----------------------------------------------------------------------------


def test_the_noise_of_a_view_has_its_deviation_in_pixels_and_its_own_draw():
    recipe, like = synthesis.Recipe(view_noise=0.1), np.zeros((3, 40, 40, 3), np.float32)

    def noise(slot, step):
        unit = make_unit(slot, 0, BUDGET)
        return np.asarray(
            synthesis.noise_of(recipe, COLOUR, rng.root(SEED), unit, np.int32(step), like)
        )

    found = noise(0, 0)
    np.testing.assert_allclose((found * COLOUR.std).std((0, 1, 2)), 0.1, rtol=0.05)
    np.testing.assert_array_equal(found, noise(0, 0))
    for other in (noise(1, 0), noise(0, 1)):
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.05
