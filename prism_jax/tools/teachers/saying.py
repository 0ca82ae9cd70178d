"""What is said of a network: its accuracy, and the usual mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from prism_jax import progress
from prism_jax.analysis.class_order import (
    Finding,
    Misread,
    confusion,
)
from prism_jax.data import workdir
from prism_jax.tools.teachers.network import Weights
from prism_jax.types import Normalisation


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
        return ", ".join(f"{_class(c, names)} {percent(right_K[c] / counts_K[c])}" for c in some)

    lines = [
        f"per class: mean {percent(accuracy.mean())}, median {percent(np.median(accuracy))}",
        f"lowest: {shown(by_accuracy[:3])}",
        f"highest: {shown(by_accuracy[::-1][:3])}",
    ]
    if len(present) < classes:
        lines.append(f"{classes - len(present)} classes have no image among these")
    return lines


def say_normalisation(misread: Misread, used: Normalisation, other: Normalisation, images: int):
    """Say which other normalisation works much better, and how to state it."""
    order = " (and the classes in another order)" if misread.finding else ""
    progress.say(
        f"the normalisation seems wrong: with {misread.name}{order} top-1 is "
        f"{percent(misread.top1)} on {images} images, against {percent(misread.stated_top1)} "
        f"with {in_words(used)}. Use {_flags(other)}; in a config networks.NAME.mean and "
        "networks.NAME.std"
    )


def say_finding(options, finding: Finding, stated_K, logits_NH, labels_N, names, same) -> None:
    """Say that the classes are permuted, how, and what to do."""
    order_K = finding.order_K
    progress.say(
        f"the classes seem permuted: {percent(finding.top1)} under another order against "
        f"{percent(finding.stated_top1)}"
    )
    why = finding.why or "no usual mistake explains it; the order is estimated from these images"
    progress.say(f"  {why}")
    counts_KH = confusion(logits_NH, labels_N, len(order_K))
    surest = np.argsort(-counts_KH[np.arange(len(order_K)), order_K], kind="stable")
    for c in surest[(order_K != stated_K)[surest]][:3]:
        output = _class(order_K[c], names) if same else str(order_K[c])
        progress.say(f"  your class {_class(c, names)} looks like the network's class {output}")
    doubt = None if finding.why else unsure(order_K, logits_NH, labels_N, names)
    say_order(options, order_K, doubt)


def unsure(
    order_K: np.ndarray, logits_NH: np.ndarray, labels_N: np.ndarray, names: Sequence[str] | None
) -> str | None:
    """The classes for most of whose images another output is the largest; None: there are none."""
    counts_KH = confusion(logits_NH, labels_N, len(order_K))
    own_K = counts_KH[np.arange(len(order_K)), order_K]
    few = np.flatnonzero(2 * own_K < np.bincount(labels_N, minlength=len(order_K)))
    if not len(few):
        return None
    return (
        f"it is not sure of {len(few)} classes, for most of whose images another output is the "
        f"largest: {listed(few, names)}; look at them first"
    )


def listed(some: np.ndarray, names: Sequence[str] | None) -> str:
    """Classes by number and name, the first ten."""
    shown = ", ".join(_class(c, names) for c in some[:10])
    return shown + (", ..." if len(some) > 10 else "")


def say_order(options: argparse.Namespace, order_K: np.ndarray, doubt: str | None) -> None:
    """Say how to use an order, and what to doubt of it; write it where that was asked for."""
    if doubt:
        progress.say(f"  {doubt}")
    indices = ",".join(map(str, order_K))
    if np.array_equal(order_K, np.arange(len(order_K))) and not options.save_order:
        progress.say("  to use it: leave out --class-indices (and networks.NAME.class_indices)")
        return
    if options.save_order:
        workdir.write_json(options.save_order, order_K.tolist())
        indices = options.save_order
        progress.say(f"  the order is in {indices}")
    elif len(order_K) > 100:
        indices = "FILE"
        progress.say("  add --save-order=FILE to have the order in a file")
    progress.say(
        f"  to use it: --class-indices={indices}; in a config networks.NAME.class_indices; or put "
        "the images into the network's order"
    )


def _class(c: int, names: Sequence[str] | None) -> str:
    return f"{c} '{names[c]}'" if names is not None and c < len(names) else f"{c}"


def percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f} %"


def in_words(normalisation: Normalisation) -> str:
    mean, std = (
        ", ".join(f"{x:.4g}" for x in values) for values in (normalisation.mean, normalisation.std)
    )
    return f"mean ({mean}), std ({std})"


def _flags(normalisation: Normalisation) -> str:
    mean, std = (",".join(f"{x:.6g}" for x in v) for v in (normalisation.mean, normalisation.std))
    return f"--mean={mean} --std={std}"


def say_weights(options: argparse.Namespace, weights: Weights) -> None:
    progress.say(
        f"{options.file}: {weights.kind}, {options.architecture}, {weights.parameters:,} "
        f"parameters, {weights.batch_norms} BatchNorms"
    )
    progress.say(f"  sha256: {weights.sha256}")
