"""Statistics of the real images inside teachers, where recover matches them: a part of squeeze.

squeeze/<teacher>/statistics/<kind>-<digest>/
    shards/<shard>.safetensors   a part of the pass over the training set
    statistics.safetensors       all of it
    record.json                  written last: done

"conv" are convolutions' statistics over batches of the training set (G-VBSM), "class" those of
every class, of BatchNorms' and convolutions' inputs (EDC). Experiments that want the same ones
share them, as they share teachers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from prism_jax import parallel, progress
from prism_jax.data import weights, workdir
from prism_jax.data.pipeline import Batch, batches, num_batches
from prism_jax.data.sources import ImageSource, Subset
from prism_jax.data.weights import RECORD, sha256
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context
from prism_jax.synthesis import measuring
from prism_jax.synthesis.measuring import Measurer
from prism_jax.teachers import TeacherPool
from prism_jax.types import PyTree

FILE = "statistics.safetensors"
ORDER = "squeeze/statistics/order"
# Of one shard: a piece of work that a run loses at most.
BATCHES, CLASSES = 100, 10


class Part(NamedTuple):
    """A shard of one kind of statistics of one teacher."""

    teacher: str
    kind: str
    shard: int


def folder(context: Context, teacher: str, kind: str) -> epath.Path:
    name = f"{kind}-{workdir.digest(fingerprints.statistics(context, teacher)[kind])}"
    return context.networks.folder(teacher) / "statistics" / name


def is_done(context: Context) -> bool:
    return all(
        (folder(context, teacher, kind) / RECORD).exists() for teacher, kind in _needed(context)
    )


def run(context: Context) -> None:
    """Measure every shard that is missing, then put each teacher's together."""
    needed = _needed(context)
    parts = [Part(*what, shard) for what in needed for shard in range(_shards(context, what[1]))]

    def prepare() -> None:
        for teacher, kind in needed:
            context.work.begin(
                folder(context, teacher, kind), fingerprints.statistics(context, teacher)[kind]
            )

    def missing() -> list[Part]:
        return [
            part
            for part in parts
            if not (folder(context, *part[:2]) / RECORD).exists()
            and not _shard_file(context, part).exists()
        ]

    mine = context.work.deal("statistics", parts, missing, prepare)
    with progress.task("statistics", len(mine), unit="shard") as bar:
        for (teacher, kind), group in itertools.groupby(mine, lambda part: part[:2]):
            measurer = measurer_of(context, teacher, kind)
            for part in group:
                tree = _measure(context, measurer, kind, part.shard)
                workdir.write_bytes(_shard_file(context, part), weights.pack(tree))
                bar.advance(1)
                context.stop.check()
    if not parallel.is_main():
        context.work.wait(lambda: is_done(context))
        return
    context.work.wait(lambda: not missing())
    for teacher, kind in needed:
        _put_together(context, teacher, kind)


def with_targets(context: Context, pool: TeacherPool) -> TeacherPool:
    """A pool whose variables hold the statistics that recover matches.

    Raises:
      UserError: they are not there, or damaged.
    """
    variables = list(pool.variables)
    for teacher, kind in _needed(context):
        root, at = folder(context, teacher, kind), pool.index(teacher)
        if not (root / RECORD).exists():
            raise UserError(
                f"the statistics of real images in teacher {teacher} are not in {root}; run the "
                f"squeeze stage first (--stages=squeeze,...)"
            )
        data = (root / FILE).read_bytes() if (root / FILE).exists() else b""
        if sha256(data) != workdir.read_record(root / RECORD)["sha256"]:
            raise UserError(
                f"{root / FILE} is damaged: its content is not what was written. Delete {root} "
                f"and run the same command again to redo it."
            )
        name = {"conv": measuring.CONV, "class": measuring.CLASSES}[kind]
        variables[at] = {**variables[at], name: weights.unpack(data)}
    return dataclasses.replace(pool, variables=tuple(variables))


def _needed(context: Context) -> list[tuple[str, str]]:
    """(teacher, kind) pairs, in the order they are worked on."""
    return [
        (t, kind)
        for t in context.config.recover.pool
        for kind in fingerprints.statistics(context, t)
    ]


# --- one shard ------------------------------------------------------------------------------


def _shards(context: Context, kind: str) -> int:
    if kind == "class":
        return num_batches(context.config.dataset.num_classes, CLASSES)
    count = num_batches(len(context.inputs.open("train")), context.config.squeeze.batch_size)
    return num_batches(count, BATCHES)


def _shard_file(context: Context, part: Part) -> epath.Path:
    root = folder(context, part.teacher, part.kind)
    return root / "shards" / f"{part.shard:05d}.safetensors"


def measurer_of(context: Context, teacher: str, kind: str) -> Measurer:
    """One kind of statistics in one teacher, on every device."""
    pool, squeeze = context.networks.pool([teacher]), context.config.squeeze
    return Measurer(
        pool.teachers[0],
        pool.variables[0],
        context.inputs.normalisation,
        per_image=kind == "class",
        batch_size=squeeze.batch_size,
        patch=context.config.recover.statistic_patch,
        crop_min=squeeze.crop_min,
        crop_pad=squeeze.crop_pad,
        flip=squeeze.flip,
        seed=squeeze.seed,
        devices=parallel.devices(),
        how=context.config.parallel.map,
    )


def _measure(context: Context, measurer: Measurer, kind: str, shard: int) -> PyTree:
    """A shard's content: the sum over its batches, or the means of its classes."""
    source = context.inputs.open("train")
    if kind == "conv":
        start = shard * BATCHES
        found: Iterator[Batch] = itertools.islice(_batches(context, source, start=start), BATCHES)
        count, total = measurer.total(found, group=0)
        return {"count": np.array([count], np.int64), "sum": total["conv"]}
    classes = range(shard * CLASSES, min((shard + 1) * CLASSES, context.config.dataset.num_classes))
    means = []
    for cls in classes:
        members = Subset(source, np.flatnonzero(source.labels_N == cls))
        if not len(members):
            raise UserError(f"class {cls} has no training images, and so no statistics")
        found = _batches(context, members, shuffle=False)
        means.append(measuring.mean([measurer.total(found, group=cls + 1)]))
    return jax.tree.map(lambda *x: np.stack(x), *means)


def _batches(context: Context, source: ImageSource, **options: Any) -> Iterator[Batch]:
    squeeze = context.config.squeeze
    return batches(
        source, batch_size=squeeze.batch_size, epochs=1, seed=squeeze.seed, name=ORDER,
        threads=context.config.dataset.threads, **options,
    )  # fmt: skip


def _put_together(context: Context, teacher: str, kind: str) -> None:
    root = folder(context, teacher, kind)
    if (root / RECORD).exists():
        return
    parts = [Part(teacher, kind, shard) for shard in range(_shards(context, kind))]
    shards = [weights.unpack(_shard_file(context, part).read_bytes()) for part in parts]
    if kind == "conv":
        tree = measuring.mean([(int(shard["count"][0]), shard["sum"]) for shard in shards])
    else:
        tree = jax.tree.map(lambda *x: np.concatenate(x), *shards)
    data = weights.pack(tree)
    workdir.write_bytes(root / FILE, data)
    workdir.write_record(root / RECORD, {"sha256": sha256(data)})
    workdir.remove(root / "shards")
