"""An image batch that several devices share, with the statistics of the whole of it.

Compared after one iteration: what Adam remembers then is the gradient. Later the comparison means
nothing, for Adam makes of a gradient's sign a step of full size. Measured, float32, relative to the
largest value: gradient 1.9e-7, terms 8.4e-8. The bounds are some ten times that.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from helpers.command import TINY, call, finished, reference, results
from helpers.compiling import fast_programs
from helpers.networks import small_pool
from helpers.running import COLLECTIVES, begin, make_unit

from prism_jax import parallel, synthesis

__all__ = ["fast_programs", "finished", "reference"]  # fixtures

SIZE, BATCH = 16, 8
RECIPE = synthesis.Recipe(granularity="per_iteration", roll=2)
UNITS = [make_unit(slot, 0, 12, np.arange(BATCH) % 5) for slot in (0, 3)]
GRADIENT, TERMS = 2e-6, 1e-6


@functools.cache
def pool():
    return small_pool(2, image_shape=(SIZE, SIZE, 1))


def run(span: int, *, counts=(1,), lanes: int = 2, states=None):
    """Two units after some chunks: (states, last reports)."""
    devices = jax.devices()[: lanes * span]
    engine = synthesis.engine(pool(), RECIPE, devices=devices, span=span)
    assert len(engine) == lanes
    units = UNITS[:lanes]
    states = begin(pool(), RECIPE, units, SIZE) if states is None else states
    placed = [engine.place(unit, at) for at, unit in enumerate(units)]
    going = [engine.place(state, at) for at, state in enumerate(states)]
    for count in counts:
        ready = [(placed[at], going[at], engine.place(np.int32(count), at)) for at in range(lanes)]
        done = engine(0, ready)
        going = [state for state, _ in done]
    return [engine.fetch(s) for s in going], [engine.fetch(r) for _, r in done], engine


def apart(a, b) -> float:
    """The largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(a).max())


def gradient_of(state) -> np.ndarray:
    """The gradient of the first iteration, from Adam's first moment."""
    return state.opt_state.mu / (1 - RECIPE.betas[0])


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("span", [2, 4])
def test_gradient_and_terms_are_those_of_one_device_with_the_whole_batch(span):
    (alone, said, _), (states, reports, _) = run(1), run(span)
    for lane in range(2):
        assert apart(gradient_of(alone[lane]), gradient_of(states[lane])) < GRADIENT
        for one, several in zip(
            (said[lane].last.loss, said[lane].last.ce_T, said[lane].last.bn_T),
            (reports[lane].last.loss, reports[lane].last.ce_T, reports[lane].last.bn_T),
            strict=True,
        ):
            assert apart(one, several) < TERMS
    assert states[0].images_BHWC.shape == (BATCH, SIZE, SIZE, 1)


@pytest.mark.usefixtures("fast_programs")
def test_statistics_of_each_device_s_own_images_do_not_pass():
    """The twin: two halves, each aligned by itself."""
    whole = gradient_of(run(1)[0][0])
    state = begin(pool(), RECIPE, UNITS[:1], SIZE)[0]
    halves = []
    for part in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
        unit = UNITS[0]._replace(labels_B=UNITS[0].labels_B[part])
        small = synthesis.initial_state(pool(), RECIPE, state.images_BHWC[part])
        engine = synthesis.engine(pool(), RECIPE)
        lanes = [tuple(engine.place(x, 0) for x in (unit, jax.device_get(small), np.int32(1)))]
        ((after, _),) = engine(0, lanes)
        halves.append(gradient_of(engine.fetch(after)))
    assert apart(whole, np.concatenate(halves) / 2) > 1000 * GRADIENT


@pytest.mark.usefixtures("fast_programs")
def test_each_device_holds_its_part_and_the_same_program_goes_on():
    (whole, _, engine) = run(2, counts=(5, 7))
    assert engine.traces == 1
    compiled = engine._jit._cache_size()
    assert compiled == len(engine)  # no second program for what a first call left
    placed = engine.place(begin(pool(), RECIPE, UNITS[:1], SIZE)[0], 0)
    shapes = {s.data.shape for s in placed.images_BHWC.addressable_shards}
    assert shapes == {(BATCH // 2, SIZE, SIZE, 1)}
    assert {s.data.shape for s in placed.step.addressable_shards} == {()}
    # Stopped after five iterations and continued: the same bits.
    halfway, _, _ = run(2, counts=(5,))
    resumed, _, _ = run(2, counts=(7,), states=halfway)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("fast_programs")
def test_what_spans_the_devices_is_a_collective_and_one_device_has_none():
    texts = {}
    for span in (1, 2):
        engine = synthesis.engine(pool(), RECIPE, devices=jax.devices()[:span], span=span)
        state = begin(pool(), RECIPE, UNITS[:1], SIZE)[0]
        lanes = [tuple(engine.place(x, 0) for x in (UNITS[0], state, np.int32(1)))]
        texts[span] = engine.compile(0, lanes).as_text()
    found = {span: [c for c in COLLECTIVES if c in text] for span, text in texts.items()}
    assert found[1] == [] and "all-reduce" in found[2]


def test_lanes_are_whole_groups_of_devices():
    assert [len(parallel.lane_devices(n, 2)) for n in (0, 1, 3, 100)] == [2, 2, 6, 8]
    assert len(parallel.lane_devices(100, 3)) == 6


def test_a_lane_of_devices_without_work_is_left_out():
    span = parallel.SpanMap(
        lambda shared, seed, x: x + shared, np.float32(1), devices=jax.devices()[:4], span=2
    )
    none, done = span(0, [None, (span.place(np.arange(3, dtype=np.float32), 1),)])
    assert none is None and span.fetch(done).tolist() == [1, 2, 3]
    assert {*done.devices()} == {*jax.devices()[2:4]}


def test_recover_with_batches_that_span_devices(tmp_path, finished, reference):
    """Other images, so a fingerprint of their own; the same for every run of these settings."""
    span = "--config.parallel.recover_devices=4"
    status, _, err = call(TINY, f"--workdir={finished}", span, "--config.recover.batch_size=4")
    assert status == 2 and "devices_per_batch: (absent) -> 4" in err
    made = []
    for number, more in enumerate(((), ("--config.recover.steps_per_dispatch=5",))):
        root = tmp_path / str(number)
        begun = (f"--workdir={root}", f"--from={reference}", "--stages=recover", span,
                 "--config.recover.batch_size=4", *more)  # fmt: skip
        status, _, err = call(TINY, *begun)
        assert status == 0, err
        made.append({k: v for k, v in results(root).items() if k.startswith("recover/images")})
    assert made[0] == made[1] and len(made[0]) == 8
    err = call(TINY, f"--workdir={tmp_path}", "--config.parallel.recover_devices=16",
               "--config.recover.batch_size=4")[2]  # fmt: skip
    assert "parallel.recover_devices is 16" in err
