"""Analyse: diversity, figures, and the one table and page a person reads at the end.

analyse/diversity.json  grid.png  recover.png  students.png
summary.json  report.html
"""

from __future__ import annotations

import functools
import json
import statistics as st
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.analysis import diversity, report, summary, tables
from prism_jax.config import bn_group_of, members, to_dict, units
from prism_jax.core import batching, pixels
from prism_jax.data import label_store, workdir
from prism_jax.data.datasets import spoken
from prism_jax.data.lazy import Images, LazyImages
from prism_jax.data.metrics import read_lines
from prism_jax.data.weights import RECORD
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints, generator, validate
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.makers import start
from prism_jax.teachers import embed
from prism_jax.types import Array, PyTree

DIVERSITY = "diversity.json"
EMBEDDED = 100  # images per call of the network that diversity is measured in


def folder(context: Context) -> epath.Path:
    return context.root / "analyse"


def fields_of(context: Context, sets: Mapping[str, LabelledSet]) -> dict[str, Any]:
    """What the analysis is made of: everything before it."""
    config = context.config
    students = {
        f"{name}/{student}/{seed}": workdir.digest(
            fingerprints.validate(context, found, student, seed)
        )
        for name, found in sets.items()
        for student in config.validate.students
        for seed in config.validate.seeds
    }
    # Only where there are such, so that older work keeps its fingerprint.
    absent = [
        f"{name}/{student}/{seed}"
        for name, found in sets.items()
        for student, seed in validate.pending(context, found)
    ]
    called, official = context.inputs.called, spoken(None, context.inputs.info)
    later: dict[str, Any] = {"absent": absent} if absent else {}
    later |= {"called": called} if called != official else {}
    network = config.analyse.network
    return later | {
        "analyse": to_dict(config)["analyse"],
        "images": workdir.digest(sets["synthetic"].fields),
        "students": students,
        "network": workdir.digest(fingerprints.teacher(context, network)) if network else None,
    }


def is_done(context: Context, sets: Mapping[str, LabelledSet]) -> bool:
    root = folder(context)
    return (root / DIVERSITY).exists() and workdir.fits(root, fields_of(context, sets))


def run(context: Context, sets: Mapping[str, LabelledSet]) -> None:
    """Measure diversity and draw the figures; :func:`write_summary` writes the page."""
    from prism_jax.analysis import figures  # Matplotlib takes a second to import

    root, config = folder(context), context.config
    fields = fields_of(context, sets)
    context.work.acquire()
    if root.exists():
        workdir.remove(root)
    synthetic = sets["synthetic"]
    images, labels = synthetic.images_uint8_NHWC, synthetic.labels_N
    initial = initial_images(context) if began_as_images(context) else None
    record = {
        "network": config.analyse.network,
        "distance_from_initial": None if initial is None else diversity.distance(images, initial),
        "intra_class_cosine": _cosines(context, images, initial, labels),
    }
    lines = _recover_lines(context)
    drawings = {
        "grid": figures.grid(
            initial, images, labels,
            classes=config.analyse.grid_classes, slots=config.analyse.grid_slots,
            class_names=context.inputs.called,
        ),
        "students": figures.student_curves(
            {
                name: {
                    student: [
                        _student_lines(context, found.root / "validate" / student / str(seed))
                        for seed in config.validate.seeds
                    ]
                    for student in config.validate.students
                }
                for name, found in sets.items()
            }
        ),
    }  # fmt: skip
    if lines:
        drawings["recover"] = figures.recover_curves(lines, primary=config.recover.primary)
    for name, data in drawings.items():
        workdir.write_bytes(root / f"{name}.png", data)
    workdir.write_record(root / DIVERSITY, record)
    workdir.write_fingerprint(root, fields)


def _recover_lines(context: Context) -> list[dict[str, Any]]:
    """What recover logged; says so where the last lines of a finished unit are missing."""
    path = context.root / "recover" / "metrics.jsonl"
    lines = read_lines(path)
    reached: dict[str, int] = {}
    for line in lines:
        reached[line["unit"]] = max(line["step"], reached.get(line["unit"], 0))
    units = workdir.read_record(context.root / "recover" / "manifest.json")["units"]
    if short := [u["unit"] for u in units if reached.get(u["unit"], 0) < u["iterations"]]:
        _say_short(context, path, f"{len(short)} of {len(units)} units")
    return lines


