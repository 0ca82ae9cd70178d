"""Relabel: soft labels over augmented views, for the synthetic set and the controls.

relabel/labels-<shard>.array_record   a block of epochs, one record per batch
relabel/manifest.json                 teachers, views, and the digest of the images labelled

With ``relabel.mode = "online"`` there is nothing to do and no folder: ``open_labels`` gives
labels that are made when they are read, to the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator

from etils import epath

from prism_jax import parallel, progress
from prism_jax.analysis.words import SYNTHETIC
from prism_jax.config import SOFT_CONTROLS, Experiment
from prism_jax.core.augment import Augment
from prism_jax.data import image_set, label_store, workdir
from prism_jax.data.sets.fkd import FkdLabels
from prism_jax.errors import UserError
from prism_jax.labelling import FixedLabels, Labeller, LabelRecipe, OnlineLabels
from prism_jax.parallel import enough_memory
from prism_jax.stages import fingerprints, imported
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.types import SoftLabels

DONE = label_store.MANIFEST


def folder(labelled: LabelledSet) -> epath.Path:
    return labelled.root / "relabel"


def augment_of(config: Experiment) -> Augment:
    """The distribution of views and mixes, which students replay."""
    relabel = config.relabel
    return Augment(**{f.name: getattr(relabel, f.name) for f in dataclasses.fields(Augment)})


def recipe_of(config: Experiment, batch_size: int) -> LabelRecipe:
    """What decides the logits."""
    relabel = config.relabel
    return LabelRecipe(
        augment_of(config),
        relabel.ensemble,
        batch_size,
        relabel.priors,
        relabel.prior_temperature,
        relabel.teacher_mode,
        relabel.bn_group,
        config.label_parts,
        relabel.order,
    )


def plan_of(context: Context, labelled: LabelledSet) -> label_store.LabelPlan:
    """The geometry of a set's store."""
    return plan_for(context, len(labelled.labels_N))


def plan_for(context: Context, count: int) -> label_store.LabelPlan:
    """The geometry of a store for so many images; a set smaller than a batch is one batch."""
    relabel = context.config.relabel
    return label_store.LabelPlan.of(
        count,
        context.config.dataset.num_classes,
        batch_size=min(relabel.batch_size, count),
        epochs=relabel.epochs,
        precision=relabel.precision,
        top_k=relabel.top_k,
    )


def labelled_times(e: Experiment) -> float:
    """How many sets a run labels for ``relabel.epochs``: one for each that has soft labels.

    Labels that are made while students train are made for every training anew.
    """
    sets = [] if e.relabel.labels_from or not e.soft_labels else [SYNTHETIC]
    sets += [name for name in e.validate.controls if name in SOFT_CONTROLS and e.soft_labels]
    if e.relabel.mode != "online":
        return len(sets)
    trainings = len(e.validate.seeds) * len(e.validate.students)
    return len(sets) * trainings * e.validate.epochs / e.relabel.epochs


def pending(context: Context, labelled: LabelledSet) -> list[int]:
    """Shards that are not there yet; labels of other settings count as none."""
    root, plan = folder(labelled), plan_of(context, labelled)
    if not workdir.fits(root, fingerprints.relabel(context, labelled)):
        return list(range(plan.num_shards))
    return label_store.missing_shards(root, plan)


def is_done(context: Context, labelled: LabelledSet) -> bool:
    """Whether the labels are there, or need not be."""
    if context.config.relabel.mode == "online" or imported.has_labels(context, labelled):
        return True
    return not pending(context, labelled) and (folder(labelled) / DONE).exists()


def labeller_of(context: Context, plan: label_store.LabelPlan) -> Labeller:
    """The teachers, ready to label whole batches on every device."""
    return Labeller(
        context.networks.pool(context.config.relabel.teachers, context.config.relabel.dtype),
        recipe_of(context.config, plan.batch_size),
        devices=parallel.lane_devices(plan.batches_per_epoch),
        how=context.config.parallel.map,
    )


