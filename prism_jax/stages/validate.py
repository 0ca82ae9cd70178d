"""Validate: train students on a set of images and test them on the real test images.

    validate/<student>/<seed>/  metrics.jsonl  checkpoints/  answers.json
                                record.json (last: present = done)

The synthetic set and every control go through this same code. Where the data set holds out a part
of its training images, students are tested on it too, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from etils import epath

from prism_jax import parallel
from prism_jax.config import Experiment, bn_group_of
from prism_jax.core.augment import Augment
from prism_jax.data import answers, workdir
from prism_jax.data.checkpoints import read_newest
from prism_jax.data.pipeline import num_batches
from prism_jax.data.weights import RECORD, variables_of
from prism_jax.errors import UserError
from prism_jax.models.import_torch import variable_shapes
from prism_jax.parallel import enough_memory
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.inputs import HELD_OUT
from prism_jax.stages.loop import train
from prism_jax.stages.relabel import Labels
from prism_jax.training import (
    TrainBatch,
    Trainer,
    TrainRecipe,
    hard_batches,
    soft_batches,
)
from prism_jax.types import PyTree


def folder(labelled: LabelledSet, student: str, seed: int) -> epath.Path:
    return labelled.root / "validate" / student / str(seed)


def students(context: Context) -> list[tuple[str, int]]:
    """(student, seed) pairs, in the order they are trained."""
    validate = context.config.validate
    return [(student, seed) for student in validate.students for seed in validate.seeds]


def pending(context: Context, labelled: LabelledSet) -> list[tuple[str, int]]:
    """Students that are not trained yet; those of other settings count as none."""
    return [
        (student, seed)
        for student, seed in students(context)
        if not _is_done(context, labelled, student, seed)
    ]


def run(
    context: Context,
    labelled: LabelledSet,
    labels: Labels | None,
    augment: Augment,
    todo: Sequence[tuple[str, int]],
) -> None:
    """Train students.

    Args:
      labels: the set's soft labels; None trains on hard labels.
      augment: the views and mixes; for soft labels, those they were made with.
      todo: which (student, seed).
    """
    assert (labels is not None) == labelled.soft, labelled.name
    validate = context.config.validate
    for student, seed in todo:
        with enough_memory(
            f"Raise validate.accumulate (now {validate.accumulate}): a batch is then worked on in "
            f"smaller parts. Or lower validate.batch_size and relabel.batch_size (now "
            f"{validate.batch_size} images)."
        ):
            _train(context, labelled, labels, augment, student, seed)
        context.stop.check()


def right_answers(context: Context, labelled: LabelledSet) -> dict[str, dict[str, list]]:
    """Which answers of a set's students are right: by part and student, packed, one per seed.

    None stands for a student whose answers were not kept.
    """
    parts = ("test", *((HELD_OUT,) if context.config.dataset.held_out else ()))
    found: dict[str, dict[str, list]] = {part: {} for part in parts}
    for student, seed in students(context):
        said = answers.read(folder(labelled, student, seed))
        for part, by_student in found.items():
            truth_N = context.inputs.open(part).labels_N
            right = answers.pack_right(said[part] == truth_N) if part in said else None
            by_student.setdefault(student, []).append(right)
    return found


def epochs_of(context: Context, labelled: LabelledSet) -> int:
    """Epochs for a set: the configured ones for a set of the synthetic size.

    A larger set (``full_real``) gets as many optimiser steps, and at least squeeze's epochs.
    """
    return epochs_of_size(context.config, len(labelled.labels_N))


def epochs_of_size(config: Experiment, images: int) -> int:
    """The same, of a set of so many images."""
    size = config.validate.batch_size
    synthetic = config.recover.ipc * config.dataset.num_classes
    if images <= synthetic:
        return config.validate.epochs
    steps = config.validate.epochs * num_batches(synthetic, size)
    return max(-(-steps // num_batches(images, size)), config.squeeze.epochs_over(images))


def recipe_of(context: Context, augment: Augment, loss: str, epochs: int) -> TrainRecipe:
    """How a student is trained for some epochs."""
    validate = context.config.validate
    return TrainRecipe(
        views="relabel/view",
        augment=augment,
        loss=loss,
        ce_weight=validate.ce_weight,
        temperature=validate.temperature,
        epochs=epochs,
        accumulate=validate.accumulate,
        bn_group=bn_group_of(validate),
        optimiser=validate.optimiser,
        learning_rate=validate.learning_rate,
        weight_decay=validate.weight_decay,
        decay=validate.decay,
        momentum=validate.momentum,
        nesterov=validate.nesterov,
        schedule=validate.schedule,
        zeta=validate.zeta,
        milestones=validate.milestones,
        gamma=validate.gamma,
        warmup=min(validate.warmup_epochs, epochs - 1),  # full_real may have fewer epochs
        warmup_start=validate.warmup_start,
        ema=validate.ema,
        ema_statistics=validate.ema_statistics,
    )


def load(context: Context, labelled: LabelledSet, student: str, seed: int) -> PyTree:
    """A finished student's variables.

    Raises:
      UserError: it is not finished, or its checkpoint is not whole.
    """
    root = folder(labelled, student, seed)
    if not _is_done(context, labelled, student, seed):
        raise UserError(
            f"student {student} is not in {root}; run the validate stage first "
            f"(--stages=validate,...)"
        )
    if (found := read(context, root, student)) is None:
        raise UserError(
            f"{root} has no checkpoint of its student; delete it and run the same command again"
        )
    return found


def read(context: Context, trained: epath.Path, student: str) -> PyTree | None:
    """The variables of a finished student; None where its checkpoint is not there.

    Args:
      trained: its folder.

    Raises:
      UserError: the checkpoint is damaged, of before the end, or another network's.
    """
    checkpoints = trained / "checkpoints"
    steps = workdir.read_record(trained / RECORD).get("steps")  # older versions do not say
    try:
        found = read_newest(checkpoints, step=steps) if checkpoints.exists() else None
    except UserError as error:
        raise UserError(
            f"{error}. Delete {trained} and run the same command again: {student} is trained anew"
        ) from error
    if found is None:
        return None
    _, leaves, meta = found
    module = context.networks.build(student, student=True)
    like = variable_shapes(module, context.inputs.image_shape)
    averaged = meta.get("averaged", context.config.validate.ema is not None)
    variables = variables_of(leaves, averaged, {"batch_stats": {}} | like)
    if variables is None:
        raise UserError(f"the checkpoint in {checkpoints} is of another network than {student}")
    return variables


def _is_done(context: Context, labelled: LabelledSet, student: str, seed: int) -> bool:
    root = folder(labelled, student, seed)
    fields = fingerprints.validate(context, labelled, student, seed)
    return (root / RECORD).exists() and workdir.fits(root, fields)


def _begins_as(context: Context, student: str, seed: int) -> str | None:
    """A teacher that labels and was trained here from the same initial weights, if there is one."""
    config = context.config
    if seed != config.squeeze.seed:
        return None
    alike = config.network(student).untrained()
    for name in config.relabel.teachers:
        network = config.network(name)
        if not network.weights and network.untrained() == alike:
            return name
    return None


def _train(
    context: Context,
    labelled: LabelledSet,
    labels: Labels | None,
    augment: Augment,
    student: str,
    seed: int,
) -> None:
    validate, root = context.config.validate, folder(labelled, student, seed)
    if labels and (twin := _begins_as(context, student, seed)):
        note = (
            f"note: {student} of seed {seed} begins at the weights at which its labels' teacher "
            f"{twin} began; where the two must be independent, choose other validate.seeds"
        )
        context.once(note, lambda: context.say(note))
    context.work.begin(root, fingerprints.validate(context, labelled, student, seed))
    images, targets = labelled.images_uint8_NHWC, labelled.labels_N
    epochs, size = epochs_of(context, labelled), min(validate.batch_size, len(targets))
    recipe = recipe_of(context, augment, "ce" if labels is None else validate.loss, epochs)

    per_epoch = labels.plan.batches_per_epoch if labels else num_batches(len(targets), size)

    def from_batch(start: int) -> Iterable[TrainBatch]:
        if labels:
            records = labels.read(start=start, epochs=epochs)
            return soft_batches(
                images, targets, records, per_epoch=per_epoch, start=start,
                weights_N=labelled.weights_N,
            )  # fmt: skip
        return hard_batches(
            images, targets, batch_size=size, epochs=epochs, seed=context.config.seed,
            name="relabel/order", start=start, weights_N=labelled.weights_N,
        )  # fmt: skip

    devices = context.train_devices(
        min(labels.plan.batch_size if labels else size, len(targets)),
        accumulate=recipe.accumulate,
        bn_group=recipe.bn_group,
    )
    several = len(students(context)) * (1 + len(validate.controls)) > 1
    there = parallel.local_devices()
    if several and there > devices and parallel.platform() == "gpu":
        note = (
            f"note: {devices} of {there} devices share a student's batch. With a process for each "
            f"device (launch/local.sh -n {there} -g; SLURM: --ntasks-per-node={there}) as many "
            f"students train at a time"
        )
        context.once(note, lambda: context.say(note))
    trainer = Trainer(
        context.networks.build(student, student=True, dtype=context.config.validate.dtype),
        recipe,
        context.inputs.normalisation,
        view_seed=context.config.seed,
        seed=seed,
        devices=devices,
    )
    trained = train(
        context,
        trainer,
        root,
        title=f"validate {labelled.name}/{student}/{seed}",
        batches=from_batch,
        per_epoch=per_epoch,
        eval_every=min(validate.eval_every, epochs),
        checkpoint_seconds=validate.checkpoint_seconds,
    )
    record = {
        "student": student,
        "seed": seed,
        "epochs": epochs,
        "steps": int(trained.state.step),
        "devices": devices,
        "top1": trained.top1,
        "top5": trained.top5,
        "best_top1": trained.best_top1,
        "per_class": trained.per_class,
        "seconds": trained.seconds,
    }
    said = {"test": trained.answers_N}
    if context.config.dataset.held_out:
        result = trainer.test(trained.state, *context.inputs.real_set(HELD_OUT))
        record["held_out"] = result.top1
        said[HELD_OUT] = result.answers_N
    answers.write(root, said, context.config.dataset.num_classes)
    workdir.write_record(root / RECORD, record)