def _student_lines(context: Context, student: epath.Path) -> list[dict[str, Any]]:
    """What a student's training logged; says so where a finished one's last line is missing."""
    path = student / "metrics.jsonl"
    lines = read_lines(path)
    if (student / RECORD).exists():
        epochs = workdir.read_record(student / RECORD)["epochs"]
        if not lines or lines[-1]["epoch"] != epochs:
            _say_short(context, path, "this student")
    return lines


def _say_short(context: Context, path: epath.Path, whose: str) -> None:
    context.say(f"warning: {path} is cut short; the curves of {whose} lack their end")


def began_as_images(context: Context) -> bool:
    """Whether the synthetic images began as images, or near to some, and not as noise alone."""
    return not generator.wanted(context) or bool(_nearest(context))


def initial_images(context: Context) -> Images:
    """Where the synthetic images began, uint8 NHWC, class-major.

    Of a generated image it is the real one nearest to its anchor.

    Raises:
      UserError: they began as a generator's noise.
    """
    config = context.config
    if not began_as_images(context):
        raise UserError("these images began as a generator's noise, not as images")
    if nearest := _nearest(context):
        return context.inputs.read(context.inputs.open("train"), nearest)
    ipc, classes = config.recover.ipc, config.dataset.num_classes

    def read(positions: np.ndarray) -> np.ndarray:
        images = start.initial_images(
            context, *np.divmod(positions.astype(np.int32), np.int32(ipc))
        )
        return np.asarray(pixels.to_uint8(images, context.inputs.normalisation))

    return context.inputs.hold(LazyImages(read, (classes * ipc, *context.inputs.image_shape)))


def _nearest(context: Context) -> list[int]:
    """Positions among the training images, class-major; none where recover did not note them."""
    manifest = workdir.read_record(context.root / "recover" / "manifest.json")
    found: dict[tuple[int, int], int] = {}
    for unit, record in zip(units(context.config), manifest["units"], strict=True):
        places = zip(*members(context.config, unit), strict=True)
        found |= dict(zip(places, record.get("nearest", ()), strict=False))
    return [found[place] for place in sorted(found)]


def embedder(context: Context, name: str) -> jax.stages.Wrapped:
    """A network's embeddings of uint8 images, compiled: ``f(variables, images)``."""
    module = context.networks.build(name)
    normalisation = context.networks.normalisation(name)

    @jax.jit
    def read(variables: PyTree, images_uint8_BHWC: Array) -> Array:
        return embed(module, variables, pixels.normalise(images_uint8_BHWC, normalisation))

    return read


def _cosines(context, images, initial: Images | None, labels) -> dict[str, float | None]:
    """Intra-class cosine similarity in a network outside the pool: synthetic, initial, real."""
    name = context.config.analyse.network
    if name is None:
        return dict.fromkeys(("synthetic", "initial", "real"))
    variables = jax.device_put(context.networks.load(name))
    read = functools.partial(embedder(context, name), variables)

    def cosine(images_uint8, labels_N) -> float | None:
        found = diversity.embeddings(read, images_uint8, batch_size=EMBEDDED)
        return diversity.intra_class_cosine(found, labels_N)

    real_images, real_labels = context.inputs.test_set()
    return {
        "synthetic": cosine(images, labels),
        "initial": None if initial is None else cosine(initial, labels),
        "real": cosine(real_images, real_labels),
    }


# --- the summary ----------------------------------------------------------------------------


