"""Tensors laid out as an architecture's variables, or what to state so that they can be."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from prism_jax.errors import UserError
from prism_jax.models.import_torch import Leaf, from_state_dict, torch_leaves, variable_shapes
from prism_jax.models.layouts import rename
from prism_jax.models.registry import ARCHITECTURES, STEMS, build, check_image_size, lookup
from prism_jax.types import PyTree

FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))
WIDTHS = (0.0625, 0.125, 0.25, 0.35, 0.5, 0.75, 1.0, 1.25, 1.3, 1.4, 1.5, 2.0, 3.0, 4.0)
DEPTHS = (1.0, 0.5, 2.0, 0.25, 1.5, 0.75, 0.33, 0.67, 1.25, 3.0)  # the usual ones first

_STATISTICS = ("running_mean", "running_var")


def fit(
    tensors: dict[str, np.ndarray],
    path: str,
    architecture: str,
    num_classes: int,
    *,
    image_shape: tuple[int, int, int],
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
    also: str | None = None,
) -> PyTree:
    """Lay out a file's tensors as the variables of an architecture.

    Args:
      tensors: by our names, in PyTorch's layout, of any float dtype.
      path: where they are from, for messages.
      architecture: a key of ``ARCHITECTURES``.
      num_classes, width, depth, stem: as for ``build``.
      image_shape: (height, width, channels) of the images it will read.
      also: what else is suspicious about the file, for the message that it does not fit.

    Returns:
      Float32 NumPy arrays: "params" and "batch_stats" (empty without BatchNorm).

    Raises:
      UserError: they do not fit; everything that does not is told at once, after what would.
    """
    check_image_size(architecture, min(image_shape[:2]), stem)
    form: dict[str, Any] = {"width": width, "depth": depth, "stem": stem}
    shapes = variable_shapes(build(architecture, num_classes, **form), image_shape)
    leaves = torch_leaves(shapes)
    misshapen = _misshapen(tensors, leaves)
    if leaves.keys() == tensors.keys() and not misshapen:
        for name, tensor in tensors.items():
            if tensor.dtype.newbyteorder("=") not in FLOATS:
                raise UserError(
                    f"{path}: {name} holds {tensor.dtype} numbers, which stand for others "
                    "(quantised weights); give the network's float weights"
                )
        return {"batch_stats": {}, **from_state_dict(tensors, shapes, np.dtype(np.float32))}

    # With the architecture's names it is probably it, in another form; else probably another.
    hints, alike = [], leaves.keys() == tensors.keys()
    known = (tensors, architecture, num_classes, image_shape, form)
    found = find_form(*known) if alike else None
    likely = [] if found else guess_architecture(tensors)
    if likely and architecture not in likely:
        hints.append(f"It looks like {' or '.join(likely)}: state that architecture.")
    elif not alike:
        found = find_form(*known)
    if found:
        changed, others = found
        if not changed and (theirs := others.only_classes) is not None:
            raise UserError(_other_head(path, architecture, theirs, num_classes))
        if changed:
            flags = " ".join(f"--{k}={v}" for k, v in changed.items())
            fields = " ".join(f"--config.networks.NAME.{k}={v}" for k, v in changed.items())
            hints.append(f"It fits with {flags} (in a run {fields}).")
        hints += _hints(others, num_classes, image_shape)
    if leaves.keys() > tensors.keys() and not misshapen:
        if all(name.endswith(_STATISTICS) for name in leaves.keys() - tensors.keys()):
            hints.append(
                "It lacks BatchNorm's running statistics, without which the network is another: "
                "save the whole state_dict(), buffers too (of Flax, batch_stats beside params)."
            )
        if lacks_head(tensors, architecture, num_classes, image_shape, form):
            hints.append(
                "Only the head is missing: in a config networks.NAME.start_from in place of "
                "checkpoint draws a new one and trains the network."
            )
    if _ends_in_full(tensors):
        hints.append(
            "It is narrower than width 1 and has all 1,280 channels at its end, as torchvision's "
            "and timm's have; prism_jax's narrow networks have fewer there, and such files are not "
            "read: take weights of width 1 or more."
        )
    hints += [f"{also}."] if also else []
    if not hints:
        hints.append("State the architecture, width, depth and stem it was trained with.")
    raise UserError(_misfit(path, architecture, tensors, leaves, misshapen, hints))


def lacks_head(
    tensors: dict[str, np.ndarray],
    architecture: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    form: dict[str, Any],
) -> set[str]:
    """The names of a network's head, where tensors lack some of it and nothing else; else none."""
    ours, more = (
        torch_leaves(variable_shapes(build(architecture, classes, **form), image_shape))
        for classes in (num_classes, num_classes + 1)
    )
    head = {name for name, leaf in ours.items() if leaf.torch_shape != more[name].torch_shape}
    missing = ours.keys() - tensors.keys()
    return head if missing and missing <= head and tensors.keys() <= ours.keys() else set()


