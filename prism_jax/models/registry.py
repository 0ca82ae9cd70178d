"""One row per architecture, and the ways to build from them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from prism_jax.errors import UserError
from prism_jax.models import layers
from prism_jax.models.alexnet import AlexNet
from prism_jax.models.convnet import ConvNet
from prism_jax.models.convnext import ConvNeXt
from prism_jax.models.densenet import DenseNet
from prism_jax.models.efficientnet import EfficientNet
from prism_jax.models.mobilenet import MnasNet, MobileNetV2
from prism_jax.models.regnet import RegNetY
from prism_jax.models.resnet import CifarResNet, ResNet
from prism_jax.models.shufflenet import ShuffleNetV2
from prism_jax.models.swin import Swin
from prism_jax.models.vgg import VGG
from prism_jax.models.vit import VisionTransformer
from prism_jax.models.wrn import WideResNet

STEMS = ("imagenet", "small")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is known of a network before it is built.

    Attributes:
      make: the module's constructor, called with ``num_classes`` and the attributes of
        :func:`build`.
      family: the name of its design.
      paper: arXiv number; empty where there is none.
      parameters: trainable parameters at width 1, depth 1, with ``classes`` and ``image_size``.
      batch_norms: number of BatchNorm layers at depth 1.
      first_bn: path of the first of them; None without any.
      classes, image_size: of the published weights.
      min_image_size: smallest side in pixels per stem.
      weights: the weight files' layouts (``models.layouts``) that are read for it; none where no
        files are published.
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

    def smallest(self, stem: str, depth: float) -> int:
        """The smallest side in pixels that it reads; every block of a ConvNet halves it."""
        if self.family == "convnet":
            blocks = self.make.keywords["blocks"]  # type: ignore[attr-defined]  # of a partial
            return 2 ** layers.scale_blocks(blocks, depth)
        return self.min_image_size.get(stem, 1)


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
                partial(ConvNet, blocks=blocks, norm=norm),
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


def _row(make, parameters: int, batch_norms: int, first_bn: str | None, **known) -> Architecture:
    """A row whose other fields are those of most of torchvision's networks, unless stated."""
    path = None if first_bn is None else (first_bn,)
    known = {"min_image_size": {"imagenet": 32, "small": 8}, **known}
    return Architecture(
        make, parameters=parameters, batch_norms=batch_norms, first_bn=path, **known
    )


_RESNET = {
    "family": "resnet",
    "paper": "1512.03385",
    "weights": ("torchvision", "kuangliu"),
}
_CIFAR = {
    "min_image_size": dict.fromkeys(STEMS, 8),
    "classes": 10,
    "image_size": 32,
    "weights": ("cifar",),
}
_SHUFFLENET = {"family": "shufflenet", "paper": "1807.11164"}
_MNASNET = {
    "family": "mnasnet",
    "paper": "1807.11626",
    "weights": ("torchvision", "timm_mnasnet"),
}
_VIT = {"min_image_size": {"imagenet": 16, "small": 4}, "weights": ("timm",)}


def _cifar_resnet(blocks: int, parameters: int) -> Architecture:
    make = partial(CifarResNet, blocks=blocks)
    known = {**_RESNET, **_CIFAR, "weights": ("cifar", "cifar_fc")}
    return _row(make, parameters, 6 * blocks + 1, "bn1", **known)


