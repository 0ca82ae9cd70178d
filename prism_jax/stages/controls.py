"""Controls: what the synthetic set must be compared with, in the same shape.

controls/random_real/        as many random real images, labelled as the synthetic ones
controls/random_real_hard/   the same images with their hard labels
controls/full_real/          the whole training set with its hard labels
controls/real_*/             as many real images chosen in a teacher's features, with soft labels
controls/synthetic_hard/     the synthetic images with their hard labels
controls/decoded_anchors/, medoids/, no_anchors/    of generated images; see stages/anchoring.py
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from prism_jax import parallel
from prism_jax.config import (
    ANCHOR_CONTROLS,
    GENERATED_CONTROLS,
    HARD_CONTROL,
    SELECTED_CONTROLS,
    SOFT_CONTROLS,
)
from prism_jax.data import image_set, workdir
from prism_jax.data.lazy import Images
from prism_jax.data.weights import RECORD
from prism_jax.stages import anchoring, fingerprints, recover
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.makers.start import control_positions
from prism_jax.synthesis.start import random_positions


def labelled_set(context: Context, name: str) -> LabelledSet:
    """The images of one control."""
    config, source = context.config, context.inputs.open("train")
    root = context.root / "controls" / name
    fields: dict[str, Any] = {"data": context.inputs.fields(source)}
    soft = name in SOFT_CONTROLS and context.config.soft_labels
    if name == "full_real":
        least = config.squeeze.epochs_over(len(source))
        fields["epochs"] = config.validate.epochs, config.recover.ipc, least
        labels = np.asarray(source.labels_N, np.int32)
        return LabelledSet(name, root, lambda: context.inputs.read(source), labels, fields, soft)
    classes, slots = _order(context)
    if name == HARD_CONTROL:
        made = fingerprints.recover(context)
        weights = recover.weights(context)
        return LabelledSet(
            name, root, lambda: recover.synthetic_set(context).images_uint8_NHWC, classes, made,
            soft, weights,
        )  # fmt: skip
    if name in GENERATED_CONTROLS:
        made = fingerprints.generated_control(context, name)
        read_made = functools.partial(anchoring.control_images, context, name)
        weights = None
        if config.generate.weighted and name in ANCHOR_CONTROLS:
            made |= {"weighted": True}
            weights = recover.weights(context)
        return LabelledSet(name, root, read_made, classes, made, soft, weights)
    if name in SELECTED_CONTROLS:
        fields |= fingerprints.selected_control(context, name)

        def read_selected() -> Images:
            return context.inputs.read(source, control_positions(context, name, classes, slots))

        return LabelledSet(name, root, read_selected, classes, fields, soft)
    fields |= {"ipc": config.recover.ipc, "seed": config.seed, "classes": int(classes.max()) + 1}

    def read() -> Images:
        repeat = config.recover.short_classes == "repeat"
        at = random_positions(source, classes, slots, config.seed, repeat=repeat)
        return context.inputs.read(source, at)

    def read_once() -> Images:  # those with soft and with hard labels: of ImageNet, gigabytes
        return context.once("random real images", read)

    return LabelledSet(name, root, read_once, classes, fields, soft)


def write(context: Context, labelled: LabelledSet) -> None:
    """Write a control's images beside its labels, for people to look at."""
    folder, (classes, slots) = labelled.root / "images", _order(context)
    if labelled.name == "full_real" or not parallel.is_main() or is_written(context, labelled):
        return
    context.work.acquire()
    if _is_other(labelled):
        workdir.remove(folder)
    workdir.write_fingerprint(folder, labelled.fields)
    digest = image_set.write_set(folder, labelled.images_uint8_NHWC, classes, slots)
    workdir.write_record(folder / RECORD, {"digest": digest})


def is_written(context: Context, labelled: LabelledSet) -> bool:
    """Whether a control's images are there to be looked at."""
    whole = image_set.is_whole(labelled.root / "images", len(_order(context)[0]))
    return whole and not _is_other(labelled)


def _is_other(labelled: LabelledSet) -> bool:
    found = workdir.read_fingerprint(labelled.root / "images")  # older ones have none
    return found is not None and bool(workdir.differences(found, labelled.fields))


def _order(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Classes and slots of a set, class-major as image sets are read."""
    classes, ipc = context.config.dataset.num_classes, context.config.recover.ipc
    class_N = np.repeat(np.arange(classes, dtype=np.int32), ipc)
    slot_N = np.tile(np.arange(ipc, dtype=np.int32), classes)
    return class_N, slot_N
