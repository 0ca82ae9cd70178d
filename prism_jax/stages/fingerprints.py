"""What decides the bits of each folder of a working directory.

A fingerprint is a dict of JSON values: the fields of the sections that count, and in place of
everything made before, a digest of its own fingerprint. Two folders with equal fingerprints hold
the same. Nothing here writes, and nothing but the run's settings and its data decides.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from prism_jax.config import SELECTED_CONTROLS, Experiment, Network, batch_layout, bn_group_of
from prism_jax.config.generation import FOLDER as GENERATOR
from prism_jax.config.generation import IDLE, SCHEDULES
from prism_jax.config.layout import PAINTED, paints_classes
from prism_jax.config.sections import Generate
from prism_jax.core import batching
from prism_jax.core.augment import Augment
from prism_jax.core.statistics import NAMES, of_convolutions
from prism_jax.data import weights, workdir
from prism_jax.diffusion import huggingface, prompts
from prism_jax.diffusion.anchors import CHUNKS
from prism_jax.models import ARCHITECTURES
from prism_jax.stages import imported
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.inputs import HELD_OUT, own_normalisation
from prism_jax.synthesis.selection import GROUPED, SELECTIONS
from prism_jax.synthesis.start import ASKING

# Fields that change no bits, or that only say where the same bits come from.
NEUTRAL = {
    "recover": (
        *("initialise_from", "initialise_classes", "initialise_mean", "initialise_std"),
        *("initialise_whitening", "steps_per_dispatch", "checkpoint_seconds", "keep_at"),
        *("clip_directory", "clip_template"),  # what is read there has fields of its own
    ),
    "relabel": ("mode", "labels_from"),
    "validate": ("students", "seeds", "controls", "checkpoint_seconds"),
    "squeeze": ("teachers", "seed", "least_top1"),
}

# Fields that came later, with the value that means what was before: then they are left out, and
# older work keeps its fingerprint.
LATER: dict[str, dict[str, Any]] = {
    "recover": {
        **{"maker": "optimise", "short_classes": "refuse", "alpha_ce": 1.0, "clip": 0.0},
        **{"parametrisation": "pixels", "resolutions": [], "view_noise": 0.0},
        **{"targets": "running", "inject_from": "start", "inject_simplicity": 0.1},
    },
    "squeeze": {"least_steps": 0},
    "relabel": {"order": "own"},
    "network": {"weights_key": None, "start_from": None},
}

TOGETHER = "of two images at least"  # BatchNorm groups, where equal ones would be of one image

# Raised when a change of code changes the bits that the same settings give, so that a workdir
# begun before it is not continued after it. (Anchors of a class with copies of an image changed
# under one version: no centre of theirs weighs nothing any more. So did gradients of max pooling
# where maxima tie.)
BITS_VERSION = 2
# What statistics of convolutions hold whose fingerprint does not say.
MEASURED = ("mean", "var", "patch_mean", "patch_var")
USUAL_PRECISION = "high"  # what work was made with whose fingerprint does not say


def section(context: Context, name: str) -> dict[str, Any]:
    """A section's fields that decide bits, as JSON values, and what makes bits of them."""
    fields = json.loads(json.dumps(dataclasses.asdict(getattr(context.config, name))))
    kept = {k: v for k, v in fields.items() if k not in NEUTRAL.get(name, ())}
    kept = _without_later(name, kept)
    return {**kept, **(_border(fields) if name != "recover" else {}), **_bits(context)}


def _bits(context: Context) -> dict[str, Any]:
    """The code's version, and what float32 becomes on a GPU or TPU.

    The setting, and not what the platform at hand makes of it: others read what was made there.
    """
    return {"bits_version": BITS_VERSION, **_precision(context)}


def _precision(context: Context) -> dict[str, str]:
    precision = context.config.parallel.matmul_precision
    return {} if precision == USUAL_PRECISION else {"matmul_precision": precision}


def _border(fields: dict[str, Any]) -> dict[str, str]:
    """What comes in where real images are shifted; it was the mean colour before."""
    return {"border": "black"} if fields.get("crop_pad") is not None else {}