ARCHITECTURES: dict[str, Architecture] = {
    "resnet18": _row(partial(ResNet, blocks=(2, 2, 2, 2)), 11_689_512, 20, "bn1", **_RESNET),
    "resnet34": _row(partial(ResNet, blocks=(3, 4, 6, 3)), 21_797_672, 36, "bn1", **_RESNET),
    "resnet50": _row(
        partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True), 25_557_032, 53, "bn1", **_RESNET
    ),
    "resnet101": _row(
        partial(ResNet, blocks=(3, 4, 23, 3), bottleneck=True), 44_549_160, 104, "bn1", **_RESNET
    ),
    "wide_resnet50_2": _row(
        partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True, inner=2),
        68_883_240,
        53,
        "bn1",
        family="wide_resnet",
        paper="1605.07146",
    ),
    "resnet20": _cifar_resnet(3, 269_722),
    "resnet32": _cifar_resnet(5, 464_154),
    "resnet44": _cifar_resnet(7, 658_586),
    "resnet56": _cifar_resnet(9, 853_018),
    "wrn_16_2": _row(
        WideResNet,
        691_674,
        13,
        "block1.layer.0.bn1",
        family="wide_resnet",
        paper="1605.07146",
        **_CIFAR,
    ),
    "mobilenet_v2": _row(
        MobileNetV2,
        3_504_872,
        52,
        "features.0.1",
        family="mobilenet",
        paper="1801.04381",
        weights=("torchvision", "timm_mobilenet_v2"),
    ),
    "shufflenet_v2_x0_5": _row(
        partial(ShuffleNetV2, features=(48, 96, 192, 1024)),
        1_366_792,
        56,
        "conv1.1",
        **_SHUFFLENET,
    ),
    "shufflenet_v2_x1_0": _row(
        partial(ShuffleNetV2, features=(116, 232, 464, 1024)),
        2_278_604,
        56,
        "conv1.1",
        **_SHUFFLENET,
    ),
    "shufflenet_v2_x2_0": _row(
        partial(ShuffleNetV2, features=(244, 488, 976, 2048)),
        7_393_996,
        56,
        "conv1.1",
        **_SHUFFLENET,
    ),
    "efficientnet_b0": _row(
        EfficientNet,
        5_288_548,
        49,
        "features.0.1",
        family="efficientnet",
        paper="1905.11946",
        weights=("torchvision", "timm_efficientnet"),
    ),
    "mnasnet1_0": _row(MnasNet, 4_383_312, 52, "layers.1", **_MNASNET),
    "mnasnet1_3": _row(partial(MnasNet, alpha=1.3), 6_282_256, 52, "layers.1", **_MNASNET),
    "densenet121": _row(
        DenseNet,
        7_978_856,
        121,
        "features.norm0",
        family="densenet",
        paper="1608.06993",
        weights=("torchvision", "densenet_2017"),
    ),
    "vgg11_bn": _row(
        VGG,
        132_868_840,
        8,
        "features.1",
        family="vgg",
        paper="1409.1556",
        min_image_size={"imagenet": 32, "small": 16},
        weights=("torchvision", "timm_vgg"),
    ),
    "regnet_y_8gf": _row(
        RegNetY,
        39_381_472,
        56,
        "stem.1",
        family="regnet",
        paper="2003.13678",
        weights=("torchvision", "timm_regnet"),
    ),
    "alexnet": _row(
        AlexNet,
        61_100_840,
        0,
        None,
        family="alexnet",
        paper="1404.5997",
        min_image_size={"imagenet": 63, "small": 16},
    ),
    "vit_tiny_patch16_224": _row(
        partial(VisionTransformer, heads=3),
        5_717_416,
        0,
        None,
        family="vit",
        paper="2010.11929",
        **_VIT,
    ),
    "vit_small_patch16_224": _row(
        partial(VisionTransformer, heads=6),
        22_050_664,
        0,
        None,
        family="vit",
        paper="2010.11929",
        **_VIT,
    ),
    "deit_tiny": _row(
        partial(VisionTransformer, heads=3, stochastic_depth=0.1),
        5_717_416,
        0,
        None,
        family="vit",
        paper="2012.12877",
        **_VIT,
    ),
    "swin_tiny": _row(
        Swin,
        28_288_354,
        0,
        None,
        family="swin",
        paper="2103.14030",
        weights=("torchvision", "swin_2021", "timm_swin"),
    ),
    "convnext_tiny": _row(
        ConvNeXt,
        28_589_128,
        0,
        None,
        family="convnext",
        paper="2201.03545",
        weights=("torchvision", "convnext_2022", "timm_convnext"),
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


def check_image_size(architecture: str, image_size: int, stem: str = "imagenet") -> None:
    """Refuse images that an architecture is too deep for.

    Args:
      image_size: the shorter side in pixels.

    Raises:
      UserError: they are smaller than the row's minimum, which the message names.
    """
    smallest = lookup(architecture).min_image_size
    if image_size < smallest[stem]:
        other = f", with the small stem {smallest['small']}" if stem != "small" else ""
        raise UserError(
            f"{architecture} needs images of {smallest[stem]} px or more{other}; these have "
            f"{image_size} px. Enlarge them, or choose another stem or network"
        )


def first_layers(
    module: nn.Module, image_shape: tuple[int, int, int]
) -> dict[type[nn.Module], tuple[str, ...] | None]:
    """Find the BatchNorm and the convolution that a network runs first, by tracing it abstractly.

    Args:
      module: any ``flax.linen`` image network, called as ``module(images_BHWC)``.
      image_shape: (height, width, channels).

    Returns:
      By kind of layer, its path among the module's variables, or None if there is none.
    """
    found: dict[type[nn.Module], tuple[str, ...] | None]
    found = {layers.BatchNorm: None, layers.Conv: None}

    def record(run, args, kwargs, context):
        for kind, path in found.items():
            called = isinstance(context.module, kind) and context.method_name == "__call__"
            if called and path is None:
                found[kind] = context.module.path
        if all(found.values()):
            raise _Found
        return run(*args, **kwargs)

    images_BHWC = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with nn.intercept_methods(record), contextlib.suppress(_Found):
        jax.eval_shape(module.init, jax.random.key(0, impl="threefry2x32"), images_BHWC)
    return found


class _Found(Exception):
    """There is nothing left to look for: the rest of the network need not be traced."""
