"""Driving the engine over many units, as the recover stage does."""

from __future__ import annotations

import jax
import numpy as np

from prism_jax import synthesis
from prism_jax.core import pixels

COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "collective-permute", "collective-broadcast",
    "reduce-scatter",
)  # fmt: skip


def collectives(program) -> list[str]:
    """Those that a compiled program holds."""
    text = program.as_text()
    return [name for name in COLLECTIVES if name in text]


def make_unit(slot: int, block: int, budget: int, labels=(0, 1, 2)) -> synthesis.UnitBatch:
    return synthesis.UnitBatch(
        np.int32(slot), np.int32(block), np.int32(budget), np.asarray(labels, np.int32)
    )


def start_images(unit: synthesis.UnitBatch, normalisation, size: int = 8) -> np.ndarray:
    """Random pixels of a unit's own, normalised."""
    random = np.random.default_rng([int(unit.slot), int(unit.block)])
    shape = (len(unit.labels_B), size, size, len(normalisation.mean))
    levels = random.integers(0, 256, shape, np.uint8)
    return np.asarray(pixels.normalise(levels, normalisation))


def begin(pool, recipe, units, size: int = 8) -> list:
    """The state of every unit before its first iteration, on the host."""
    return [
        jax.device_get(
            synthesis.initial_state(pool, recipe, start_images(u, pool.normalisation, size))
        )
        for u in units
    ]


def advance(
    pool, recipe, units, states, *, devices=1, how="shard_map", chunk=50, until=None, seed=0,
    threads=1,
) -> list:  # fmt: skip
    """Run every unit to iteration ``until`` (or its end), in a new engine of ``devices`` lanes, or
    of several threads of one device.

    Returns:
      The states, on the host again.
    """
    run = synthesis.engine(pool, recipe, devices=jax.devices()[:devices] * threads, how=how)
    after, width = [], len(run)
    for first in range(0, len(units), width):
        here = range(min(width, len(units) - first))
        group, at = units[first : first + width], states[first : first + width]
        placed = [run.place(group[i], i) for i in here]
        going = [run.place(at[i], i) for i in here]
        left = [min(int(group[i].budget), until or 10**9) - int(at[i].step) for i in here]
        while any(left):
            counts = [min(chunk, n) for n in left]
            lanes = [(placed[i], going[i], run.place(np.int32(counts[i]), i)) for i in here]
            going = [state for state, _ in run(seed, lanes)]
            left = [left[i] - counts[i] for i in here]
        after += [run.fetch(state) for state in going]
    return after


def images_of(states) -> np.ndarray:
    return np.stack([state.images_BHWC for state in states])
