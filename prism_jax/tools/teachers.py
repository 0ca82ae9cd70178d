"""Look at networks and weight files before a run: python -m prism_jax.tools.teachers COMMAND

    list                                 the networks that can be teachers and students
    import FILE --architecture=NAME      what a weight file is; --out=DIR keeps it in our format
    evaluate FILE --architecture=NAME --dataset=NAME --source=KIND --path=PATH
                                         its accuracy on real images, and the usual mistakes

Two mistakes are recognised: classes in another order than the network's, and pixels normalised in
another way than at its training. Either gives a network that looks untrained.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from rich.console import JustifyMethod
from rich.table import Table

from prism_jax import parallel, progress
from prism_jax.analysis.class_order import (
    Finding,
    Misread,
    confusion,
    find_normalisation,
    find_order,
    least_gain,
    looks_trained,
    ranks,
)
from prism_jax.core import pixels
from prism_jax.data import workdir
from prism_jax.data.datasets import DATASETS, DatasetInfo
from prism_jax.data.sources import SOURCES, ImageSource, info_of, open_source
from prism_jax.data.weights import RECORD, WEIGHTS, pack, sha256
from prism_jax.data.weights import read as read_weights
from prism_jax.environment import prepare_environment
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES, build, lookup
from prism_jax.models.fitting import fit
from prism_jax.models.import_torch import torch_leaves, variable_shapes
from prism_jax.models.registry import STEMS
from prism_jax.paths import at_home
from prism_jax.types import Normalisation, PyTree

FIND = "find"

HINT_IMAGES = 400
THREADS = 8


# --- weight files -----------------------------------------------------------------------------


class Weights(NamedTuple):
    """A weight file that fits its architecture.

    Attributes:
      module, variables: the network.
      num_classes: outputs of its head.
      image_shape: (height, width, channels) that it was laid out for.
      stem: see ``build``.
      kind: what the file is, in words.
      sha256: of the file.
    """

    module: nn.Module
    variables: PyTree
    num_classes: int
    image_shape: tuple[int, int, int]
    stem: str
    kind: str
    sha256: str

    @property
    def parameters(self) -> int:
        return sum(int(leaf.size) for leaf in jax.tree.leaves(self.variables["params"]))

    @property
    def batch_norms(self) -> int:
        return len(jax.tree.leaves(self.variables.get("batch_stats", {}))) // 2


def load_weights(
    path: str,
    architecture: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
    key: str | None = None,
) -> Weights:
    """Load weights whose number of classes and of channels need not be known.

    Args:
      path: a file or a folder; see ``data.weights``.
      architecture: a key of ``ARCHITECTURES``.
      num_classes: checked against the file's head, which decides.
      image_size: of the images it will read; only some networks' weights depend on it.
      width, depth, stem: as for ``build``; a folder's record decides its own.
      key: the beginning of the tensors' names, in a file with several networks.

    Raises:
      UserError: the file cannot be read or does not fit.
    """
    row = lookup(architecture)
    found = read_weights(path, architecture, width=width, depth=depth, stem=stem, key=key)
    for note in found.notes:
        progress.say(f"{path}: {note}")
    size = image_size or row.image_size
    if found.stated.get("architecture", architecture) != architecture:
        raise UserError(
            f"{path} holds a {found.stated['architecture']}, but --architecture={architecture} was "
            f"given; state --architecture={found.stated['architecture']}"
        )
    form = {"width": width, "depth": depth, "stem": stem, **found.stated}
    form["architecture"] = architecture

    def leaves(head: int, channels: int):
        return torch_leaves(
            variable_shapes(build(num_classes=head, **form), (size, size, channels))
        )

    usual = leaves(row.classes, 3)
    head = _measured(found.tensors, usual, leaves(row.classes + 1, 3)) or row.classes
    channels = _measured(found.tensors, usual, leaves(row.classes, 1)) or 3
    if num_classes not in (None, head):
        raise UserError(
            f"{path} has a head of {head} classes, but --num-classes={num_classes} was given; "
            "leave it out (to use only some of them, see --class-indices of evaluate)"
        )
    shape = (size, size, channels)
    also = found.suspicion
    variables = fit(found.tensors, path, num_classes=head, image_shape=shape, also=also, **form)
    module = build(num_classes=head, **form)
    return Weights(module, variables, head, shape, form["stem"], found.kind, found.sha256)


def _measured(tensors: dict[str, np.ndarray], one: dict, other: dict) -> int | None:
    """The file's size of the dimension in which two layouts of a network differ."""
    for name, leaf in one.items():
        sizes = zip(leaf.torch_shape, other[name].torch_shape, strict=True)
        axis = next((axis for axis, (a, b) in enumerate(sizes) if a != b), None)
        if axis is not None and name in tensors and tensors[name].ndim == len(leaf.torch_shape):
            return tensors[name].shape[axis]
    return None


