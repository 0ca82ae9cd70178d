"""What teachers tell of the real images, where recover or a control asks for it: a part of squeeze.

squeeze/<teacher>/statistics/<kind>-<digest>/
    shards/<shard>.safetensors   a part of the pass over the training set
    statistics.safetensors       all of it
    record.json                  written last: done

"conv" are convolutions' statistics over batches of the training set (G-VBSM), "class" those of
every class, of BatchNorms' and convolutions' inputs (EDC), "group" those of BatchNorms' inputs over
groups of equal difficulty (PSM). "features" and "difficulty" are of every image by itself: a shard
is a class, and they stay in their shards. Experiments that want the same ones share them, as they
share teachers.

A kill loses the shard that is worked on, and so does a stop, which is honoured before each batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from prism_jax import parallel, progress, rng
from prism_jax.config import Experiment
from prism_jax.data import weights, workdir
from prism_jax.data.pipeline import Batch, batches, num_batches
from prism_jax.data.sources import ImageSource, Subset
from prism_jax.data.weights import RECORD, sha256
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context
from prism_jax.synthesis import measuring
from prism_jax.synthesis.measuring import Measurer, Reader
from prism_jax.synthesis.objective import GROUPS
from prism_jax.synthesis.selection import Features, difficulty_groups
from prism_jax.teachers import TeacherPool
from prism_jax.types import PyTree

FILE = "statistics.safetensors"
ORDER, GROUP_ORDER = "squeeze/statistics/order", "squeeze/statistics/group"
# Of one shard: a piece of work that a run loses at most.
BATCHES, CLASSES = 100, 10
# Of every image by itself, and what is worked out from it: in this order.
OF_IMAGES = {"features": measuring.features_of, "difficulty": measuring.difficulty_of}
COLLECTIONS = {"conv": measuring.CONV, "class": measuring.CLASSES, "group": GROUPS}


# Which shard of its kind; of groups, which group and which part of it.
Shard = tuple[int, ...]


class Part(NamedTuple):
    """A shard of one kind of statistics of one teacher."""

    teacher: str
    kind: str
    shard: Shard


def folder(context: Context, teacher: str, kind: str) -> epath.Path:
    name = f"{kind}-{workdir.digest(_fields(context, teacher, kind))}"
    return context.networks.folder(teacher) / "statistics" / name


def needed(config: Experiment) -> list[tuple[str, str]]:
    """(teacher, kind) pairs, in the order they are worked on: groups need difficulties."""
    recover = config.recover
    asker = recover.scorer or recover.primary
    found = [(asker, "features")] if fingerprints.reads_features(config) else []
    found += [(t, "difficulty") for t in fingerprints.rankers(config)]
    return found + _matched(config)


def is_done(context: Context) -> bool:
    return _are_there(context, needed(context.config))


def _are_there(context: Context, wanted: list[tuple[str, str]]) -> bool:
    return all((folder(context, *what) / RECORD).exists() for what in wanted)


def run(context: Context) -> None:
    """Measure every shard that is missing, then put each teacher's together."""
    wanted = needed(context.config)
    for name, level in (
        ("statistics", [what for what in wanted if what[1] != "group"]),
        ("statistics of groups", [what for what in wanted if what[1] == "group"]),
    ):
        if not _are_there(context, level):
            _run(context, name, level)


def _run(context: Context, name: str, wanted: list[tuple[str, str]]) -> None:
    parts = [Part(*what, shard) for what in wanted for shard in _shards(context, what[1])]
    roots = {what: folder(context, *what) for what in wanted}

    def prepare() -> None:
        for what in wanted:
            context.work.begin(roots[what], _fields(context, *what))

    def missing() -> list[Part]:
        there = {what: workdir.names(root / "shards") for what, root in roots.items()}
        open_ = {what for what, root in roots.items() if not (root / RECORD).exists()}
        return [
            part
            for part in parts
            if part[:2] in open_ and _shard_name(part.shard) not in there[part[:2]]
        ]

    mine = context.work.deal(name, parts, missing, prepare)
    with progress.task(name, len(mine), unit="shard") as bar:
        for (teacher, kind), group in itertools.groupby(mine, lambda part: part[:2]):
            measurer = measurer_of(context, teacher, kind)
            for part in group:
                tree = _measure(context, measurer, kind, part.shard)
                path = roots[teacher, kind] / "shards" / _shard_name(part.shard)
                workdir.write_bytes(path, weights.pack(tree))
                bar.advance(1)
                context.stop.check()
    if not parallel.is_main():
        context.work.wait(lambda: all((root / RECORD).exists() for root in roots.values()))
        return
    context.work.wait(lambda: not missing())
    for teacher, kind in wanted:
        _put_together(context, teacher, kind)


