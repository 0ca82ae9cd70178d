"""The commands: each takes the parsed arguments and prints what it finds."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
import warnings

import numpy as np
from etils import epath
from rich.console import JustifyMethod
from rich.table import Table

from prism_jax import progress
from prism_jax.analysis.class_order import (
    find_normalisation,
    find_order,
    least_gain,
    looks_trained,
    ranks,
)
from prism_jax.core import pixels
from prism_jax.data import workdir
from prism_jax.data.sources import ImageSource, info_of, open_source
from prism_jax.data.weights import RECORD, WEIGHTS, pack, sha256, stated_normalisation
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES
from prism_jax.models.registry import STEMS
from prism_jax.tools.teachers import reading
from prism_jax.tools.teachers.network import FIND, Weights, load_weights, stated_order
from prism_jax.tools.teachers.reading import class_names, read_logits
from prism_jax.tools.teachers.saying import (
    in_words,
    listed,
    per_class,
    percent,
    say_finding,
    say_normalisation,
    say_order,
    say_weights,
    unsure,
)
from prism_jax.types import Normalisation

HINT_IMAGES = 400


def list_command(options: argparse.Namespace) -> None:
    """Print the registry."""
    if options.names:
        print("\n".join(ARCHITECTURES))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    numbers = ("parameters", "BNs", f"min px ({'/'.join(STEMS)})")
    headings = ("name", "family", *numbers[:2], "first BN", numbers[2], "weight files", "arXiv")
    for heading in headings:
        justify: JustifyMethod = "right" if heading in numbers else "left"
        table.add_column(heading, justify=justify, no_wrap=heading == "name")
    for name, row in ARCHITECTURES.items():
        table.add_row(
            name,
            row.family,
            f"{row.parameters:,}",
            str(row.batch_norms),
            ".".join(row.first_bn or ("-",)),
            " / ".join(str(row.min_image_size[stem]) for stem in STEMS),
            ", ".join(row.weights),
            row.paper,
        )
    progress.say(table)


def import_command(options: argparse.Namespace) -> None:
    """Say what a weight file is, and keep it in our format."""
    weights = _load(options)
    normalisation = _normalisation(options) or stated_normalisation(options.file)
    say_weights(options, weights)
    height, _, channels = weights.image_shape
    lines = {
        "head": f"{weights.num_classes} classes",
        "images": f"{height} px, {channels} channel{'s' if channels > 1 else ''}",
        "normalisation": in_words(normalisation)
        if normalisation
        else "weight files do not say it: a run takes its data set's own (for ImageNet "
        f"{in_words(pixels.IMAGENET)}) unless networks.NAME.mean and .std state another",
    }
    for name, value in lines.items():
        progress.say(f"  {name}: {value}")
    if options.out:
        _write(options, weights, normalisation)
        progress.say(f"written to {options.out}")


def _write(options, weights: Weights, normalisation: Normalisation | None) -> None:
    """Write weights and record in the format of squeeze's; the record comes last."""
    data, folder = pack(weights.variables), epath.Path(options.out)
    if (folder / RECORD).exists() and workdir.read_record(folder / RECORD)["sha256"] != sha256(
        data
    ):
        raise UserError(f"--out={folder} holds another network; name a folder that is not there")
    workdir.write_bytes(folder / WEIGHTS, data)
    record = {
        "source": epath.Path(options.file).name,
        "source_sha256": weights.sha256,
        "architecture": options.architecture,
        "width": weights.module.width,
        "depth": weights.module.depth,
        "stem": weights.stem,
        "num_classes": weights.num_classes,
        "image_size": weights.image_shape[0],
        "normalisation": normalisation and dataclasses.asdict(normalisation),
        "params": weights.parameters,
        "batch_norms": weights.batch_norms,
        "sha256": sha256(data),
    }
    workdir.write_record(folder / RECORD, record)


