"""Rules of ``squeeze``."""

from __future__ import annotations

from collections.abc import Iterator

from prism_jax import training
from prism_jax.config.rules.common import (
    not_negative,
    one_of,
    positive,
    seed,
    share,
    without_milestones,
)
from prism_jax.config.sections import Experiment


def violations(e: Experiment) -> Iterator[str]:
    """What is wrong with the section, one line each."""
    yield from positive(e, "squeeze", "epochs", "batch_size", "learning_rate")
    yield from not_negative(e, "squeeze", "weight_decay", "crop_pad", "least_steps")
    yield from seed("squeeze.seed", e.squeeze.seed)
    yield from share(e, "squeeze", "crop_min", low="(")
    if e.squeeze.least_top1 is not None:
        yield from share(e, "squeeze", "least_top1")
    trained = [name for name in e.squeeze.teachers if not e.network(name).checkpoint]
    if e.squeeze.batch_size == 1 and trained:
        yield (
            f"squeeze.batch_size is 1, and BatchNorms of {trained[0]} would see one image at a "
            f"time, which has no variance; make it two or more"
        )
    yield from one_of("squeeze.optimiser", e.squeeze.optimiser, training.OPTIMISERS)
    yield from one_of("squeeze.schedule", e.squeeze.schedule, without_milestones())