def with_targets(context: Context, pool: TeacherPool) -> TeacherPool:
    """A pool whose variables hold the statistics that recover matches.

    Raises:
      UserError: they are not there, or damaged.
    """
    variables = list(pool.variables)
    for teacher, kind in _matched(context.config):
        root, at = folder(context, teacher, kind), pool.index(teacher)
        if not (root / RECORD).exists():
            raise UserError(
                f"the statistics of real images in teacher {teacher} are not in {root}; run the "
                f"squeeze stage first (--stages=squeeze,...)"
            )
        data = (root / FILE).read_bytes() if (root / FILE).exists() else b""
        if sha256(data) != workdir.read_record(root / RECORD)["sha256"]:
            raise _damaged(root / FILE, root)
        variables[at] = {**variables[at], COLLECTIONS[kind]: weights.unpack(data)}
    return dataclasses.replace(pool, variables=tuple(variables))


def features(context: Context, teacher: str, cls: int) -> Features:
    """What a teacher says of the images of a class.

    Raises:
      UserError: it was not read, or is damaged.
    """
    return Features(**_of_images(context, teacher, "features", cls))


def groups(context: Context, cls: int) -> list[np.ndarray]:
    """A class's groups of difficulty, one for each slot; positions in the class.

    Raises:
      UserError: how difficult its images are was not read, or is damaged.
    """
    found = [
        _of_images(context, teacher, "difficulty", cls)["difficulty_N"]
        for teacher in fingerprints.rankers(context.config)
    ]
    return difficulty_groups(np.stack(found), context.config.recover.ipc)


def _of_images(context: Context, teacher: str, kind: str, cls: int) -> dict[str, np.ndarray]:
    root = folder(context, teacher, kind)
    path = root / "shards" / _shard_name((cls,))
    if not (root / RECORD).exists():
        raise UserError(
            f"the {kind} of real images in teacher {teacher} are not in {root}; run the squeeze "
            f"stage first (--stages=squeeze,...)"
        )
    data = path.read_bytes() if path.exists() else b""
    if sha256(data) != workdir.read_record(root / RECORD)["sha256"][cls]:
        raise _damaged(path, root)
    return weights.unpack(data)


def _damaged(path: epath.Path, root: epath.Path) -> UserError:
    return UserError(
        f"{path} is damaged: its content is not what was written. Delete {root} and run the same "
        f"command again to redo it."
    )


def _fields(context: Context, teacher: str, kind: str) -> dict[str, Any]:
    if kind in OF_IMAGES:
        return fingerprints.image_facts(context, teacher, kind)
    return fingerprints.statistics(context, teacher)[kind]


def _matched(config: Experiment) -> list[tuple[str, str]]:
    """Those of ``needed`` that recover matches."""
    pool = config.recover.pool
    return [(t, kind) for t in pool for kind in fingerprints.statistic_kinds(config, t)]


# --- one shard ------------------------------------------------------------------------------


def _shards(context: Context, kind: str) -> list[Shard]:
    if kind == "group":
        size, groups = _drawn_groups(context)
        parts = [num_batches(num_batches(len(at), size), BATCHES) for at in groups]
        return [(group, part) for group, count in enumerate(parts) for part in range(count)]
    return [(shard,) for shard in range(_count(context, kind))]


def _count(context: Context, kind: str) -> int:
    classes = context.config.dataset.num_classes
    if kind in OF_IMAGES:
        return classes
    if kind == "class":
        return num_batches(classes, CLASSES)
    count = num_batches(len(context.inputs.open("train")), context.config.squeeze.batch_size)
    return num_batches(count, BATCHES)


def _shard_name(shard: Shard) -> str:
    return f"{'_'.join(f'{number:05d}' for number in shard)}.safetensors"


def measurer_of(context: Context, teacher: str, kind: str) -> Measurer | Reader:
    """One kind of statistics in one teacher, on every device."""
    pool, squeeze = context.networks.pool([teacher]), context.config.squeeze
    if kind in OF_IMAGES:
        function = OF_IMAGES[kind](pool.teachers[0], pool.normalisation)
        how = context.config.parallel.map
        return Reader(function, pool.variables[0], devices=parallel.devices(), how=how)
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
        train=kind == "group",
        devices=parallel.devices(),
        how=context.config.parallel.map,
    )