class Others(NamedTuple):
    """In what a file's network differs from the one asked for, where only that is different.

    Attributes:
      classes, channels: the file's, where they are others.
      resized: it is for images of another size.
    """

    classes: int | None = None
    channels: int | None = None
    resized: bool = False

    @property
    def only_classes(self) -> int | None:
        """The file's classes, where nothing else differs."""
        return self.classes if self == Others(classes=self.classes) else None


def compare(
    tensors: dict[str, np.ndarray],
    architecture: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    form: dict[str, Any],
) -> Others | None:
    """Say in what tensors differ from a network; None: in more than ``Others`` can say."""
    rows, columns, channels = image_shape

    def leaves(more_classes: int, shape: tuple[int, int, int]) -> dict[str, Leaf]:
        module = build(architecture, num_classes + more_classes, **form)
        return torch_leaves(variable_shapes(module, shape))

    ours = leaves(0, image_shape)
    misshapen = _misshapen(tensors, ours)
    if ours.keys() != tensors.keys() or len(misshapen) > 8:  # more than a head and a first layer
        return None
    if not misshapen:
        return Others()
    causes = {
        "classes": leaves(1, image_shape),
        "channels": leaves(0, (rows, columns, channels + 1)),
        "resized": leaves(0, (2 * rows, 2 * columns, channels)),
    }
    found: dict[str, set[int]] = {}
    for name, leaf in misshapen.items():
        if tensors[name].ndim != len(leaf.torch_shape):
            return None
        pairs = enumerate(zip(leaf.torch_shape, tensors[name].shape, strict=True))
        for axis, theirs in ((axis, theirs) for axis, (one, theirs) in pairs if one != theirs):
            cause = next(
                (
                    cause
                    for cause, other in causes.items()
                    if other[name].torch_shape[axis] != leaf.torch_shape[axis]
                ),
                None,
            )
            if cause is None:
                return None
            found.setdefault(cause, set()).add(theirs)
    if any(len(found.get(cause, ())) > 1 for cause in ("classes", "channels")):
        return None
    return Others(
        classes=next(iter(found.get("classes", ())), None),
        channels=next(iter(found.get("channels", ())), None),
        resized="resized" in found,
    )


def find_form(
    tensors: dict[str, np.ndarray],
    architecture: str,
    num_classes: int,
    image_shape: tuple[int, int, int],
    form: dict[str, Any],
) -> tuple[dict[str, Any], Others] | None:
    """Find the stem, width and depth that tensors have.

    Returns:
      What of ``form`` has to be changed to fit them, and what is different even then; None: no
      usual form fits them.
    """

    def shape(stem: str) -> tuple[int, int, int]:  # of images that are large enough for it
        least = lookup(architecture).min_image_size[stem]
        return (max(least, image_shape[0]), max(least, image_shape[1]), image_shape[2])

    for depth in dict.fromkeys((form["depth"], *DEPTHS)):
        module = build(architecture, num_classes, **{**form, "depth": depth})
        try:
            ours = torch_leaves(variable_shapes(module, shape(form["stem"])))
        except (TypeError, ValueError, ZeroDivisionError):  # too deep for images of this size
            continue
        if 3 * len(ours.keys() & tensors.keys()) < len(ours):
            return None  # it is another architecture
        if ours.keys() != tensors.keys():
            continue
        for width, stem in itertools.product(
            _near_widths(form["width"], tensors, ours),
            sorted(STEMS, key=lambda stem: stem != form["stem"]),
        ):
            tried = {"stem": stem, "width": width, "depth": depth}
            others = compare(tensors, architecture, num_classes, shape(stem), tried)
            if others is not None:
                return {k: v for k, v in tried.items() if v != form[k]}, others
    return None


def _near_widths(
    width: float, tensors: dict[str, np.ndarray], ours: dict[str, Leaf]
) -> tuple[float, ...]:
    """The given width, and those that suit the numbers of channels of most tensors."""
    ratios = [
        len(tensors[name]) / leaf.torch_shape[0]
        for name, leaf in ours.items()
        if len(leaf.torch_shape) == 4 and tensors[name].ndim == 4
    ]
    meant = width * float(np.median(ratios or [1.0]))
    near = sorted(WIDTHS, key=lambda other: abs(math.log(other / meant)))
    return tuple(dict.fromkeys((width, *near[:3])))


