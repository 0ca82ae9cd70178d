"""Where recover starts: the initial images of a run."""

from __future__ import annotations

import numpy as np

from prism_jax.stages.context import Context
from prism_jax.synthesis.start import INITIALISERS, SCORING, Patches, Start, scorer


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
        patches=Patches(
            recover.patch_factor, recover.patch_images, recover.patch_crops, recover.patch_choice
        ),
        scorer=found,
    )
