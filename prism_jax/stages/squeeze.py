"""Squeeze: every teacher the experiment names, trained here or imported from a checkpoint.

squeeze/<teacher>/  fingerprint.json  weights.safetensors  record.json (last: present = done)
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax import parallel
from prism_jax.core.augment import Augment
from prism_jax.data import workdir
from prism_jax.data.pipeline import batches, num_batches
from prism_jax.data.weights import RECORD, WEIGHTS, load, pack, sha256
from prism_jax.errors import UserError
from prism_jax.stages.context import Context, enough_memory, own_normalisation
from prism_jax.stages.loop import train
from prism_jax.training import TrainBatch, Trainer, TrainRecipe, test
from prism_jax.types import PyTree


def pending(context: Context) -> list[str]:
    """Teachers that are not there yet.

    Raises:
      UserError: a teacher is there, but was made from something else.
    """
    return [name for name in context.config.squeeze.teachers if not _is_done(context, name)]


def run(context: Context) -> None:
    """Make every teacher that is missing; each is one process' work."""
    for name in context.deal("squeeze", context.config.squeeze.teachers, lambda: pending(context)):
        folder = context.teacher_folder(name)
        context.begin(folder, context.teacher_fields(name))
        make = _import if context.config.network(name).checkpoint else _train
        with enough_memory(
            f"Lower squeeze.batch_size (now {context.config.squeeze.batch_size} images). It "
            f"belongs to what teachers are made from, so start in another workdir: "
            f"--workdir=<new> --from={context.root}."
        ):
            variables, record = make(context, name, folder)
        data = pack(jax.device_get(variables))
        workdir.write_bytes(folder / WEIGHTS, data)
        leaves = jax.tree.leaves(variables["params"])
        record |= {
            "architecture": context.config.network(name).architecture,
            "width": context.config.network(name).width,
            "depth": context.config.network(name).depth,
            "params": sum(int(np.size(leaf)) for leaf in leaves),
            "batch_norms": len(jax.tree.leaves(variables["batch_stats"])) // 2,
            "sha256": sha256(data),
        }
        workdir.write_record(folder / RECORD, record)
        context.say(f"teacher {name}: top-1 {record['top1']:.1%} on the real test images")
        context.stop.check()
    context.wait(lambda: not pending(context))


def _is_done(context: Context, name: str) -> bool:
    folder = context.teacher_folder(name)
    found = workdir.read_fingerprint(folder)
    if found is None:
        return False
    if lines := workdir.differences(found, context.teacher_fields(name)):
        raise UserError(refusal(f"teacher {name}", folder, lines))
    return (folder / RECORD).exists()


def refusal(what: str, folder: epath.Path, lines: list[str]) -> str:
    """Why something made from other settings is not overwritten, and the three ways on."""
    changed = "\n".join(f"  - {line}" for line in lines)
    return (
        f"{what} in {folder} was made from other settings:\n{changed}\n"
        f"Nothing was changed. Either use another --workdir (with --from={folder.parent.parent} "
        f"to adopt every stage that still fits), or restore these values, or delete {folder}."
    )


def recipe_of(context: Context, name: str) -> TrainRecipe:
    """How a teacher is trained."""
    squeeze = context.config.squeeze
    return TrainRecipe(
        views=f"squeeze/view/{name}",
        augment=Augment(squeeze.crop_min, squeeze.flip, crop_pad=squeeze.crop_pad),
        loss="ce",
        epochs=squeeze.epochs,
        optimiser=squeeze.optimiser,
        learning_rate=squeeze.learning_rate,
        weight_decay=squeeze.weight_decay,
        schedule=squeeze.schedule,
    )


def _train(context: Context, name: str, folder: epath.Path) -> tuple[PyTree, dict[str, Any]]:
    squeeze, dataset = context.config.squeeze, context.config.dataset
    source = context.open("train")
    trainer = Trainer(
        context.build(name, dtype=squeeze.dtype),
        recipe_of(context, name),
        context.normalisation,
        view_seed=squeeze.seed,
        seed=squeeze.seed,
        devices=context.train_devices(squeeze.batch_size),
    )

    def from_batch(start: int):
        for batch in batches(
            source,
            batch_size=squeeze.batch_size,
            epochs=squeeze.epochs,
            seed=squeeze.seed,
            name=f"squeeze/order/{name}",
            start=start,
            continuous=True,
            threads=dataset.threads,
            workers=dataset.workers,
        ):
            yield TrainBatch(batch.epoch, batch.batch, batch.images_BHWC, batch.labels_B)

    trained = train(
        context,
        trainer,
        folder,
        title=f"squeeze {name}",
        batches=from_batch,
        per_epoch=num_batches(len(source), squeeze.batch_size),
        eval_every=1,
        checkpoint_seconds=context.config.validate.checkpoint_seconds,
    )
    record = {"source": "train", "top1": trained.top1, "top5": trained.top5}
    return trained.state.variables, record | {"seconds": trained.seconds}


def _import(context: Context, name: str, folder: epath.Path) -> tuple[PyTree, dict[str, Any]]:
    network = context.config.network(name)
    context.say(f"importing {name} from {network.checkpoint}")
    module = context.build(name)
    variables = load(
        network.checkpoint,
        network.architecture,
        module.num_classes,
        image_shape=context.image_shape,
        width=network.width,
        depth=network.depth,
        stem=network.stem,
    )
    images, labels = context.test_set()
    result = test(
        module,
        variables,
        images,
        labels,
        own_normalisation(network) or context.normalisation,
        class_indices=context.class_indices(name),
        mesh=parallel.data_mesh(context.train_devices(context.config.squeeze.batch_size)),
    )
    return variables, {
        "source": epath.Path(network.checkpoint).name,
        "top1": result.top1,
        "top5": result.top5,
    }