def summarise(
    context: Context, sets: Mapping[str, LabelledSet], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """What the workdir holds, as a summary.

    Args:
      context: the run.
      sets: the synthetic set and the controls; none before the images are finished.
      provenance: what made the results.

    Returns:
      The summary; sections of stages that did not run with these settings are absent.
    """
    config, root = context.config, context.root
    found: dict[str, Any] = {
        "schema": 1,
        "config": config.name,
        "preset": config.preset,
        # Without iterations there is no method, only where the images are from.
        "method": config.recover.method if _made_here(context) else config.recover.initialise,
        "precision": {
            stage: getattr(config, stage).dtype
            for stage in ("squeeze", "recover", "relabel", "validate")
        },
        "command": provenance["command"],
        "seeds": list(config.validate.seeds),
        "commit": provenance["commit"],
        "versions": provenance["versions"],
        "machine": provenance["machine"],
        "dataset": {
            "name": config.dataset.name,
            "num_classes": config.dataset.num_classes,
            "image_size": config.dataset.image_size,
            "train_images": len(context.inputs.open("train")),
            "test_images": len(context.inputs.open("test")),
            "left_out": {split: context.inputs.open(split).left_out for split in ("train", "test")},
        },
    }
    teachers = {name: context.networks.folder(name) / RECORD for name in config.recover.pool}
    if all(path.exists() for path in teachers.values()):
        found["teachers"] = {
            name: {key: record[key] for key in ("top1", "params", "batch_norms")}
            for name, record in ((n, workdir.read_record(p)) for n, p in teachers.items())
        }
    if generator.wanted(context) and generator.is_done(context):
        record = workdir.read_record(generator.folder(context) / RECORD)
        record = {
            **record,
            **dict.fromkeys(generator.QUALITIES),
            **(generator.quality_of(context) or {}),
        }
        names = ("params", "loss", *generator.QUALITIES, "seconds")
        found["generator"] = {name: record.get(name) for name in names}
    if not sets:
        summary.validate(found)
        return found
    found["recover"] = _recover(context, provenance)
    done = (root / "relabel" / label_store.MANIFEST).exists()
    if done and workdir.fits(root / "relabel", fingerprints.relabel(context, sets["synthetic"])):
        timing = root / "relabel" / "timing.json"
        found["relabel"] = {
            "bytes": label_store.size_bytes(root / "relabel"),
            "seconds": workdir.read_json(timing)["seconds"] if timing.exists() else None,
        }
    if students := _students(context, sets["synthetic"]):
        found["validate"] = students
        found["protocol"] = protocol(context)
    controls = {
        name: students
        for name in config.validate.controls
        if (students := _students(context, sets[name]))
    }
    if controls:
        found["controls"] = controls
    if is_done(context, sets):
        record = workdir.read_record(folder(context) / DIVERSITY)
        found["analyse"] = {key: record[key] for key in ("network", "intra_class_cosine")}
        found["recover"]["distance_from_initial"] = record["distance_from_initial"]
    summary.validate(found)
    return found


def _made_here(context: Context) -> bool:
    """Whether images are made, or only read."""
    return bool(context.config.recover.iterations) or generator.wanted(context)


# What decides the rate; older summaries do not say it.
OF_RATE = (
    *("weight_decay", "decay", "momentum", "nesterov", "zeta", "milestones", "gamma"),
    *("warmup_epochs", "warmup_start"),
)


def protocol(context: Context) -> dict[str, Any]:
    """How students are trained; null, or of the rate absent, is what has no part in it."""
    validate, recover = context.config.validate, context.config.recover
    size = min(validate.batch_size, recover.ipc * context.config.dataset.num_classes)
    division = {"accumulate": validate.accumulate, "bn_group": bn_group_of(validate)}
    names = ("loss", "epochs", "optimiser", "learning_rate", "schedule", "ema")
    raw = validate.ema is not None and not validate.ema_statistics
    idle = [
        *(["decay"] if not validate.weight_decay else []),
        *(["momentum", "nesterov"] if validate.optimiser != "sgd" else []),
        *(name for name in ("zeta", "milestones", "gamma") if getattr(validate, name) is None),
        *(["warmup_epochs", "warmup_start"] if not validate.warmup_epochs else []),
    ]
    of_rate = [name for name in OF_RATE if name not in idle]
    stated = {name: getattr(validate, name) for name in (*names, *of_rate)}
    return {
        **{name: list(x) if isinstance(x, tuple) else x for name, x in stated.items()},
        **({"ema_statistics": False} if raw else {}),
        "temperature": None if validate.loss in ("mse_gt", "ce") else validate.temperature,
        "ce_weight": None if validate.loss == "ce" else validate.ce_weight,
        "batch_size": size,
        "bn_group": max(batching.passes(size, **division)[0].groups),
    }


def _recover(context: Context, provenance: Mapping[str, Any]) -> dict[str, Any]:
    manifest = workdir.read_record(context.root / "recover" / "manifest.json")
    units = manifest["units"]
    seconds = sum(unit["seconds"] for unit in units)
    found = {
        "images": manifest["images"],
        "ipc": manifest["ipc"],
        "seconds": seconds,
        "seconds_per_image": seconds / manifest["images"],
        "peak_bytes": provenance["peak_bytes"],
    }
    if all("drawn" in unit for unit in units):
        found["primary"] = context.config.recover.primary
        names = context.config.recover.pool
        weights = [unit["iterations"] for unit in units]
        found["teachers_drawn"] = {
            name: float(np.average([unit["drawn"][name] for unit in units], weights=weights))
            for name in names
        }
        found["terms"] = {
            name: {
                end: {
                    term: _mean([unit["terms"][end][term][name] for unit in units])
                    for term in ("ce", "bn")
                }
                for end in ("start", "end")
            }
            for name in names
        }
        if context.config.recover.clip:
            found["clip"] = {
                end: _mean([unit["terms"][end]["clip"] for unit in units])
                for end in ("start", "end")
            }
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return st.fmean(known) if known else None


def _students(context: Context, labelled: LabelledSet) -> dict[str, Any]:
    """The finished students of a set; one that lacks a seed is left out."""
    found = {}
    for student in context.config.validate.students:
        records = []
        for seed in context.config.validate.seeds:
            path = labelled.root / "validate" / student / str(seed)
            fields = fingerprints.validate(context, labelled, student, seed)
            if (path / RECORD).exists() and workdir.fits(path, fields):
                records.append(workdir.read_record(path / RECORD))
        if len(records) == len(context.config.validate.seeds):
            found[student] = summary.over_seeds(records)
    return found


def is_summarised(context: Context, sets: Mapping[str, LabelledSet]) -> bool:
    """Whether summary.json says what the workdir holds: a run may have died before writing it."""
    path = context.root / workdir.SUMMARY
    if not path.exists():
        return False
    found = workdir.read_json(path)
    if "analyse" in found and not (context.root / "report.html").exists():
        return False
    provenance = {**found, "peak_bytes": found.get("recover", {}).get("peak_bytes")}
    now = json.loads(workdir.to_json(summarise(context, sets, provenance)))
    if "weight_decay" not in found.get("protocol", OF_RATE):  # one that says less is whole, too
        now["protocol"] = {k: v for k, v in now.get("protocol", {}).items() if k not in OF_RATE}
    return now == found


def write_summary(
    context: Context, sets: Mapping[str, LabelledSet], provenance: Mapping[str, Any]
) -> None:
    """Write the page, where the analysis is there, and then summary.json."""
    found = summarise(context, sets, provenance)
    root = folder(context)
    context.work.acquire()
    if "analyse" in found:
        page = report.render(
            found,
            figures={p.stem: p.read_bytes() for p in workdir.matching(root, "*.png")},
            config=to_dict(context.config),
            notes=notes(context),
            class_names=context.inputs.open("train").class_names,
        )
        workdir.write_bytes(context.root / "report.html", page.encode())
    workdir.write_record(context.root / workdir.SUMMARY, found)


def notes(context: Context) -> list[str]:
    """What a reader of the numbers must know."""
    config = context.config
    said = [
        "Top-1 is the last epoch's, not the best one's. Every control is trained by the same "
        "code, augmentation and schedule as the synthetic set.",
    ]
    if "full_real" in config.validate.controls:
        epochs = validate.epochs_of_size(config, len(context.inputs.open("train")))
        said.append(
            f"The full real set is trained as the synthetic one is, with hard labels, for {epochs} "
            f"epochs: as many optimiser steps, and at least squeeze.epochs. It may be better "
            f"trained otherwise."
        )
    if share := config.dataset.held_out:
        said.append(
            f"{share:.4g} of the training images of every class are held out: nothing is made of "
            f"them, and students are tested on them too, so that a choice needs no test image."
        )
        imported = [t for t in config.squeeze.teachers if config.network(t).weights]
        if imported:
            said.append(
                f"{', '.join(imported)} have weights from elsewhere, and may have seen the "
                f"held-out images."
            )
    if config.recover.initialise == "real" and not generator.wanted(context):
        said.append("The synthetic images start from real training images.")
    return said


def show_summary(context: Context) -> None:
    """Print the table and where the page is; reads only."""
    path = context.root / workdir.SUMMARY
    if not path.exists():
        return
    progress.say("")
    progress.say(tables.table(workdir.read_json(path)))
    page = context.root / "report.html"
    progress.say(f"\n{page if page.exists() else path}")