def _measure(context: Context, measurer: Measurer | Reader, kind: str, shard: Shard) -> PyTree:
    """A shard's content: the sum over its batches, or the means of its classes."""
    source, (first, *_) = context.inputs.open("train"), shard
    if isinstance(measurer, Reader):
        images = _batches(context, _class(source, first), shuffle=False, batch_size=measuring.READ)
        return measurer.read(images, first)
    if kind == "group":
        count, total = measurer.total(_part_of_group(context, *shard), group=first)
        return {"count": np.array([count], np.int64), "sum": total["bn"]}
    if kind == "conv":
        count, total = measurer.total(_part(context, source, first), group=0)
        return {"count": np.array([count], np.int64), "sum": total["conv"]}
    classes = range(first * CLASSES, min((first + 1) * CLASSES, context.config.dataset.num_classes))
    means = []
    for cls in classes:
        found = _batches(context, _class(source, cls), shuffle=False)
        means.append(measuring.mean([measurer.total(found, group=cls + 1)]))
    return jax.tree.map(lambda *x: np.stack(x), *means)


def _class(source: ImageSource, cls: int) -> Subset:
    members = Subset(source, np.flatnonzero(source.labels_N == cls))
    if not len(members):
        raise UserError(f"class {cls} has no training images, and so no statistics")
    return members


def _part_of_group(context: Context, number: int, part: int) -> Iterator[Batch]:
    """A part of a group's images of all classes, in batches as large as in training.

    All have one size, at most that of the smallest group; what the last one lacks are the first
    images again.
    """
    size, groups = _drawn_groups(context)
    at = groups[number]
    whole = np.resize(at, num_batches(len(at), size) * size)
    images = Subset(context.inputs.open("train"), whole)
    return _part(context, images, part, shuffle=False, batch_size=size)


def _drawn_groups(context: Context) -> tuple[int, list[np.ndarray]]:
    """The size of groups' batches, and every group's images of all classes in a drawn order."""
    groups = context.once("groups", lambda: _all_groups(context))
    return min(context.config.squeeze.batch_size, *map(len, groups)), groups


def _all_groups(context: Context) -> list[np.ndarray]:
    source, of_classes = context.inputs.open("train"), []
    for cls in range(context.config.dataset.num_classes):
        members = np.flatnonzero(source.labels_N == cls)
        of_classes.append([members[group] for group in groups(context, cls)])
    return [
        rng.generator(context.config.squeeze.seed, GROUP_ORDER, number).permutation(
            np.concatenate(group)
        )
        for number, group in enumerate(zip(*of_classes, strict=True))
    ]


def _part(context: Context, source: ImageSource, part: int, **options: Any) -> Iterator[Batch]:
    """One of the parts into which a pass over images is cut."""
    found = _batches(context, source, start=part * BATCHES, **options)
    return itertools.islice(found, BATCHES)


def _batches(context: Context, source: ImageSource, **options: Any) -> Iterator[Batch]:
    """Batches of one pass; a stop is honoured before each, and the shard they are of is redone."""
    squeeze = context.config.squeeze
    options = {"batch_size": squeeze.batch_size, **options}
    for batch in batches(
        source, epochs=1, seed=squeeze.seed, name=ORDER,
        threads=context.config.dataset.threads, **options,
    ):  # fmt: skip
        context.stop.check()
        yield batch


def _put_together(context: Context, teacher: str, kind: str) -> None:
    root = folder(context, teacher, kind)
    if (root / RECORD).exists():
        return
    names = _shards(context, kind)
    contents = ((root / "shards" / _shard_name(shard)).read_bytes() for shard in names)
    if kind in OF_IMAGES:
        workdir.write_record(root / RECORD, {"sha256": [sha256(data) for data in contents]})
        return
    shards = [weights.unpack(data) for data in contents]
    if kind == "conv":
        tree = _mean(shards)
    elif kind == "group":
        of_groups: dict[int, list[PyTree]] = {}
        for (group, _), shard in zip(names, shards, strict=True):
            of_groups.setdefault(group, []).append(shard)
        tree = jax.tree.map(lambda *x: np.stack(x), *map(_mean, of_groups.values()))
    else:
        tree = jax.tree.map(lambda *x: np.concatenate(x), *shards)
    data = weights.pack(tree)
    workdir.write_bytes(root / FILE, data)
    workdir.write_record(root / RECORD, {"sha256": sha256(data)})
    workdir.remove(root / "shards")


def _mean(shards: list[PyTree]) -> PyTree:
    """The mean over all images of some shards, each the sum over its own."""
    return measuring.mean([(int(shard["count"][0]), shard["sum"]) for shard in shards])
