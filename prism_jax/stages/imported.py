"""Sets and labels that somebody else made: what is checked and said of them, and their labels.

recover/imported.json   what the label teachers say of an imported set
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from prism_jax import parallel
from prism_jax.data import workdir
from prism_jax.data.exchange import ImageSet
from prism_jax.data.label_store import LabelPlan
from prism_jax.data.sets import fkd
from prism_jax.data.sets.classes import FLAG
from prism_jax.data.weights import sha256
from prism_jax.errors import UserError
from prism_jax.labelling import FixedLabels
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.judging import logits_of

RECORD = "imported.json"
OF_THE_SET = "set"  # relabel.labels_from: the soft labels that came with the images
GIVEN = "labels from elsewhere"  # opened once


def has_labels(context: Context, labelled: LabelledSet) -> bool:
    """Whether a set's labels come from elsewhere; controls are always labelled here."""
    return bool(context.config.relabel.labels_from) and labelled.name == "synthetic"


def check(context: Context) -> None:
    """Say how an imported set was read, and refuse, before any work, what cannot be done with it.

    Raises:
      UserError: weights under a loss that knows none, or soft labels that are not there or
        contradict the set's labels.
    """
    source, config = context.inputs.start, context.config
    if not isinstance(source, ImageSet):
        return
    for note in source.notes if parallel.is_main() else ():
        context.say(note)
    if source.weights_N is not None and config.validate.loss == "dist":
        raise UserError(
            f"the images of {config.recover.initialise_from} have weights, and validate.loss="
            "'dist' compares the images of a batch with one another, which cannot count "
            "differently; choose another validate.loss"
        )
    if config.relabel.labels_from == OF_THE_SET:
        soft_NK = _soft_of_set(context)
        if parallel.is_main():
            _say_of_soft(context, source, soft_NK)


def _say_of_soft(context: Context, source: ImageSet, soft_NK: np.ndarray) -> None:
    """Say in which order the columns of a set's soft labels were taken, and what speaks against it.

    Labels fit well enough where some classes alone change places.
    """
    from prism_jax.analysis.class_order import find_order  # scipy takes long

    if source.soft_note:
        context.say(source.soft_note)
    classes = soft_NK.shape[1]
    other = find_order(soft_NK, source.labels_N, np.arange(classes), classes)
    if other is not None:
        context.say(
            f"warning: the largest soft label is the class of its image for "
            f"{other.stated_top1:.1%}; with the columns in another order for {other.top1:.1%}: "
            f"images of class {_moved(other.order_K)}. Ask those who made the set"
        )


def _moved(order_K: np.ndarray) -> str:
    """The first classes that look like others."""
    moved = np.flatnonzero(order_K != np.arange(len(order_K)))
    seen = [f"{c} look like {order_K[c]}" for c in moved[:5]]
    return ", ".join(seen) + (", ..." if len(moved) > 5 else "")


def _soft_of_set(context: Context) -> np.ndarray:
    """The soft labels that came with the images: float32 logits (N, K).

    Raises:
      UserError: none did.
    """
    source = context.inputs.start
    if not isinstance(source, ImageSet) or source.soft_NK is None:
        raise UserError(
            f"relabel.labels_from is 'set', and {context.config.recover.initialise_from} has no "
            f"soft labels"
        )
    return source.soft_NK


def check_labels(context: Context) -> None:
    """Refuse, before any work, labels from elsewhere that are not of these images and batches."""
    config = context.config
    if config.relabel.labels_from not in (None, OF_THE_SET):
        classes = np.arange(config.dataset.num_classes, dtype=np.int32)
        labels_N = np.repeat(classes, config.recover.ipc)
        context.once(GIVEN, lambda: _fkd(context, labels_N))


