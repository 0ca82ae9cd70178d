"""Recover: the images of every unit, from a maker, kept so that nothing is made twice.

recover/images/<class>/<slot>.png   what everything after reads
recover/units/<unit>.json           written last: this unit is done
recover/checkpoints/<unit>/         Orbax: images, optimiser, step of a unit in flight
recover/chosen/<class>.json         which real images or patches start a class, while it works
recover/metrics.jsonl               loss terms per teacher
recover/kept/<iteration>/           images as they were then, where recover.keep_at asks
recover/manifest.json               written when every unit is done
"""

from __future__ import annotations

from typing import Any

import numpy as np
from etils import epath

from prism_jax import parallel
from prism_jax.config import batch_layout, members, unit_budget, units
from prism_jax.config.rules.recover import one_draw
from prism_jax.core import pixels
from prism_jax.data import image_set, workdir
from prism_jax.data.lazy import Images
from prism_jax.data.metrics import gather
from prism_jax.errors import UserError
from prism_jax.stages import fingerprints
from prism_jax.stages.context import Context, LabelledSet
from prism_jax.stages.makers import Made, maker_of, optimise
from prism_jax.stages.makers.made import record_path
from prism_jax.stages.makers.start import CHOSEN
from prism_jax.types import Unit


def folder(context: Context) -> epath.Path:
    return context.root / "recover"


def pending(context: Context) -> list[Unit]:
    """Units whose images are not there yet.

    Raises:
      UserError: there are images, but they were made from other settings.
    """
    root = folder(context)
    found = workdir.read_fingerprint(root)
    if found is None:
        return units(context.config)
    if lines := workdir.differences(found, fingerprints.recover(context)):
        changed = "\n".join(f"  - {line}" for line in lines)
        raise UserError(
            f"{root} holds images made from other settings:\n{changed}\n"
            f"Nothing was changed. Either use another --workdir (with --from={context.root} to "
            f"adopt every stage that still fits), or restore these values, or delete {root}."
        )
    if (root / "manifest.json").exists():
        return []
    there = workdir.names(root / "units")
    return [unit for unit in units(context.config) if record_path(root, unit).name not in there]


def is_done(context: Context) -> bool:
    return not pending(context) and (folder(context) / "manifest.json").exists()


def synthetic_set(context: Context) -> LabelledSet:
    """The finished synthetic set.

    Raises:
      UserError: it is not finished, or an image is damaged; a damaged one is set aside, and
        the next run redoes its unit.
    """
    root = folder(context)
    if not is_done(context):
        raise UserError(
            f"{root} has no finished images; run the recover stage first (--stages=recover,...)"
        )
    manifest = workdir.read_record(root / "manifest.json")
    images = context.once("synthetic images", lambda: _read_images(context, manifest["units"]))
    labels = np.repeat(
        np.arange(context.config.dataset.num_classes, dtype=np.int32), context.config.recover.ipc
    )
    fields = fingerprints.recover(context)
    soft = context.config.soft_labels
    return LabelledSet(
        "synthetic", context.root, lambda: images, labels, fields, soft, weights(context)
    )


def weights(context: Context) -> np.ndarray | None:
    """How much each finished image counts, class-major; None: alike, or not finished yet."""
    path = folder(context) / "manifest.json"
    found = workdir.read_record(path).get("weights") if path.exists() else None
    return None if found is None else np.array(found, np.float32)


def say_kept(context: Context) -> None:
    """Say which images on the way a finished set did not keep: they are not made again."""
    asked, root = context.config.recover.keep_at, folder(context)
    if lacking := [at for at in asked if not optimise.kept_folder(root, at).exists()]:
        context.say(
            f"note: recover is finished and kept no images after iteration "
            f"{', '.join(map(str, lacking))} (recover.keep_at); another --workdir, where images "
            f"are made, keeps them"
        )