def stated_order(
    head: int, classes: int, info: DatasetInfo, class_indices: Sequence[int] | None
) -> tuple[np.ndarray, str]:
    """The output of the head that is each class, and in words how that is known.

    Args:
      head: outputs of the network.
      classes: of the images.
      info: their data set.
      class_indices: as the user stated them; None: what the numbers of classes suggest.

    Raises:
      UserError: they do not fit, or are needed and not known.
    """
    if class_indices is not None:
        order = np.array(class_indices, np.int64)
        if len(order) != classes or len(set(class_indices)) != classes:
            raise UserError(
                f"--class-indices names {len(set(class_indices))} different outputs of the "
                f"head; it must name {classes}, one per class of {info.name}"
            )
        if order.min() < 0 or order.max() >= head:
            raise UserError(
                f"--class-indices runs from {order.min()} to {order.max()}; the head has "
                f"{head} outputs, counted from 0 to {head - 1}"
            )
        return order, "as stated by --class-indices"
    if head == classes:
        return np.arange(classes), "one output per class"
    part = info.imagenet_indices
    if part is not None and len(part) == classes and head in (1000, 1001):
        words = "the outputs that are these classes of ImageNet"
        background = ", behind a background class" if head == 1001 else ""
        return np.array(part) + head - 1000, words + background
    if head == classes + 1:
        return np.arange(classes) + 1, "output 0 is taken for a background class"
    indices = (
        f"  - if the classes are among the outputs, say which: --class-indices=4,0,7 or "
        f"--class-indices=0-{classes - 1} (in a config networks.NAME.head_classes={head} and "
        f"networks.NAME.class_indices), or --class-indices={FIND} to look for them by the images\n"
        if head > classes
        else ""
    )
    raise UserError(
        f"the network has {head} classes, but the images of {info.name} have {classes}:\n{indices}"
        f"  - if they are other classes, it needs a new head: train it on {info.name} (in a "
        "config, a network without a checkpoint), or replace and train its last layer elsewhere"
    )


# --- reading images ---------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _forward(module: nn.Module, variables: PyTree, images_uint8_BHWC, mean_C, std_C):
    return module.apply(
        variables, pixels.normalise(images_uint8_BHWC, Normalisation(mean_C, std_C))
    )


def read_logits(
    weights: Weights,
    source: ImageSource,
    at_N: np.ndarray,
    normalisation: Normalisation,
    *,
    title: str,
    batch_size: int = 64,
) -> np.ndarray:
    """Run a network over images of a source, in evaluation mode, decoding one batch ahead.

    Args:
      at_N: positions of the images.
      normalisation: of the pixels; an argument of the program, so that all share one.
      title: of the progress bar.

    Returns:
      float32 logits (N, H) of the whole head.
    """
    constants = [np.asarray(c, np.float32) for c in (normalisation.mean, normalisation.std)]
    batch_size = min(batch_size, len(at_N))
    parts = []
    with progress.task(title, len(at_N), unit="image") as bar:
        for images_BHWC, count in _batches(source, at_N, batch_size):
            logits = _forward(weights.module, weights.variables, images_BHWC, *constants)
            parts.append(np.asarray(logits, np.float32)[:count])
            bar.advance(count)
    return np.concatenate(parts)


