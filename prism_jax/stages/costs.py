"""What an experiment's images and labels take: seconds by stage, and bytes."""

from __future__ import annotations

import math

from prism_jax.analysis.words import SYNTHETIC
from prism_jax.config import GENERATED_CONTROLS, HARD_CONTROL, SELECTED_CONTROLS
from prism_jax.config.generation import FOLDER
from prism_jax.data import label_store, workdir
from prism_jax.data.weights import RECORD
from prism_jax.stages import fingerprints, generator, imported, recover
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.synthesis.start import ASKING

# Of a set: "networks", "seconds" and "bytes", see ``of``.
Costs = dict[str, dict[str, float | None]]


def of(context: Context, labelled: LabelledSet) -> Costs:
    """Costs of a finished set; None for what is not known.

    Returns:
      "networks": seconds of squeeze for each that images and labels are made with; None where it
      was imported. "seconds": of recover and relabel, as they were measured, with compiling.
      "bytes": of the images and of the real training set as uncompressed pixels, of the labels as
      stored. Labels that are made while students train take neither here.
    """
    networks = [*context.config.relabel.teachers] if labelled.soft else []
    recovered: float | None = 0.0
    if labelled.name in (SYNTHETIC, HARD_CONTROL):  # of the same images
        networks += makers(context)
        manifest = workdir.read_record(recover.folder(context) / "manifest.json")
        recovered = sum(unit["seconds"] for unit in manifest["units"])
    elif labelled.name in GENERATED_CONTROLS:
        networks += [FOLDER] if labelled.name != "medoids" else []  # they are chosen, not made
        recovered = None  # it is not measured
    elif labelled.name in SELECTED_CONTROLS:
        recovered = None  # nor is their choice
    pixels = math.prod(context.inputs.image_shape)
    seconds, stored = _labels(context, labelled)
    return {
        "networks": {name: squeezed(context, name) for name in dict.fromkeys(networks)},
        "seconds": {"recover": recovered, "relabel": seconds},
        "bytes": {
            "images": len(labelled.labels_N) * pixels,
            "labels": stored,
            "real": len(context.inputs.open("train")) * pixels,
        },
    }


def after(costs: Costs, start: Costs) -> Costs:
    """The costs of a set whose images began with another's: what made those counts too."""
    parts = costs["seconds"]["recover"], start["seconds"]["recover"]
    recovered = None if parts[0] is None or parts[1] is None else parts[0] + parts[1]
    return {
        **costs,
        "networks": {**start["networks"], **costs["networks"]},
        "seconds": {**costs["seconds"], "recover": recovered},
    }


def squeezed(context: Context, name: str) -> float | None:
    """Seconds that a network or the generator was trained for; None where it was read."""
    path = context.networks.folder(name) / RECORD
    record = workdir.read_record(path) if path.exists() else {}
    return record.get("seconds") if record.get("source") == "train" else None


def makers(context: Context) -> list[str]:
    """The networks that the synthetic images are made with."""
    config = context.config
    names = [*config.recover.pool] if config.recover.iterations else fingerprints.rankers(config)
    if config.recover.initialise in ASKING or config.recover.inject_from == "retrieved":
        names.append(config.recover.scorer or config.recover.primary)
    if generator.wanted(context):
        names += [FOLDER, *([config.judge] if config.generate.candidates > 1 else [])]
    return names


def _labels(context: Context, labelled: LabelledSet) -> tuple[float | None, int | None]:
    """Seconds and bytes of a set's soft labels."""
    made_online = context.config.relabel.mode == "online"
    if not labelled.soft or (made_online and not imported.has_labels(context, labelled)):
        return 0.0, 0
    root, wanted = labelled.root / "relabel", fingerprints.relabel(context, labelled)
    if not (root / label_store.MANIFEST).exists() or not workdir.fits(root, wanted):
        return None, None  # from elsewhere, or not finished
    timing = root / "timing.json"
    seconds = workdir.read_json(timing)["seconds"] if timing.exists() else None
    return seconds, label_store.size_bytes(root)
