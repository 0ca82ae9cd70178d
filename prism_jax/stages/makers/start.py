"""Where recover starts: the initial images of a run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax.config import SELECTED_CONTROLS, Experiment
from prism_jax.core import pixels, views
from prism_jax.data import workdir
from prism_jax.data.pipeline import read_images
from prism_jax.errors import UserError
from prism_jax.stages import statistics
from prism_jax.stages.context import Context
from prism_jax.synthesis.selection import retrieve
from prism_jax.synthesis.start import (
    INITIALISERS,
    SCORING,
    Patches,
    Start,
    needed_images,
    scorer,
    selected_positions,
    too_few,
)
from prism_jax.teachers import TeacherPool
from prism_jax.types import Array, PyTree

CHOSEN = "chosen"  # in recover's folder, while it works: what initialisers found of each class


def initial_images(
    context: Context,
    classes_B: np.ndarray,
    slots_B: np.ndarray,
    *,
    keep: epath.Path | None = None,
) -> np.ndarray:
    """Where recover starts with these images: float32, normalised.

    Args:
      keep: recover's folder, while it works: what is found of a class is kept there, so that a run
        that was stopped does not look for it again.

    Raises:
      Interrupted: a stop was requested; every class that was looked through is kept.
    """
    initialise = INITIALISERS[context.config.recover.initialise]
    start = context.once("start", lambda: _start(context))
    if keep is not None:
        start = dataclasses.replace(start, kept=functools.partial(_kept, context, keep / CHOSEN))
    return initialise(start, classes_B, slots_B)


def _kept(context: Context, folder: epath.Path, cls: int, find: Callable[[int], list]) -> list[Any]:
    """What is found of a class, written down; what is written down is not looked for again."""
    path = folder / f"{cls:05d}.json"
    if path.exists():
        return workdir.read_record(path)["found"]
    context.stop.check()
    found = find(cls)
    workdir.write_record(path, {"found": found})
    return found


def _start(context: Context) -> Start:
    """What initialisers are given; a scorer is loaded only where one is needed."""
    recover, inputs, found = context.config.recover, context.inputs, None
    asked = recover.scorer or recover.primary
    if recover.initialise in SCORING:
        pool = context.networks.pool([asked])
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
        features=lambda cls: statistics.features(context, asked, cls),
        groups=lambda cls: statistics.groups(context, cls),
    )


def control_positions(
    context: Context, name: str, classes_B: np.ndarray, slots_B: np.ndarray
) -> list[int]:
    """Where the images of a control of selected real ones are among the training images."""
    start = dataclasses.replace(_start(context), source=context.inputs.open("train"), scorer=None)
    return selected_positions(start, classes_B, slots_B, by=name)


def retrieved_images(
    context: Context, classes_B: np.ndarray, images_BHWC: np.ndarray
) -> np.ndarray:
    """For each image the real one of its class that is nearest in features and simple (RETA).

    Args:
      images_BHWC: normalised, of any size.

    Returns:
      Normalised, of the data set's size.
    """
    config, inputs = context.config, context.inputs
    asked = config.recover.scorer or config.recover.primary
    embedding_BD = np.asarray(
        context.once("retriever", lambda: _retriever(context, asked))(images_BHWC)
    )
    source, at = inputs.open("train"), np.zeros(len(classes_B), int)
    for cls in np.unique(classes_B):
        mine, members = classes_B == cls, np.flatnonzero(source.labels_N == cls)
        pool = statistics.features(context, asked, int(cls))
        weight = config.recover.inject_simplicity
        at[mine] = members[retrieve(embedding_BD[mine], pool, simplicity=weight)]
    images = read_images(source, at.tolist(), threads=config.dataset.threads)
    return np.asarray(pixels.normalise(images, inputs.normalisation))


def _retriever(context: Context, name: str) -> Callable[[np.ndarray], Array]:
    """A teacher's features of normalised images, enlarged to the data set's size."""
    pool = context.networks.pool([name])
    read, variables = features_program(context, pool), jax.device_put(pool.variables[0])
    return lambda images_BHWC: read(variables, images_BHWC)


def features_program(context: Context, pool: TeacherPool) -> jax.stages.Wrapped:
    """The features of a pool's one teacher, compiled: ``f(variables, normalised images)``."""
    side = context.inputs.image_shape[0]

    @jax.jit
    def read(variables: PyTree, images_BHWC: Array) -> Array:
        images_BHWC = views.resize(images_BHWC, (side, side))
        return pool.teachers[0].read_features(variables, images_BHWC, pool.normalisation)[0]

    return read


def check(context: Context) -> None:
    """Refuse, before any work, what classes have too few training images for.

    Raises:
      UserError: fewer than the initial images or a control of as many real images ask for.
    """
    config = context.config
    recover = config.recover
    controls = {"random_real", "random_real_hard", *SELECTED_CONTROLS}
    needed = 1
    if recover.maker != "generate":  # which asks for what its anchors need
        needed = needed_images(recover.initialise, recover.ipc, _patches(config))
    if not controls.isdisjoint(config.validate.controls) or recover.targets == "groups":
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