def _batches(source: ImageSource, at_N: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size (the last is filled up) and how many images of each count."""
    with ThreadPoolExecutor(THREADS) as pool:

        def fetch(start: int):
            return [pool.submit(source.image, int(i)) for i in np.resize(at_N[start:], size)]

        waiting = fetch(0)
        for start in range(0, len(at_N), size):
            images = np.stack([image.result() for image in waiting])
            if start + size < len(at_N):
                waiting = fetch(start + size)
            yield images, min(size, len(at_N) - start)


def class_names(source: ImageSource, info: DatasetInfo) -> Sequence[str] | None:
    """The names of the labels: the storage's, or else the data set's; None: not known."""
    if source.class_names is not None:
        return source.class_names
    return info.class_names if source.num_classes == info.num_classes else None


def usual_normalisations(info: DatasetInfo) -> dict[str, Normalisation]:
    """The normalisations that networks for this data set are commonly trained with."""
    c = info.channels
    usual = {
        f"{info.name}'s own mean and std": info.normalisation,
        "ImageNet's mean and std": pixels.IMAGENET,
        "pixels in [-1, 1]": Normalisation((0.5,) * c, (0.5,) * c),
        "pixels in [0, 1]": Normalisation((0.0,) * c, (1.0,) * c),
        "pixels in [0, 255]": Normalisation((0.0,) * c, (1 / 255,) * c),
    }
    return {name: n for name, n in usual.items() if len(n.mean) == c}


def _alike(one: Normalisation, other: Normalisation) -> bool:
    return np.allclose(one.mean + one.std, other.mean + other.std, rtol=1e-3, atol=1e-6)


# --- commands ---------------------------------------------------------------------------------


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
    normalisation = _normalisation(options)
    _say_weights(options, weights)
    height, _, channels = weights.image_shape
    lines = {
        "head": f"{weights.num_classes} classes",
        "images": f"{height} px, {channels} channel{'s' if channels > 1 else ''}",
        "normalisation": _in_words(normalisation)
        if normalisation
        else "weight files do not say it: a run takes its data set's own (for ImageNet "
        f"{_in_words(pixels.IMAGENET)}) unless networks.NAME.mean and .std state another",
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
    normalisation = _normalisation(options) or info.normalisation
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
    order_K, how = None, "found by the images"
    if not searched:
        order_K, how = stated_order(weights.num_classes, classes, info, options.class_indices)
    elif weights.num_classes < classes:
        stated_order(weights.num_classes, classes, info, None)  # says why it cannot be

    _say_weights(options, weights)
    started = time.monotonic()
    at_N = _chosen(len(source), options.limit)
    read = functools.partial(read_logits, weights, source, batch_size=options.batch_size)
    logits_NH = read(at_N, normalisation, title="evaluate")
    seconds = time.monotonic() - started
    labels_N = np.asarray(source.labels_N)[at_N]
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
            f"the classes are among the outputs: top-1 {_percent(finding.top1)} on images "
            "that were not used to find them"
        )
        _say_order(options, order_K)

    assert order_K is not None  # stated or found
    rank_N = ranks(logits_NH, labels_N, order_K)
    top1 = float((rank_N < 1).mean())
    progress.say(
        f"{info.name}, test split: {len(at_N)} of {len(source)} images of {options.image_size} px, "
        f"{classes} classes ({how}), {_in_words(normalisation)}"
    )
    error = np.sqrt(top1 * (1 - top1) / len(at_N))
    progress.say(
        f"  top-1 {_percent(top1, 2)} (standard error {_percent(error, 2)}), "
        f"top-5 {_percent((rank_N < 5).mean(), 2)}, {seconds:.1f} s "
        f"({len(at_N) / seconds:.0f} images per second)"
    )
    for line in per_class(rank_N < 1, labels_N, classes, names):
        progress.say(f"  {line}")
    if broken := int((~np.isfinite(logits_NH).all(1)).sum()):
        progress.say(f"  {broken} images have logits that are not finite, and count as wrong")
    if finding and not searched:
        same = weights.num_classes == classes
        _say_finding(options, finding, order_K, logits_NH, labels_N, names, same)
    elif finding is None and top1 <= 1 - least_gain(classes):  # else none could be far above
        at_M = _chosen(len(at_N), HINT_IMAGES)
        others = {
            name: other
            for name, other in usual_normalisations(info).items()
            if not _alike(other, normalisation)
        }
        readings = (
            (name, read(at_N[at_M], other, title=f"try {name}")) for name, other in others.items()
        )
        right_M = rank_N[at_M] == 0
        misread = find_normalisation(readings, labels_N[at_M], right_M, order_K, **known)
        if misread:
            _say_normalisation(misread, normalisation, others[misread.name], len(at_M))
        elif not looks_trained(right_M, classes):
            progress.say(
                "the network is not visibly better than chance, in no usual normalisation or class "
                "order: are these its weights, its width, depth and stem, and its data set?"
            )


def per_class(
    right_N: np.ndarray, labels_N: np.ndarray, classes: int, names: Sequence[str] | None
) -> list[str]:
    """Summarise the accuracy of each class in two or three lines."""
    counts_K = np.bincount(labels_N, minlength=classes)
    right_K = np.bincount(labels_N[right_N], minlength=classes)
    present = np.flatnonzero(counts_K)
    accuracy = right_K[present] / counts_K[present]
    by_accuracy = present[np.argsort(accuracy, kind="stable")]

    def shown(some: np.ndarray) -> str:
        return ", ".join(f"{_class(c, names)} {_percent(right_K[c] / counts_K[c])}" for c in some)

    lines = [
        f"per class: mean {_percent(accuracy.mean())}, median {_percent(np.median(accuracy))}",
        f"lowest: {shown(by_accuracy[:3])}",
        f"highest: {shown(by_accuracy[::-1][:3])}",
    ]
    if len(present) < classes:
        lines.append(f"{classes - len(present)} classes have no image among these")
    return lines


def _say_normalisation(misread: Misread, used: Normalisation, other: Normalisation, images: int):
    """Say which other normalisation works much better, and how to state it."""
    order = " (and the classes in another order)" if misread.finding else ""
    progress.say(
        f"the normalisation seems wrong: with {misread.name}{order} top-1 is "
        f"{_percent(misread.top1)} on {images} images, against {_percent(misread.stated_top1)} "
        f"with {_in_words(used)}. Use {_flags(other)}; in a config networks.NAME.mean and "
        "networks.NAME.std"
    )


def _say_finding(options, finding: Finding, stated_K, logits_NH, labels_N, names, same) -> None:
    """Say that the classes are permuted, how, and what to do."""
    order_K = finding.order_K
    progress.say(
        f"the classes seem permuted: {_percent(finding.top1)} under another order against "
        f"{_percent(finding.stated_top1)}"
    )
    why = finding.why or "no usual mistake explains it; the order is estimated from these images"
    progress.say(f"  {why}")
    counts_KH = confusion(logits_NH, labels_N, len(order_K))
    surest = np.argsort(-counts_KH[np.arange(len(order_K)), order_K], kind="stable")
    for c in surest[(order_K != stated_K)[surest]][:3]:
        output = _class(order_K[c], names) if same else str(order_K[c])
        progress.say(f"  your class {_class(c, names)} looks like the network's class {output}")
    _say_order(options, order_K)


def _say_order(options: argparse.Namespace, order_K: np.ndarray) -> None:
    """Say how to use an order, and write it where that was asked for."""
    listed = ",".join(map(str, order_K))
    if np.array_equal(order_K, np.arange(len(order_K))) and not options.save_order:
        progress.say("  to use it: leave out --class-indices (and networks.NAME.class_indices)")
        return
    if options.save_order:
        workdir.write_json(options.save_order, order_K.tolist())
        listed = options.save_order
        progress.say(f"  the order is in {listed}")
    elif len(order_K) > 100:
        listed = "FILE"
        progress.say("  add --save-order=FILE to have the order in a file")
    progress.say(
        f"  to use it: --class-indices={listed}; in a config networks.NAME.class_indices; or put "
        "the images into the network's order"
    )


def _class(c: int, names: Sequence[str] | None) -> str:
    return f"{c} '{names[c]}'" if names is not None and c < len(names) else f"{c}"


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f} %"


def _in_words(normalisation: Normalisation) -> str:
    mean, std = (
        ", ".join(f"{x:.4g}" for x in values) for values in (normalisation.mean, normalisation.std)
    )
    return f"mean ({mean}), std ({std})"


def _flags(normalisation: Normalisation) -> str:
    mean, std = (",".join(f"{x:.6g}" for x in v) for v in (normalisation.mean, normalisation.std))
    return f"--mean={mean} --std={std}"


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


def _say_weights(options: argparse.Namespace, weights: Weights) -> None:
    progress.say(
        f"{options.file}: {weights.kind}, {options.architecture}, {weights.parameters:,} "
        f"parameters, {weights.batch_norms} BatchNorms"
    )
    progress.say(f"  sha256: {weights.sha256}")


def _normalisation(options: argparse.Namespace) -> Normalisation | None:
    """What --mean and --std state; None where neither is given."""
    if options.mean is None and options.std is None:
        return None
    if options.mean is None or options.std is None or len(options.mean) != len(options.std):
        raise UserError("--mean and --std belong together, with one number per channel each")
    if min(options.std) <= 0:
        raise UserError(f"--std is {options.std}; its numbers must be positive")
    return Normalisation(options.mean, options.std)


# --- the command line -------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 < value < float("inf"):
            words = {int: "a positive whole number", float: "a positive number"}
            raise argparse.ArgumentTypeError(f"is {text!r}; it must be {words[kind]}")
        return value

    return parse


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"is {text!r}; it must be numbers with commas between, as 0.5,0.5,0.5"
        ) from None


def _indices(text: str) -> str | tuple[int, ...]:
    """Parse "find", "4,0,7", "0-9,20", or the path of a JSON file with a list."""
    if text == FIND:
        return FIND
    if re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
        ends = [tuple(map(int, part.split("-"))) for part in text.split(",")]
        return tuple(i for span in ends for i in range(span[0], span[-1] + 1))
    try:
        with open(at_home(text)) as file:
            found = json.load(file)
    except (OSError, ValueError):
        found = None
    if isinstance(found, list) and found and all(type(i) is int for i in found):
        return tuple(found)
    raise argparse.ArgumentTypeError(
        f"is {text!r}; it must be outputs as 4,0,7 or 0-9, a file with a JSON list of them, or "
        f"{FIND}"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = __doc__.split("\n\n", 2)
    root = _Parser(
        prog="python -m prism_jax.tools.teachers",
        description="\n\n".join(description[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=run.__doc__, description=run.__doc__, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    listing = command("list", list_command)
    listing.add_argument("--names", action="store_true", help="only the names, one per line")

    importing, evaluating = command("import", import_command), command("evaluate", evaluate_command)
    for added in (importing, evaluating):
        add = added.add_argument
        add(
            "file",
            type=at_home,
            help=".pth, .safetensors, .msgpack, .npz, a squeeze/<teacher> folder, Orbax",
        )
        add("--architecture", required=True, help="a name of `list`")
        add("--weights-key", help="of a file with several networks: what the names begin with")
        add("--num-classes", type=_positive(int), help="of the head (default: as in the file)")
        add("--image-size", type=_positive(int), help="side in pixels (default: the usual one)")
        add("--width", type=_positive(float), default=1.0, help="multiplier of the channels")
        add("--depth", type=_positive(float), default=1.0, help="multiplier of the blocks")
        add("--stem", choices=STEMS, default="imagenet", help="small: for 16 to 64 px")
        add("--mean", type=_numbers, help="of its training pixels in [0, 1], one per channel")
        add("--std", type=_numbers, help="one per channel (default: the data set's)")
    importing.add_argument(
        "--out", type=at_home, help="folder to write weights.safetensors and record.json to"
    )

    add = evaluating.add_argument
    add("--dataset", required=True, help=f"{', '.join(DATASETS)}, or tfds:<builder>")
    add("--source", required=True, help=", ".join(SOURCES))
    add("--path", type=at_home, help="where the images are")
    add(
        "--class-indices",
        type=_indices,
        help="the output that is each class: 4,0,7 or 0-9 or a JSON file; find: by the images",
    )
    add("--save-order", type=at_home, help="file for a class order that is found")
    add("--limit", type=_positive(int), help="test so many images only, drawn over all classes")
    add("--batch-size", type=_positive(int), default=64, help="images per step")
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
      The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parser().parse_args(argv or ["--help"])
        problems: list[str] = []
        prepare_environment({}, problems)
        if problems:
            raise UserError("; ".join(problems))
        if options.run is not list_command:
            parallel.find_devices()
        options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output, as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        name = error.filename or "a file"
        print(f"error: {name} cannot be used: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was left half written.", file=sys.stderr)
        return 130
    except SystemExit as stopped:  # argparse has printed its help
        return int(stopped.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
