"""One row per architecture, and the ways to build from them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.models.alexnet import AlexNet
from prism_jax.models.convnet import ConvNet
from prism_jax.models.efficientnet import EfficientNet
from prism_jax.models.mobilenet import MobileNetV2
from prism_jax.models.resnet import ResNet
from prism_jax.models.shufflenet import ShuffleNetV2

STEMS = ("imagenet", "small")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is known of a network before it is built.

    Attributes:
      make: the module's constructor, called with ``num_classes`` and the attributes of
        :func:`build`.
      family: the name of its design.
      paper: arXiv number.
      parameters: trainable parameters at width 1, depth 1, with ``classes`` and ``image_size``.
      batch_norms: number of BatchNorm layers at depth 1.
      first_bn: path of the first of them; None without any.
      classes, image_size: of the published weights.
      min_image_size: smallest side in pixels per stem.
      weights: names of the weight files' layouts that ``import_torch`` reads for it.
    """

    make: Callable[..., nn.Module]
    family: str
    paper: str
    parameters: int
    batch_norms: int
    first_bn: tuple[str, ...] | None
    min_image_size: dict[str, int]
    classes: int = 1000
    image_size: int = 224
    weights: tuple[str, ...] = ("torchvision",)


def _convnets() -> dict[str, Architecture]:
    """ConvNet-D1 to D6 at 32 px, ten classes: plain names have instance norm, as in the field."""
    rows = {}
    for blocks in range(1, 7):
        side = 32 // 2**blocks
        # The linear layer of six blocks reads a 1x1 map of 64-px images.
        image_size, side = (32, side) if side else (64, 1)
        for norm, suffix in (("instance", ""), ("batch", "_bn"), ("none", "_none")):
            convs = 3 * 9 * 128 + (blocks - 1) * 9 * 128 * 128 + blocks * 128
            norms = 0 if norm == "none" else blocks * 256
            rows[f"convnet_d{blocks}{suffix}"] = Architecture(
                functools.partial(ConvNet, blocks=blocks, norm=norm),
                family="convnet",
                paper="2006.05929",
                parameters=convs + norms + 10 * (128 * side * side + 1),
                batch_norms=blocks if norm == "batch" else 0,
                first_bn=("features.1",) if norm == "batch" else None,
                min_image_size=dict.fromkeys(STEMS, 2**blocks),
                classes=10,
                image_size=image_size,
                weights=("condensation",),
            )
    return rows


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": Architecture(
        functools.partial(ResNet, blocks=(2, 2, 2, 2)),
        family="resnet",
        paper="1512.03385",
        parameters=11_689_512,
        batch_norms=20,
        first_bn=("bn1",),
        min_image_size={"imagenet": 32, "small": 8},
    ),
    "mobilenet_v2": Architecture(
        MobileNetV2,
        family="mobilenet",
        paper="1801.04381",
        parameters=3_504_872,
        batch_norms=52,
        first_bn=("features.0.1",),
        min_image_size={"imagenet": 32, "small": 8},
    ),
    "shufflenet_v2_x0_5": Architecture(
        functools.partial(ShuffleNetV2, features=(48, 96, 192, 1024)),
        family="shufflenet",
        paper="1807.11164",
        parameters=1_366_792,
        batch_norms=56,
        first_bn=("conv1.1",),
        min_image_size={"imagenet": 32, "small": 8},
    ),
    "efficientnet_b0": Architecture(
        EfficientNet,
        family="efficientnet",
        paper="1905.11946",
        parameters=5_288_548,
        batch_norms=49,
        first_bn=("features.0.1",),
        min_image_size={"imagenet": 32, "small": 8},
    ),
    "alexnet": Architecture(
        AlexNet,
        family="alexnet",
        paper="1404.5997",
        parameters=61_100_840,
        batch_norms=0,
        first_bn=None,
        min_image_size={"imagenet": 63, "small": 16},
    ),
    **_convnets(),
}


def build(
    architecture: str,
    num_classes: int,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    stem: str = "imagenet",
    dtype: jnp.dtype = jnp.float32,
) -> nn.Module:
    """Build a network of the registry.

    Args:
      architecture: a key of ``ARCHITECTURES``.
      num_classes: size of its head.
      width: multiplier of the channels, rounded to multiples of eight.
      depth: multiplier of the blocks per stage, each at least one.
      stem: "imagenet", or "small" for 16 to 64 px: 3x3, stride 1, no pooling.
      dtype: of the computation; parameters are float32.

    Returns:
      A module called as ``module(images_BHWC, train=False)``, giving logits_BK. Input channels
      are those of the images it is initialised with.

    Raises:
      UserError: no such architecture or stem, or a number that is not positive.
    """
    row = lookup(architecture)
    if stem not in STEMS:
        raise UserError(f"stem {stem!r} of {architecture} must be one of: {', '.join(STEMS)}")
    for name, value in (("num_classes", num_classes), ("width", width), ("depth", depth)):
        if not value > 0:
            raise UserError(f"{name} of {architecture} is {value}; it must be positive")
    return row.make(num_classes=num_classes, width=width, depth=depth, stem=stem, dtype=dtype)


def lookup(architecture: str) -> Architecture:
    """The row of an architecture.

    Raises:
      UserError: no such architecture; the message names the nearest ones.
    """
    if architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(architecture, ARCHITECTURES, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"there is no architecture {architecture!r}{hint} There are: "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[architecture]


def first_batch_norm(
    module: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[str, ...] | None:
    """Find the BatchNorm that a network runs first, by tracing it abstractly.

    Args:
      module: any ``flax.linen`` image network, called as ``module(images_BHWC)``.
      image_shape: (height, width, channels).

    Returns:
      Its path in "batch_stats", or None if there is none.
    """
    paths = []

    def record(run, args, kwargs, context):
        if isinstance(context.module, layers.BatchNorm) and context.method_name == "__call__":
            paths.append(context.module.path)
        return run(*args, **kwargs)

    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record):
        jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), images_BHWC)
    return paths[0] if paths else None
