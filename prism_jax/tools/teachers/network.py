"""A weight file as a network whose number of classes and of channels need not be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from prism_jax import progress
from prism_jax.data.datasets import DatasetInfo
from prism_jax.data.weights import read as read_weights
from prism_jax.errors import UserError
from prism_jax.models import build, lookup
from prism_jax.models.fitting import fit
from prism_jax.models.import_torch import torch_leaves, variable_shapes
from prism_jax.types import PyTree


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


FIND = "find"


def stated_order(
    head: int,
    classes: int,
    info: DatasetInfo,
    known: Sequence[int] | None,
    class_indices: Sequence[int] | None,
) -> tuple[np.ndarray, str]:
    """The output of the head that is each class, and in words how that is known.

    Args:
      head: outputs of the network.
      classes: of the images.
      info: their data set.
      known: the ImageNet class of each class of the images, as their source has them.
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
    if known is not None and head in (1000, 1001):
        words = "the outputs that are these classes of ImageNet"
        background = ", behind a background class" if head == 1001 else ""
        return np.array(known) + head - 1000, words + background
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