def _without_later(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    later = LATER.get(name, {})
    return {k: v for k, v in fields.items() if not (k in later and v == later[k])}


def _network(network: Network) -> dict[str, Any]:
    return _without_later("network", dataclasses.asdict(network))


def real_images(context: Context) -> dict[str, str]:
    """Digests of what a run's training and test images are, by split."""
    inputs = context.inputs
    return {s: workdir.digest(inputs.fields(inputs.open(s))) for s in ("train", "test")}


def teacher(context: Context, name: str) -> dict[str, Any]:
    """What a teacher is made of: its network and either its training or its checkpoint."""
    network = context.config.network(name)
    fields: dict[str, Any] = {"network": _network(network)}
    if network.weights:
        field = "checkpoint" if network.checkpoint else "start_from"
        fields["network"][field] = _made_from(context, name, field)
    if not network.checkpoint:
        fields["squeeze"] = section(context, "squeeze")
        fields["squeeze"]["seed"] = context.config.squeeze.seed
        if own_normalisation(network):  # training took the data set's before
            fields["squeeze"]["normalisation"] = "the network's"
        fields["data"] = context.inputs.fields(context.inputs.open("train"))
    return fields


def _made_from(context: Context, name: str, field: str) -> str:
    """The digest of a teacher's weight file; where that is gone, of what the teacher was made."""
    path, folder = getattr(context.config.network(name), field), context.networks.folder(name)
    if not epath.Path(path).exists() and (folder / weights.RECORD).exists():
        found = workdir.read_fingerprint(folder) or {}
        if known := found.get("network", {}).get(field):
            return known
    return _weights_digest(path)


def pool(context: Context, names: Sequence[str]) -> dict[str, str]:
    """Teachers by the digest of what they are made of."""
    return {name: workdir.digest(teacher(context, name)) for name in names}


def _outputs(context: Context, names: Sequence[str], data: Any) -> dict[str, Any]:
    """Which outputs of imported heads are the classes, where only the training images say so.

    Args:
      data: the images that a fingerprint knows already; those of training say it themselves.
    """
    if data == context.inputs.fields(context.inputs.open("train")):
        return {}
    found = {
        name: indices
        for name in names
        if context.config.network(name).class_indices is None
        and (indices := context.networks.class_indices(name)) is not None
    }
    return {"outputs": workdir.digest(found)} if found else {}


def statistics(context: Context, name: str) -> dict[str, dict[str, Any]]:
    """What those statistics of real images are made of that recover matches, by kind."""
    squeeze, kinds = context.config.squeeze, statistic_kinds(context.config, name)
    if not kinds:
        return {}
    views = ("batch_size", "crop_min", "crop_pad", "flip")
    fields = {view: getattr(squeeze, view) for view in views}
    fields |= _border(fields)
    fields |= {
        "seed": squeeze.seed,
        "patch": context.config.recover.statistic_patch,
        "teacher": workdir.digest(teacher(context, name)),
        "data": context.inputs.fields(context.inputs.open("train")),
        **_bits(context),
    }
    found = {kind: {"kind": kind, **fields} for kind in kinds}
    if NAMES != MEASURED:
        found |= {k: {**found[k], "names": NAMES} for k in ("conv", "class") if k in found}
    if "class" in found:
        found["class"]["views"] = "of whole batches"  # those of a short one were its own before
    if "group" in found:
        del found["group"]["patch"]
        found["group"]["ipc"] = context.config.recover.ipc
        ranked_by = {t: image_facts(context, t, "difficulty") for t in rankers(context.config)}
        found["group"]["ranked_by"] = workdir.digest(ranked_by)
    return found


def statistic_kinds(config: Experiment, name: str) -> list[str]:
    """The kinds of statistics of real images that recover matches in a teacher."""
    recover, kinds = config.recover, []
    if recover.iterations and recover.alpha_bn:
        kinds += ["conv"] if of_convolutions(recover.match) else []
        kinds += ["class"] if recover.class_share else []
        kinds += ["group"] if recover.targets == "groups" and name in rankers(config) else []
    return kinds


def rankers(config: Experiment) -> list[str]:
    """The teachers that rank real images by difficulty, where that is asked for."""
    if config.recover.targets != "groups" and config.recover.initialise not in GROUPED:
        return []
    pool = config.recover.pool
    return [t for t in pool if ARCHITECTURES[config.network(t).architecture].batch_norms]


def reads_features(config: Experiment) -> bool:
    """Whether real images are selected or retrieved in a teacher's features."""
    recover, controls = config.recover, config.validate.controls
    selects = recover.initialise in SELECTIONS or recover.inject_from == "retrieved"
    return selects or not set(SELECTED_CONTROLS).isdisjoint(controls)


def image_facts(context: Context, name: str, kind: str) -> dict[str, Any]:
    """What is made of a teacher and of every real image by itself: "features", "difficulty"."""
    return {
        "kind": kind,
        "teacher": workdir.digest(teacher(context, name)),
        "data": context.inputs.fields(context.inputs.open("train")),
        **_bits(context),
    }


# Of the section ``generate``: what decides the codec, the latents, and the images of anchors.
_CODEC = ("codec", "patch", "components")
_LATENTS = (
    *("dtype", "batch_size", "image_size", "view", "most_images", "sampled", "flip"),
    "resampler",
)
_ANCHORS = ("anchors", "expand", "attempts", "outliers")
_IMAGES = (
    *("dtype", "batch_size", "image_size", "weighted", "sampler", "steps", "strength", "guidance"),
    *("guided_channels", "eta", "variance", "slip", "clip", "mode_weight", "mode_window"),
    *("candidates", "resampler"),
)
OF_ANCHORS = ("strength", "mode_weight", "mode_window", "weighted", "candidates")


def _generate(context: Context, names: Sequence[str]) -> dict[str, Any]:
    fields = json.loads(json.dumps(dataclasses.asdict(context.config.generate)))
    fields |= _idle(context.config.generate)
    return {**{name: fields[name] for name in names}, **_bits(context)}


def _idle(generate: Generate) -> dict[str, int]:
    """Fields that nothing reads in these settings: they count as they are left by default."""
    names = () if generate.codec == "patches" else ("patch", "components")
    return {name: IDLE[name] for name in (*names, *(["expand"] * (generate.anchors not in CHUNKS)))}


def generator(context: Context) -> dict[str, Any]:
    """What the generator is made of: its training, or the files it is read from."""
    config = context.config
    generate = config.generate
    if generate.generator == "dit":
        return {
            "generate": _generate(context, (*_CODEC, "dtype", "denoiser", "fit")),
            "seed": config.squeeze.seed,
            "data": context.inputs.fields(context.inputs.open("train")),
        }
    parts = generator_parts(context)
    fields: dict[str, Any] = {
        "generator": generate.generator,
        "files": {part: _part_of_generator(context, part) for part in parts},
    }
    assert generate.directory is not None  # config.rules
    gone = not epath.Path(generate.directory).exists()
    known = _read_before(context).get("schedule") if gone else None
    schedule = huggingface.schedule(generate.directory, SCHEDULES[generate.generator])
    fields["schedule"] = known or dataclasses.asdict(schedule)
    if "text_encoder" in parts:
        fields["prompts"] = [generate.template, generate.negative, context.inputs.spoken_names]
        fields |= _precision(context)  # of the encoder, whose states are kept
    return fields


def quality(context: Context) -> dict[str, Any]:
    """What the measured quality of a trained generator is made of."""
    names = [field for field in _IMAGES if field not in OF_ANCHORS]
    return {
        "generate": _generate(context, names),
        "generator": workdir.digest(generator(context)),
        "judge": pool(context, [context.config.judge]),
        "test": context.inputs.fields(context.inputs.open("test")),
    }


def generator_parts(context: Context) -> list[str]:
    """The networks of a released generator."""
    prompted = context.config.generate.generator == "stable_diffusion"
    return ["vae", "unet", "text_encoder"] if prompted else ["vae", "transformer"]


def _part_of_generator(context: Context, part: str) -> str:
    """The digest of a network's files; where these are gone, of what the generator was read from.

    Raises:
      UserError: neither is there.
    """
    path = part_path(context, part)
    gone = not epath.Path(path).exists()
    known: str | None = _read_before(context).get("files", {}).get(part) if gone else None
    return known or _part_digest(path, part)


def _read_before(context: Context) -> dict[str, Any]:
    """What a finished generator was made of; nothing where there is none."""
    folder = context.root / "squeeze" / GENERATOR
    done = (folder / weights.RECORD).exists()
    return (workdir.read_fingerprint(folder) if done else None) or {}


def part_path(context: Context, part: str) -> str:
    """Where a network of a released generator is read from."""
    generate = context.config.generate
    assert generate.directory is not None  # config.rules
    return (part == "transformer" and generate.transformer) or generate.directory


def clip_texts(context: Context) -> dict[str, Any]:
    """What the embeddings of the classes' texts are made of."""
    recover, names = context.config.recover, context.inputs.spoken_names
    assert recover.clip_directory is not None  # config.rules
    return {
        "text_encoder": _part_digest(recover.clip_directory, "text_encoder"),
        "template": recover.clip_template,
        "classes": len(names),
        "names": workdir.digest({"names": names}),
        **_precision(context),
    }


def clip(context: Context) -> dict[str, Any]:
    """What images are guided by."""
    directory = context.config.recover.clip_directory
    assert directory is not None  # config.rules
    return {
        "image_encoder": _part_digest(directory, "image_encoder"),
        "texts": workdir.digest(clip_texts(context)),
    }


def latents(context: Context) -> dict[str, Any]:
    """What the latents of real images are made of."""
    generate = context.config.generate
    codec: Any = _generate(context, _CODEC)
    if generate.codec == "directory":
        codec = _part_of_generator(context, "vae")
    at_once = generate.encode_batch_size or generate.batch_size
    fields = {
        "generate": {**_generate(context, _LATENTS), "batch_size": at_once},
        "codec": codec,
        "data": context.inputs.fields(context.inputs.open("train")),
    }
    return fields | ({"seed": context.config.seed} if generate.sampled or generate.flip else {})


def anchors(context: Context) -> dict[str, Any]:
    """What the anchors of classes are made of."""
    return {
        "generate": _generate(context, _ANCHORS),
        "ipc": context.config.recover.ipc,
        "seed": context.config.seed,
        "latents": workdir.digest(latents(context)),
    }


def candidates(context: Context) -> dict[str, Any]:
    """What generated images are made of, whichever of them are taken."""
    fields: dict[str, Any] = {
        "generate": _generate(context, _IMAGES),
        "seed": context.config.seed,
        "image_size": context.config.dataset.image_size,
        "ipc": context.config.recover.ipc,
        "generator": workdir.digest(generator(context)),
    }
    fields |= _classes(context)
    if (g := context.config.generate).candidates > 1 and g.refine.steps:
        fields["kept"] = "latents"
    if context.config.generate.anchors != "none":
        fields["anchors"] = workdir.digest(anchors(context))
    if context.config.generate.candidates > 1:
        fields["judge"] = pool(context, [context.config.judge])
    return fields


def _classes(context: Context) -> dict[str, Any]:
    """Which classes a transformer of ImageNet's is told; others are told by data or prompts."""
    if context.config.generate.generator != "dit_released":
        return {}
    indices = context.inputs.open("train").imagenet_indices
    return {"classes": [context.config.dataset.num_classes, indices]}


def selected_control(context: Context, name: str) -> dict[str, Any]:
    """What a control of selected real images is made of, beside its data."""
    recover = context.config.recover
    return {
        "control": name,
        "ipc": recover.ipc,
        "seed": context.config.seed,
        "classes": context.config.dataset.num_classes,
        "teacher": pool(context, [recover.scorer or recover.primary]),
        **_bits(context),
    }


def generated_control(context: Context, name: str) -> dict[str, Any]:
    """What a control of generated images is made of."""
    ipc, size = context.config.recover.ipc, context.config.dataset.image_size
    fields: dict[str, Any] = {"control": name, "ipc": ipc, "image_size": size}
    if name != "no_anchors":
        fields["anchors"] = workdir.digest(anchors(context))
    if name == "medoids":
        return fields
    names: tuple[str, ...] = ("dtype", "batch_size", "image_size", "resampler")
    if name == "no_anchors":
        names = tuple(field for field in _IMAGES if field not in OF_ANCHORS)
        fields |= {"seed": context.config.seed, **_classes(context)}
    return {
        **fields,
        "generate": _generate(context, names),
        "generator": workdir.digest(generator(context)),
    }


def recover(context: Context) -> dict[str, Any]:
    """What the synthetic images are made of."""
    settings, span = context.config.recover, context.config.parallel.recover_devices
    fields: dict[str, Any] = {
        "recover": section(context, "recover"),
        "seed": context.config.seed,
        "data": context.inputs.fields(context.inputs.start),
        "teachers": pool(context, settings.pool),
    }
    optimised = settings.maker == "optimise" and settings.iterations > 0
    if span > 1 and optimised:
        fields["devices_per_batch"] = span
    if optimised:
        fields |= _outputs(context, settings.pool, fields["data"])
    if settings.initialise == "folder" and settings.inject_from == "retrieved":
        fields["retrieved"] = context.inputs.fields(context.inputs.open("train"))
    if (layout := batch_layout(context.config)).uneven:
        fields["blocks"] = layout.blocks
    if settings.initialise in ASKING or settings.inject_from == "retrieved":
        fields["scorer"] = pool(context, [settings.scorer or settings.primary])
    else:
        fields["recover"]["scorer"] = None  # only controls ask
    if settings.clip:
        fields["clip"] = clip(context)
    if settings.maker == "generate":
        fields["generated"] = candidates(context)
        if paints_classes(context.config):
            fields["painted"] = PAINTED
        if context.config.generate.refine.steps:
            fields["refined"] = _generate(context, ["refine"])["refine"]
    if matched := {t: found for t in settings.pool if (found := statistics(context, t))}:
        fields["statistics"] = workdir.digest(matched)
    return fields


def relabel(context: Context, labelled: LabelledSet) -> dict[str, Any]:
    """What soft labels are made of."""
    parts, settings = context.config.label_parts, context.config.relabel
    fields = {
        "relabel": section(context, "relabel"),
        "seed": context.config.seed,
        "images": workdir.digest(labelled.fields),
    }
    if imported.has_labels(context, labelled):
        return {**fields, "labels": imported.digest_of_labels(context)}
    together = settings.teacher_mode == "train" and _spares(
        labelled, settings.batch_size, accumulate=parts, bn_group=settings.bn_group
    )
    data = labelled.fields.get("data")
    if data is None and (own := own_normalisation(context.config.dataset)):
        fields["normalisation"] = dataclasses.asdict(own)
    return {
        **fields,
        **_outputs(context, settings.teachers, data),
        "teachers": pool(context, settings.teachers),
        **({"parts": parts} if parts > 1 else {}),
        **({"groups": TOGETHER} if together else {}),
    }


def validate(context: Context, labelled: LabelledSet, student: str, seed: int) -> dict[str, Any]:
    """What a trained student is made of."""
    fields: dict[str, Any] = {
        "validate": section(context, "validate"),
        "network": _network(context.config.network(student).untrained()),
        "student_seed": seed,
        "seed": context.config.seed,
        "images": workdir.digest(labelled.fields),
        "test": context.inputs.fields(context.inputs.open("test")),
    }
    if context.config.dataset.held_out:
        fields["held_out"] = context.inputs.fields(context.inputs.open(HELD_OUT))
    settings = context.config.validate
    division = {"accumulate": settings.accumulate, "bn_group": bn_group_of(settings)}
    if _spares(labelled, settings.batch_size, **division):
        fields["groups"] = TOGETHER
    if labelled.soft:
        fields["labels"] = workdir.digest(relabel(context, labelled))
    else:
        views = ["batch_size", *(field.name for field in dataclasses.fields(Augment))]
        fields["views"] = {name: getattr(context.config.relabel, name) for name in views}
        fields["views"] |= _border(fields["views"])
        fields["validate"]["loss"] = "ce"
    return fields


def _spares(labelled: LabelledSet, batch_size: int, **division: Any) -> bool:
    """Whether a set's batches divide otherwise than equally, see ``batching.spares``."""
    sizes = batching.sizes(len(labelled.labels_N), batch_size)
    whole = sizes if labelled.soft else sizes[:1]  # with hard labels no batch is cut short
    return any(batching.spares(size, **division) for size in whole)


@functools.cache
def _weights_digest(path: str) -> str:
    return weights.digest(path)


@functools.cache
def _part_digest(path: str, part: str) -> str:
    return prompts.digest(path) if part == "text_encoder" else huggingface.digest(path, part)
