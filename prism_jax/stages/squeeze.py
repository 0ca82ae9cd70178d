"""Squeeze: every teacher the experiment names, trained here or imported from a checkpoint.

squeeze/<teacher>/  fingerprint.json  weights.safetensors  record.json (last: present = done)
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from prism_jax import parallel
from prism_jax.config import Experiment, Network
from prism_jax.core import pixels
from prism_jax.core.augment import Augment
from prism_jax.data import workdir
from prism_jax.data.pipeline import batches, num_batches
from prism_jax.data.weights import (
    RECORD,
    WEIGHTS,
    load,
    pack,
    sha256,
    stated_normalisation,
)
from prism_jax.errors import UserError
from prism_jax.models.import_torch import variable_shapes
from prism_jax.models.published import PUBLISHED
from prism_jax.parallel import enough_memory
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context
from prism_jax.stages.loop import train
from prism_jax.synthesis.start import ASKING
from prism_jax.training import TrainBatch, Trainer, TrainRecipe, fresh, test
from prism_jax.types import PyTree


def pending(context: Context) -> list[str]:
    """Teachers that are not there yet.

    Raises:
      UserError: a teacher is there, but was made from something else.
    """
    return [name for name in context.config.squeeze.teachers if not _is_done(context, name)]


def run(context: Context) -> None:
    """Make every teacher that is missing; each is one process' work.

    Those that are only read come first, then those that are trained further: weights that do not
    fit are said before others are trained.
    """
    network = context.config.network
    teachers = sorted(
        context.config.squeeze.teachers,
        key=lambda name: (not network(name).checkpoint, not network(name).start_from),
    )
    for name in context.work.deal("squeeze", teachers, lambda: pending(context)):
        folder, fields = context.networks.folder(name), fingerprints.teacher(context, name)
        make = _import if context.config.network(name).checkpoint else _train
        if (folder / RECORD).exists():
            make = _tested_again
        if make is _train:
            context.work.begin(folder, fields)
        with enough_memory(
            f"Lower squeeze.batch_size (now {context.config.squeeze.batch_size} images). It "
            f"belongs to what teachers are made from, so start in another workdir: "
            f"--workdir=<new> --from={context.root}."
        ):
            variables, record = make(context, name, folder)
        if make is _import:  # only now: weights that do not fit leave nothing behind
            context.work.begin(folder, fields)
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
            "normalisation": dataclasses.asdict(context.networks.normalisation(name)),
        }
        workdir.write_record(folder / RECORD, record)
        context.say(f"teacher {name}: top-1 {record['top1']:.1%} on the real test images")
        _warn(context, name, record["top1"])
        context.stop.check()
    context.work.wait(lambda: not pending(context))


def check_weights(context: Context) -> None:
    """Read the weights of teachers that are not there yet, before other work takes hours.

    Raises:
      UserError: some cannot be read or do not fit.
    """
    for name in pending(context):
        network, module = context.config.network(name), context.networks.build(name)
        if network.checkpoint:
            _load(context, name, network.checkpoint, module)
        elif network.start_from:
            head = fresh(module, context.config.squeeze.seed, context.inputs.image_shape)
            _load(context, name, network.start_from, module, head)


# --- is a teacher worth the work that follows? ------------------------------------------------

FAR = 0.05  # below what published weights are known for, from which a teacher is warned of


def least_top1(classes: int) -> float:
    """What tells a teacher from chance: five times chance, at most a tenth of what is above it."""
    chance = 1 / classes
    return chance + min(4 * chance, 0.1 * (1 - chance))


def check(context: Context) -> None:
    """Stop a run, before recover and relabel spend their time, on a teacher that knows nothing.

    Raises:
      UserError: a teacher that supervises or chooses real images is near or below chance, or
        below ``squeeze.least_top1``.
    """
    config = context.config
    stated, classes = config.squeeze.least_top1, config.dataset.num_classes
    least = least_top1(classes) if stated is None else stated
    recover = config.recover
    names = dict.fromkeys((*(recover.pool if recover.iterations else ()), *config.relabel.teachers))
    if recover.maker == "generate" and config.generate.candidates > 1:
        names[config.judge] = None
    if recover.initialise in ASKING or fingerprints.reads_features(config):
        names[recover.scorer or recover.primary] = None
    names |= dict.fromkeys(fingerprints.rankers(config))
    for name in names:
        record = context.networks.folder(name) / RECORD
        top1 = workdir.read_record(record)["top1"] if record.exists() else None
        if top1 is not None and top1 < least:
            raise UserError(_worthless(context, name, top1, least))


def _worthless(context: Context, name: str, top1: float, least: float) -> str:
    config = context.config
    network, dataset = config.network(name), config.dataset
    said = (
        f"teacher {name} is right on {top1:.1%} of the real test images (chance: "
        f"{1 / dataset.num_classes:.1%}; squeeze.least_top1: {least:.1%}); what it supervises "
        f"or chooses is noise. "
    )
    way_on = (
        f"To go on with it all the same: --config.squeeze.least_top1=0. Nothing was lost; another "
        f"network belongs into another workdir (--workdir=<new> --from={context.root})."
    )
    if not network.checkpoint:
        return (
            f"{said}It was trained for squeeze.epochs={config.squeeze.epochs} (and "
            f"squeeze.least_steps={config.squeeze.least_steps}) at "
            f"squeeze.learning_rate={config.squeeze.learning_rate:g}: train longer, or at another "
            f"rate. {way_on}"
        )
    return (
        f"{said}Likely, in this order:\n"
        f"  - its classes are in another order than the images' folders "
        f"(networks.{name}.class_indices)\n"
        f"  - it was trained with another normalisation (networks.{name}.mean and .std)\n"
        f"  - {network.checkpoint} holds other weights than those of this network\n"
        f"This tells them apart:\n"
        f"    {_evaluation(context, network)}\n"
        f"{way_on}"
    )


def _evaluation(context: Context, network: Network) -> str:
    """The command that evaluates imported weights as this run reads them."""
    dataset, usual = context.config.dataset, Network(network.architecture)
    flags: dict[str, object] = {
        "architecture": network.architecture, "dataset": dataset.name, "source": dataset.source,
        "path": dataset.path,
    }  # fmt: skip
    if dataset.image_size != context.inputs.info.image_size:
        flags["image-size"] = dataset.image_size
    for field in ("width", "depth", "stem", "weights_key", "class_indices"):
        if (value := getattr(network, field)) != getattr(usual, field):
            flags[field.replace("_", "-")] = value
    for field in ("mean", "std"):
        flags[field] = getattr(network, field) or getattr(dataset, field)
    words = ["python", "-m", "prism_jax.tools.teachers", "evaluate", str(network.checkpoint)]
    for flag, value in flags.items():
        if isinstance(value, tuple):
            value = ",".join(f"{x:g}" for x in value)
        words += [] if value is None else [f"--{flag}={value}"]
    return shlex.join(words)


def _warn(context: Context, name: str, top1: float) -> None:
    """Say so where imported weights are far below what they are known for."""
    network, config = context.config.network(name), context.config
    known, percent = PUBLISHED.get(network.architecture, (None, 0.0))
    info = context.inputs.info
    part = known == "imagenet" and context.inputs.open("train").imagenet_indices is not None
    if not network.checkpoint or not (part or known == info.name):
        return
    far = least_top1(config.dataset.num_classes) <= top1 < percent / 100 - FAR
    if far and (network.width, network.depth) == (1.0, 1.0):
        context.say(
            f"warning: teacher {name} is right on {top1:.1%}, and published weights of "
            f"{network.architecture} are known for {percent:.1f} % on {known}. Compare image size "
            f"({config.dataset.image_size}), normalisation and class order: python -m "
            f"prism_jax.tools.teachers evaluate --help"
        )


def _is_done(context: Context, name: str) -> bool:
    folder = context.networks.folder(name)
    found = workdir.read_fingerprint(folder)
    if found is None:
        return False
    lines = workdir.differences(found, fingerprints.teacher(context, name))
    if lines and workdir.names(folder) == {workdir.FINGERPRINT}:
        return False  # it was begun, and refused before anything was made
    if lines:
        raise UserError(refusal(f"teacher {name}", folder, lines))
    if not (folder / RECORD).exists():
        return False
    # Weights stay where test images change, but how often they are right does not.
    tested = workdir.read_record(folder / RECORD).get("tested")
    return tested is None or tested == _tested(context, name)


def _tested(context: Context, name: str) -> str:
    """What a teacher is tested on, and how it reads that, as a digest."""
    return workdir.digest(
        {
            "images": context.inputs.fields(context.inputs.open("test")),
            "normalisation": dataclasses.asdict(context.networks.normalisation(name)),
            "outputs": context.networks.class_indices(name),
        }
    )


def refusal(what: str, folder: epath.Path, lines: list[str]) -> str:
    """Why something made from other settings is not overwritten, and the three ways on."""
    changed = "\n".join(f"  - {line}" for line in lines)
    return (
        f"{what} in {folder} was made from other settings:\n{changed}\n"
        f"Nothing was changed. Either use another --workdir (with --from={folder.parent.parent} "
        f"to adopt every stage that still fits), or restore these values, or delete {folder}."
    )


def recipe_of(config: Experiment, name: str, epochs: int | None = None) -> TrainRecipe:
    """How a teacher is trained, for the epochs that are stated or for others."""
    squeeze = config.squeeze
    return TrainRecipe(
        views=f"squeeze/view/{name}",
        augment=Augment(squeeze.crop_min, squeeze.flip, crop_pad=squeeze.crop_pad),
        loss="ce",
        epochs=epochs or squeeze.epochs,
        optimiser=squeeze.optimiser,
        learning_rate=squeeze.learning_rate,
        weight_decay=squeeze.weight_decay,
        schedule=squeeze.schedule,
    )


def _train(context: Context, name: str, folder: epath.Path) -> tuple[PyTree, dict[str, Any]]:
    squeeze, dataset = context.config.squeeze, context.config.dataset
    source = context.inputs.open("train")
    epochs = squeeze.epochs_over(len(source))
    module = context.networks.build(name, dtype=squeeze.dtype)
    network = context.config.network(name)
    variables = None
    if network.start_from:
        context.say(f"training {name} further, from {network.start_from}")
        head = fresh(module, squeeze.seed, context.inputs.image_shape)
        variables = _load(context, name, network.start_from, module, head)
    trainer = Trainer(
        module,
        recipe_of(context.config, name, epochs),
        context.networks.normalisation(name),
        view_seed=squeeze.seed,
        seed=squeeze.seed,
        devices=context.train_devices(squeeze.batch_size),
    )

    def from_batch(start: int):
        for batch in batches(
            source,
            batch_size=squeeze.batch_size,
            epochs=epochs,
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
        variables=variables,
    )
    record = {"source": "train", "top1": trained.top1, "top5": trained.top5}
    record["tested"] = _tested(context, name)
    return trained.state.variables, record | {"seconds": trained.seconds}


def _import(context: Context, name: str, folder: epath.Path) -> tuple[PyTree, dict[str, Any]]:
    network = context.config.network(name)
    assert network.checkpoint is not None
    context.say(f"importing {name} from {network.checkpoint}")
    module = context.networks.build(name)
    variables = _load(context, name, network.checkpoint, module)
    source = epath.Path(network.checkpoint).name
    return variables, {"source": source, **_test(context, name, module, variables)}


def _tested_again(context: Context, name: str, folder: epath.Path) -> tuple[PyTree, dict[str, Any]]:
    """A teacher that is there, tested on images that are others than before."""
    context.say(f"testing {name} again: the test images, or how it reads them, have changed")
    variables, record = context.networks.load(name), workdir.read_record(folder / RECORD)
    module = context.networks.build(name)
    wanted = variable_shapes(module, context.inputs.image_shape)["params"]
    if jax.tree.map(np.shape, variables["params"]) != jax.tree.map(np.shape, wanted):
        raise UserError(
            f"teacher {name} in {folder} is for other images or classes: its weights do not fit "
            f"dataset.image_size={context.config.dataset.image_size} and {module.num_classes} "
            f"outputs. Restore these, state networks.{name}.head_classes, or use another workdir"
        )
    return variables, record | _test(context, name, module, variables)


def _test(context: Context, name: str, module: nn.Module, variables: PyTree) -> dict[str, Any]:
    images, labels = context.inputs.test_set()
    result = test(
        module,
        variables,
        images,
        labels,
        context.networks.normalisation(name),
        class_indices=context.networks.class_indices(name),
        mesh=parallel.data_mesh(context.train_devices(context.config.squeeze.batch_size)),
    )
    return {"top1": result.top1, "top5": result.top5, "tested": _tested(context, name)}


def _load(
    context: Context, name: str, path: str, module: nn.Module, head: PyTree | None = None
) -> PyTree:
    """A network's weights from a file; see ``weights.load``.

    Raises:
      UserError: they cannot be read, do not fit, or images would be read otherwise than they were
        made for, without that being stated.
    """
    network = context.config.network(name)
    try:
        _check_normalisation(context, name, path)
        return load(
            path,
            network.architecture,
            module.num_classes,
            image_shape=context.inputs.image_shape,
            width=network.width,
            depth=network.depth,
            stem=network.stem,
            key=network.weights_key,
            head=head,
            say=lambda line: context.say(_naming(name, line)),
        )
    except UserError as error:
        raise UserError(_naming(name, str(error))) from None


def _check_normalisation(context: Context, name: str, path: str) -> None:
    """Compare how a run reads images for weights with how they were made to be read."""
    made_for, read_by = stated_normalisation(path), context.networks.normalisation(name)
    if made_for is None or pixels.alike(made_for, read_by):
        return
    differ = (
        f"{path} was made for images of mean {made_for.mean} and standard deviation "
        f"{made_for.std}, and this run reads them with {read_by.mean} and {read_by.std}"
    )
    if context.config.network(name).mean:
        context.say(f"warning: {differ}, as networks.{name}.mean and .std state")
        return
    mean, std = (",".join(f"{x:.6g}" for x in values) for values in (made_for.mean, made_for.std))
    raise UserError(
        f"{differ}. State what is meant: --config.networks.{name}.mean={mean} "
        f"--config.networks.{name}.std={std}"
    )


def _naming(name: str, text: str) -> str:
    """Advice on a network's fields, with its name."""
    return text.replace("networks.NAME.", f"networks.{name}.")
