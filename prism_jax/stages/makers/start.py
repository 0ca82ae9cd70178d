"""Where recover starts: the initial images of a run."""

from __future__ import annotations

import numpy as np

from prism_jax.config import Experiment
from prism_jax.errors import UserError
from prism_jax.stages.context import Context
from prism_jax.synthesis.start import (
    INITIALISERS,
    SCORING,
    Patches,
    Start,
    needed_images,
    scorer,
    too_few,
)


def initial_images(context: Context, classes_B: np.ndarray, slots_B: np.ndarray) -> np.ndarray:
    """Where recover starts with these images: float32, normalised."""
    initialise = INITIALISERS[context.config.recover.initialise]
    start = context.once("start", lambda: _start(context))
    return initialise(start, classes_B, slots_B)


def _start(context: Context) -> Start:
    """What initialisers are given; a scorer is loaded only where one is needed."""
    recover, inputs, found = context.config.recover, context.inputs, None
    if recover.initialise in SCORING:
        pool = context.networks.pool([recover.scorer or recover.primary])
        found = scorer(
            pool.teachers[0], pool.variables[0], inputs.normalisation, inputs.image_shape[0]
        )
    return Start(
        inputs.start,
        inputs.normalisation,
        inputs.image_shape,
        context.config.seed,
        ipc=recover.ipc,
        flip=recover.flip,
        repeat=recover.short_classes == "repeat",
        patches=_patches(context.config),
        scorer=found,
    )


def check(context: Context) -> None:
    """Refuse, before any work, what classes have too few training images for.

    Raises:
      UserError: fewer than the initial images or a control of as many real images ask for.
    """
    config = context.config
    recover, controls = config.recover, {"random_real", "random_real_hard"}
    needed = needed_images(recover.initialise, recover.ipc, _patches(config))
    if not controls.isdisjoint(config.validate.controls):
        needed = max(needed, recover.ipc)
    if recover.short_classes == "repeat":
        needed = min(needed, 1)
    source = context.inputs.open("train")
    counts_K = np.bincount(source.labels_N, minlength=config.dataset.num_classes)
    if short := {c: int(n) for c, n in enumerate(counts_K) if n < needed}:
        raise UserError(too_few(short, needed, source.class_names))


def _patches(config: Experiment) -> Patches:
    recover = config.recover
    return Patches(
        recover.patch_factor, recover.patch_images, recover.patch_crops, recover.patch_choice
    )
