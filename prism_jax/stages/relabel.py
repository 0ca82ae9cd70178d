"""Relabel: soft labels over augmented views, for the synthetic set and the controls.

relabel/labels-<shard>.array_record   a block of epochs, one record per batch
relabel/manifest.json                 teachers, views, and the digest of the images labelled
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from etils import epath

from prism_jax import parallel, progress
from prism_jax.core.augment import Augment
from prism_jax.data import image_set, label_store, workdir
from prism_jax.errors import UserError
from prism_jax.labelling import Labeller, LabelRecipe
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.types import SoftLabels

DONE = label_store.MANIFEST


def folder(labelled: LabelledSet) -> epath.Path:
    return labelled.root / "relabel"


def augment_of(context: Context) -> Augment:
    """The distribution of views and mixes, which students replay."""
    relabel = context.config.relabel
    return Augment(relabel.crop_min, relabel.flip, relabel.mix, relabel.mix_alpha)


def plan_of(context: Context, labelled: LabelledSet) -> label_store.LabelPlan:
    """The geometry of the store; a set smaller than a batch is one batch."""
    relabel, count = context.config.relabel, len(labelled.labels_N)
    return label_store.LabelPlan.of(
        count,
        context.config.dataset.num_classes,
        batch_size=min(relabel.batch_size, count),
        epochs=relabel.epochs,
        precision=relabel.precision,
    )


def pending(context: Context, labelled: LabelledSet) -> list[int]:
    """Shards that are not there yet; labels of other settings count as none."""
    root, plan = folder(labelled), plan_of(context, labelled)
    if not context.fits(root, context.relabel_fields(labelled)):
        return list(range(plan.num_shards))
    return label_store.missing_shards(root, plan)


def is_done(context: Context, labelled: LabelledSet) -> bool:
    return not pending(context, labelled) and (folder(labelled) / DONE).exists()


def run(context: Context, labelled: LabelledSet) -> None:
    """Label every epoch that is missing, then write the manifest."""
    root, config = folder(labelled), context.config
    context.begin(root, context.relabel_fields(labelled))
    plan, shards = plan_of(context, labelled), pending(context, labelled)
    labeller = Labeller(
        context.pool(config.relabel.teachers),
        LabelRecipe(augment_of(context), config.relabel.ensemble, plan.batch_size, plan.precision),
        devices=parallel.lane_devices(plan.batches_per_epoch),
        how=config.parallel.map,
    )

    def records(shard: int, bar: progress.Bar) -> Iterator[SoftLabels]:
        for epoch in plan.epochs_of(shard):
            yield from labeller.epoch(labelled.images_uint8_NHWC, epoch, seed=config.seed)
            bar.advance(1)
            context.stop.check()  # a shard begun is not there; its epochs are labelled again

    left = sum(len(plan.epochs_of(shard)) for shard in shards)
    seconds = time.monotonic()
    with progress.task(f"relabel {labelled.name}", left, unit="epoch") as bar:
        for shard in parallel.process_share(shards):
            label_store.write_shard(root, plan, shard, records(shard, bar))
    workdir.write_json(root / "timing.json", {"seconds": time.monotonic() - seconds})
    view = dataclasses.asdict(augment_of(context))
    label_store.write_manifest(
        root,
        plan,
        images=image_set.digest(labelled.images_uint8_NHWC),
        teachers=context.weights_digests(config.relabel.teachers),
        view={**view, "ensemble": config.relabel.ensemble, "seed": config.seed},
    )


def open_labels(context: Context, labelled: LabelledSet) -> label_store.LabelReader:
    """The finished labels of a set, checked to be of these settings and about these very images.

    Raises:
      UserError: they are not there, or were made from something else.
    """
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