def evaluate_command(options: argparse.Namespace) -> None:
    """Test a network on real images and look for the usual mistakes."""
    info = info_of(options.dataset, options.path)
    normalisation = (
        _normalisation(options) or stated_normalisation(options.file) or info.normalisation
    )
    if len(normalisation.mean) != info.channels:
        raise UserError(
            f"--mean and --std have {len(normalisation.mean)} numbers; {info.name} has "
            f"{info.channels} channels"
        )
    options.image_size = options.image_size or info.image_size
    source = _open(options)
    weights = _load(options)
    if weights.image_shape[2] != info.channels:
        raise UserError(
            f"{options.file} reads images of {weights.image_shape[2]} channels, those of "
            f"{info.name} have {info.channels}; choose another network or data set"
        )
    names = class_names(source, info)
    classes, searched = source.num_classes, options.class_indices == FIND
    question = (weights.num_classes, classes, info, source.imagenet_indices)
    order_K, how = None, "found by the images"
    if not searched:
        order_K, how = stated_order(*question, options.class_indices)
    elif weights.num_classes < classes:
        stated_order(*question, None)  # says why it cannot be

    at_N = _chosen(len(source), options.limit)
    labels_N = np.asarray(source.labels_N)[at_N]
    absent = np.setdiff1d(np.arange(classes), labels_N)
    if searched and len(absent):
        raise UserError(
            f"--class-indices={FIND} looks for the output of a class by its images, and "
            f"{len(absent)} classes of {info.name} have none among these {len(at_N)}: "
            f"{listed(absent, names)}. Take more images (--limit, --path), or state the outputs"
        )
    say_weights(options, weights)
    started = time.monotonic()
    read = functools.partial(read_logits, weights, source, batch_size=options.batch_size)
    logits_NH = read(at_N, normalisation, title="evaluate")
    seconds = time.monotonic() - started
    official = info.class_names if classes == info.num_classes else None
    known = {"class_names": names, "official_names": official}
    finding = find_order(logits_NH, labels_N, order_K, classes, **known)
    if searched:
        if finding is None:
            raise UserError(
                f"no choice of {classes} outputs fits the classes of {info.name} on these "
                f"{len(at_N)} images. They are other classes, the images are too few, or the "
                "normalisation is wrong (--mean, --std)"
            )
        order_K = finding.order_K
        progress.say(
            f"the classes are among the outputs: top-1 {percent(finding.top1)} on images "
            "that were not used to find them"
        )
        say_order(options, order_K, unsure(order_K, logits_NH, labels_N, names))

    assert order_K is not None  # stated or found
    rank_N = ranks(logits_NH, labels_N, order_K)
    top1 = float((rank_N < 1).mean())
    progress.say(
        f"{info.name}, test split: {len(at_N)} of {len(source)} images of {options.image_size} px, "
        f"{classes} classes ({how}), {in_words(normalisation)}"
    )
    error = np.sqrt(top1 * (1 - top1) / len(at_N))
    progress.say(
        f"  top-1 {percent(top1, 2)} (standard error {percent(error, 2)}), "
        f"top-5 {percent((rank_N < 5).mean(), 2)}, {seconds:.1f} s "
        f"({len(at_N) / seconds:.0f} images per second)"
    )
    for line in per_class(rank_N < 1, labels_N, classes, names):
        progress.say(f"  {line}")
    if broken := int((~np.isfinite(logits_NH).all(1)).sum()):
        progress.say(f"  {broken} images have logits that are not finite, and count as wrong")
    if finding and not searched:
        same = weights.num_classes == classes
        say_finding(options, finding, order_K, logits_NH, labels_N, names, same)
    elif finding is None and top1 <= 1 - least_gain(classes):  # else none could be far above
        at_M = _chosen(len(at_N), HINT_IMAGES)
        others = {
            name: other
            for name, other in reading.usual_normalisations(info).items()
            if not pixels.alike(other, normalisation)
        }
        readings = (
            (name, read(at_N[at_M], other, title=f"try {name}")) for name, other in others.items()
        )
        right_M = rank_N[at_M] == 0
        misread = find_normalisation(readings, labels_N[at_M], right_M, order_K, **known)
        if misread:
            say_normalisation(misread, normalisation, others[misread.name], len(at_M))
        elif not looks_trained(right_M, classes):
            progress.say(
                "the network is not visibly better than chance, in no usual normalisation or class "
                "order: are these its weights, its width, depth and stem, and its data set?"
            )


def _chosen(count: int, limit: int | None) -> np.ndarray:
    """Positions of at most ``limit`` images, drawn over all classes, in their order."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).permutation(count)[:limit])


def _open(options: argparse.Namespace) -> ImageSource:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_source(
            name=options.dataset,
            source=options.source,
            path=options.path,
            split="test",
            image_size=options.image_size,
        )
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            progress.say(f"warning: {warning.message}")
    return source


def _load(options: argparse.Namespace) -> Weights:
    return load_weights(
        options.file,
        options.architecture,
        num_classes=options.num_classes,
        image_size=options.image_size,
        width=options.width,
        depth=options.depth,
        stem=options.stem,
        key=options.weights_key,
    )


def _normalisation(options: argparse.Namespace) -> Normalisation | None:
    """What --mean and --std state; None where neither is given."""
    if options.mean is None and options.std is None:
        return None
    if options.mean is None or options.std is None or len(options.mean) != len(options.std):
        raise UserError("--mean and --std belong together, with one number per channel each")
    if min(options.std) <= 0:
        raise UserError(f"--std is {options.std}; its numbers must be positive")
    return Normalisation(options.mean, options.std)