def guess_architecture(tensors: dict[str, np.ndarray]) -> list[str]:
    """Name the architectures, at width and depth 1, that hold just these tensors but the head.

    Args:
      tensors: by the file's names.
    """
    parameters = sum(t.size for name, t in tensors.items() if ".running_" not in name)
    batch_norms = sum(name.endswith("running_mean") for name in tensors)
    likely = []
    for name, row in ARCHITECTURES.items():
        if batch_norms != row.batch_norms:
            continue
        if not 0.5 * row.parameters <= parameters <= 2 * row.parameters:
            continue
        ours = rename(tensors, row.weights)
        images = (row.image_size, row.image_size, 3)
        leaves = torch_leaves(variable_shapes(build(name, row.classes), images))
        if leaves.keys() == ours.keys() and len(_misshapen(ours, leaves)) <= 2:
            likely.append(name)
    return likely


def _misshapen(tensors: dict[str, np.ndarray], leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    return {
        name: leaf
        for name, leaf in leaves.items()
        if name in tensors and tensors[name].shape != leaf.torch_shape
    }


def _ends_in_full(tensors: dict[str, np.ndarray]) -> bool:
    """Whether it is a narrow MobileNetV2 or MnasNet of others: only its last layers are not."""
    ends = (
        ("features.0.0.weight", "features.18.0.weight"),
        ("layers.0.weight", "layers.14.weight"),
    )
    return any(
        first in tensors
        and last in tensors
        and len(tensors[first]) < 32
        and len(tensors[last]) == 1280
        for first, last in ends
    )


def _hints(others: Others, num_classes: int, image_shape: tuple[int, int, int]) -> list[str]:
    """What to state, or to choose otherwise, for a network that differs only in these."""
    rows, columns, channels = image_shape
    hints = []
    if others.channels is not None:
        hints.append(
            f"It reads {_channels(others.channels)}; the images have {_channels(channels)}: choose "
            "other weights, or another data set."
        )
    if others.classes is not None:
        hints.append(
            f"Its head has {others.classes} classes; {num_classes} were asked for (in a config "
            f"networks.NAME.head_classes={others.classes}, and class_indices)."
        )
    if others.resized:
        hints.append(
            f"It is for images of another size than {rows} x {columns} px: state theirs "
            "(--image-size; in a config dataset.image_size)."
        )
    return hints


def _channels(count: int) -> str:
    return f"{count} channel{'s' if count > 1 else ''}"


def _other_head(path: str, architecture: str, head: int, num_classes: int) -> str:
    """What can be done with weights of a head of another size."""
    lines = [f"{path} is a {architecture} with a head of {head} classes; {num_classes} were asked:"]
    if head > num_classes:
        lines.append(
            f"  - if the {num_classes} are among the {head}, keep the head and pick them: in a "
            f"config networks.NAME.head_classes={head} and networks.NAME.class_indices=(4, 0, ...) "
            f"(`python -m prism_jax.tools.teachers evaluate ... --class-indices=find` finds them "
            f"by images), in Python num_classes={head}"
        )
    lines.append(
        "  - if they are other classes, it needs a new head and training: in a config "
        f"networks.NAME.start_from={path} in place of checkpoint trains it from these weights"
    )
    return "\n".join(lines)


def _misfit(
    path: str,
    architecture: str,
    tensors: dict[str, np.ndarray],
    leaves: dict[str, Leaf],
    misshapen: dict[str, Leaf],
    hints: list[str],
) -> str:
    """Tell what would fit, and then everything that does not."""
    shapes = [
        f"{name}: file {tensors[name].shape}, network {leaf.torch_shape}"
        for name, leaf in misshapen.items()
    ]
    lines = [f"{path} does not fit {architecture}:", *(f"  {hint}" for hint in hints)]
    for what, names in (
        ("missing from the file", sorted(leaves.keys() - tensors.keys())),
        ("in the file, but not in the network", sorted(tensors.keys() - leaves.keys())),
        ("of another shape", shapes),
    ):
        if names:
            shown = "; ".join(names[:5]) + ("; ..." if len(names) > 5 else "")
            lines.append(f"  {len(names)} tensors {what}: {shown}")
    return "\n".join(lines)