def run(context: Context, labelled: LabelledSet) -> None:
    """Label every epoch that is missing, then write the manifest."""
    root, config = folder(labelled), context.config
    plan, timing = plan_of(context, labelled), root / "timing.json"
    begun = len(pending(context, labelled)) < plan.num_shards
    before = workdir.read_json(timing)["seconds"] if begun and timing.exists() else 0.0
    shards = context.work.deal(
        f"relabel {labelled.name}",
        range(plan.num_shards),
        lambda: pending(context, labelled),
        lambda: context.work.begin(root, fingerprints.relabel(context, labelled)),
    )
    started = time.monotonic()

    def note() -> None:
        """How long it took in all, also where it is stopped and goes on."""
        if parallel.is_main():
            seconds = before + time.monotonic() - started
            workdir.write_record(timing, {"seconds": seconds})

    if shards:
        try:
            with enough_memory(
                f"Lower relabel.batch_size and validate.batch_size (now {plan.batch_size} images)."
            ):
                _label(context, labelled, shards)
        finally:
            note()
    if not parallel.is_main():
        context.work.wait(lambda: is_done(context, labelled))
        return
    context.work.wait(lambda: not label_store.missing_shards(root, plan))
    note()
    view = dataclasses.asdict(recipe_of(context.config, plan.batch_size))
    label_store.write_manifest(
        root,
        plan,
        images=image_set.digest(labelled.images_uint8_NHWC),
        teachers=context.networks.digests(config.relabel.teachers),
        view={**view.pop("augment"), **view, "seed": config.seed},
    )


def _label(context: Context, labelled: LabelledSet, shards: list[int]) -> None:
    """Write shards, every batch of them on one device."""
    root, plan = folder(labelled), plan_of(context, labelled)
    labeller = labeller_of(context, plan)

    def records(shard: int, bar: progress.Bar) -> Iterator[SoftLabels]:
        for epoch in plan.epochs_of(shard):
            images = labelled.images_uint8_NHWC
            for record in labeller.epoch(images, epoch, seed=context.config.seed):
                context.stop.check()  # a shard begun is not there; its epochs are labelled again
                yield record
            bar.advance(1)

    left = sum(len(plan.epochs_of(shard)) for shard in shards)
    with progress.task(f"relabel {labelled.name}", left, unit="epoch") as bar:
        for shard in shards:
            label_store.write_shard(root, plan, shard, records(shard, bar))


@contextlib.contextmanager
def setting_aside(context: Context, labelled: LabelledSet) -> Iterator[None]:
    """Set aside what turns out to be damaged while the labels are read; the next run redoes it."""
    try:
        yield
    except image_set.DamagedFile as error:
        if error.path.parent != folder(labelled) or not error.path.exists():
            raise
        context.work.acquire()
        workdir.set_aside(error.path)
        again = "Run the same command again to redo it; what was there is set aside."
        raise image_set.DamagedFile(error.path, error.problem, again) from error


Labels = label_store.LabelReader | OnlineLabels | FkdLabels | FixedLabels


def open_labels(context: Context, labelled: LabelledSet) -> Labels:
    """The labels of a set: stored, and checked to be of these settings and about these very
    images, made when they are read, or made by somebody else.

    Raises:
      UserError: they are not there, or were made from something else.
    """
    if imported.has_labels(context, labelled):
        return imported.open_labels(context, labelled)
    if context.config.relabel.mode == "online":
        plan = plan_of(context, labelled)
        labeller = _online_labeller(context, plan)
        return OnlineLabels(labeller, labelled.images_uint8_NHWC, plan, context.config.seed)
    if not is_done(context, labelled):
        raise UserError(
            f"{folder(labelled)} has no finished soft labels made with these settings; run the "
            f"relabel stage first (--stages=relabel,...)"
        )
    reader = label_store.LabelReader(
        folder(labelled), images=image_set.digest(labelled.images_uint8_NHWC)
    )
    if reader.plan != plan_of(context, labelled):
        raise image_set.DamagedFile(folder(labelled) / DONE, "is damaged: it has another plan")
    return reader


@functools.lru_cache(maxsize=1)
def _online_labeller(context: Context, plan: label_store.LabelPlan) -> Labeller:
    """One for all sets of a size: one program, and the teachers once in the device's memory."""
    return labeller_of(context, plan)