def open_labels(context: Context, labelled: LabelledSet) -> fkd.FkdLabels | FixedLabels:
    """The labels of the imported set, or of this run's images, made elsewhere.

    Raises:
      UserError: they are not there, not whole, or not of these images and batches.
    """
    config, count = context.config, len(labelled.labels_N)
    if config.relabel.labels_from != OF_THE_SET:
        return context.once(GIVEN, lambda: _fkd(context, labelled.labels_N))
    size, classes = min(config.relabel.batch_size, count), config.dataset.num_classes
    plan = LabelPlan(count, classes, size, config.relabel.epochs, precision="float32")
    return FixedLabels(_soft_of_set(context), plan, config.seed)


def _fkd(context: Context, labels_N: np.ndarray) -> fkd.FkdLabels:
    config, source = context.config, context.inputs.start
    where, size = config.relabel.labels_from, min(config.relabel.batch_size, len(labels_N))
    assert where is not None  # has_labels
    found = fkd.FkdLabels(
        where,
        labels_N=labels_N,
        num_classes=config.dataset.num_classes,
        image_size=config.dataset.image_size,
        places_N=source.places_N if isinstance(source, ImageSet) else None,
    )
    if found.plan.batch_size != size:
        raise UserError(
            f"{where} labels batches of {found.plan.batch_size} images, in which students train; "
            f"set relabel.batch_size and validate.batch_size (now {size}) to that"
        )
    for note in found.notes if parallel.is_main() else ():
        context.say(note)
    return found


def digest_of_labels(context: Context) -> str:
    """What identifies labels that were made elsewhere."""
    where = context.config.relabel.labels_from
    assert where is not None  # has_labels
    if where == OF_THE_SET:
        return sha256(_soft_of_set(context).tobytes())
    return context.once("digest of given labels", lambda: fkd.digest(where))


def say_top1(
    context: Context, labelled: LabelledSet, pool: Callable[[Sequence[str]], dict[str, str]]
) -> None:
    """Say how many of an imported set's images the label teachers find to be what they are called.

    Images whose classes were mixed up are seen at once: none is. Said once in a workdir, and again
    of another set or of other teachers.

    Args:
      pool: teachers by the digest of what they are made of.
    """
    source, path = context.inputs.start, context.root / "recover" / RECORD
    if not isinstance(source, ImageSet) or not parallel.is_main():
        return
    teachers = context.config.relabel.teachers
    of = workdir.digest({"set": source.describe(), "teachers": pool(teachers)})
    if path.exists():
        before = workdir.read_json(path)
        # Older ones do not say what they are of: then the teachers' names have to do.
        if before["of"] == of if "of" in before else before["top1"].keys() == set(teachers):
            return
    from prism_jax.analysis.class_order import find_order, looks_trained  # scipy takes long

    labels, classes = labelled.labels_N, context.config.dataset.num_classes
    official = context.inputs.info.class_names
    found: dict[str, float] = {}
    for name in teachers:
        logits_NK = logits_of(context, name, labelled.images_uint8_NHWC)
        right_N = logits_NK.argmax(1) == labels
        found[name] = float(right_N.mean())
        context.say(
            f"{name} finds {found[name]:.1%} of the imported images to be of their class (chance "
            f"is {1 / classes:.1%})"
        )
        other = find_order(
            logits_NK,
            labels,
            np.arange(classes),
            classes,
            class_names=source.class_names,
            official_names=official if official and len(official) == classes else None,
        )
        if other is not None:
            context.say(
                f"warning: with the classes in another order it would be {other.top1:.1%}"
                f"{f' ({other.why})' if other.why else ''}: images of class "
                f"{_moved(other.order_K)}. State the order with --config.{FLAG}"
            )
        elif not looks_trained(right_N, classes):
            context.say(
                f"warning: {name} knows next to none of them. Likely causes, in order: classes in "
                f"another order ({FLAG}), float images in another space "
                "(recover.initialise_mean, _std, _whitening), images that this teacher cannot read"
            )
    context.work.acquire()
    workdir.write_json(path, {"format": source.describe()["split"], "top1": found, "of": of})