def run(context: Context) -> None:
    """Make every unit that is missing, then write the manifest."""
    root, config = folder(context), context.config
    maker = maker_of(config)
    if is_done(context):
        return

    def prepare() -> None:
        context.work.begin(root, fingerprints.recover(context))
        maker.prepare(context, root)

    generates = config.recover.maker == "generate"
    field = "generate.batch_size" if generates else "recover.batch_size"
    size = config.generate.batch_size if generates else batch_layout(config).size
    remedy = (
        f"Lower {field} (now {size} images). It belongs to what the images are made from, so start "
        f"in another workdir: --workdir=<new> --from={context.root}."
    )
    if generates and config.generate.anchors != "none" and not config.generate.encode_batch_size:
        remedy += f" To take the latents over, set generate.encode_batch_size={size} there."
    with parallel.enough_memory(remedy):
        maker.before(context)
    ordered = parallel.longest_first(units(config), lambda unit: unit_budget(config, unit))
    if mine := context.work.deal("recover", ordered, lambda: pending(context), prepare):
        if said := one_draw(config, batch_layout(config)):
            context.say(f"note: {said}")
        # The whole of it: what does not fit is said when a result is fetched, not when it is asked.
        with parallel.enough_memory(remedy):
            for made in maker.make(context, root, mine):
                _write(context, made)
    if not parallel.is_main():
        context.work.wait(lambda: is_done(context))
        return
    context.work.wait(lambda: not pending(context))
    gather(root)
    records = [workdir.read_record(record_path(root, unit)) for unit in units(config)]
    images = context.once("synthetic images", lambda: _read_images(context, records))
    for name in ("checkpoints", CHOSEN):
        if (root / name).exists():
            workdir.remove(root / name)
    manifest = {
        "digest": image_set.digest(images),
        "images": len(images),
        "ipc": config.recover.ipc,
        "num_classes": config.dataset.num_classes,
        "class_names": context.inputs.open("train").class_names,
        "imagenet_indices": context.inputs.open("train").imagenet_indices,
        "seed": config.seed,
        "pool": list(config.recover.pool),
        "units": records,
    }
    if (counts := maker.weights(context)) is not None:
        manifest["weights"] = counts
    workdir.write_record(root / "manifest.json", manifest)


def _write(context: Context, made: Made) -> None:
    """Write a unit's images and then its record, which makes it done."""
    config, root = context.config, folder(context)
    classes, slots = members(config, made.unit)
    images = np.asarray(
        pixels.to_uint8(made.images_BHWC, context.inputs.normalisation, rounding=made.rounding)
    )
    if config.recover.jpeg_quality is not None:
        images = image_set.through_jpeg(images, config.recover.jpeg_quality)
    image_set.write_images(root / "images", images, classes, slots)
    record = {
        "unit": made.unit.name,
        "slots": sorted({int(s) for s in slots}),
        "classes": [int(classes.min()), int(classes.max())],
        "iterations": unit_budget(config, made.unit),
        "digest": image_set.digest(images),
        "seconds": made.seconds,
        **made.facts,
    }
    workdir.write_record(record_path(root, made.unit), record)


def _read_images(context: Context, records: list[dict[str, Any]]) -> Images:
    """All images, class-major, compared with what the units' records say of them.

    Raises:
      UserError: images are missing, damaged, or others than recover wrote. They are set aside (all
        images of a unit, where only their common digest differs), and their units are undone.
    """
    config = context.config
    ipc = config.recover.ipc
    try:
        images = context.inputs.hold(
            image_set.lazy_images(
                folder(context) / "images",
                config.dataset.num_classes,
                ipc,
                threads=config.dataset.threads,
            )
        )
        digests = []
        for unit in units(config):
            classes, slots = members(config, unit)
            digests.append(image_set.digest(images[classes * ipc + slots]))
    except image_set.DamagedFile as error:
        others = _forget_damaged(context, error.path) - 1
        also = f"{others} more are missing or damaged too. " if others > 0 else ""
        again = f"{also}Run the same command again to redo it; what was there is set aside."
        raise image_set.DamagedFile(error.path, error.problem, again) from error
    changed = [
        unit
        for unit, record, digest in zip(units(config), records, digests, strict=True)
        if digest != record["digest"]
    ]
    if changed:
        paths = [path for unit in changed for path in _paths(context, unit)]
        for unit in changed:
            _forget(context, unit, _paths(context, unit))
        more = f" and {len(paths) - 10} more" if len(paths) > 10 else ""
        raise UserError(
            f"the images {', '.join(map(str, paths[:10]))}{more} are not those that recover wrote "
            f"for unit {', '.join(unit.name for unit in changed)}. Run the same command again to "
            f"redo them; what was there is set aside."
        )
    return images


def _forget_damaged(context: Context, found: epath.Path) -> int:
    """Forget every unit that has the image found, or another that cannot be read; how many."""

    def is_damaged(path: epath.Path) -> bool:
        try:
            image_set.read_image(path)
        except image_set.DamagedFile:
            return True
        return path == found  # it is read, but is none of these images

    count = 0
    for unit in units(context.config):
        if damaged := [path for path in _paths(context, unit) if is_damaged(path)]:
            _forget(context, unit, damaged)
        count += len(damaged)
    return count


def _paths(context: Context, unit: Unit) -> list[epath.Path]:
    root = folder(context) / "images"
    return [
        image_set.image_path(root, c, s)
        for c, s in zip(*members(context.config, unit), strict=True)
    ]


def _forget(context: Context, unit: Unit, damaged: list[epath.Path]) -> None:
    """Set damaged images aside and forget that their unit is done."""
    context.work.acquire()
    (folder(context) / "manifest.json").unlink(missing_ok=True)
    record_path(folder(context), unit).unlink(missing_ok=True)
    for path in damaged:
        if path.exists():
            workdir.set_aside(path)
