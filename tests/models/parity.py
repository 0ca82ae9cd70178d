"""What both sides of a parity test share: cases, weights, inputs, and digests of outputs.

Weights are drawn per tensor by a generator seeded with the tensor's PyTorch name, so that the
golden files hold outputs only.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.models import build, import_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"
SAMPLES = {"pixels": 64, "logits": 64}
SHALLOW = 0.01  # one block per stage
ALPHA_BN, FIRST_BN = 0.01, 10.0  # of the objective whose gradient by the pixels is compared


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one batch of images; ``train`` also compares a training step."""

    architecture: str
    depth: float
    image_size: int
    num_classes: int = 10
    width: float = 1.0
    stem: str = "imagenet"
    train: bool = True

    @property
    def name(self) -> str:
        words = [self.architecture, "shallow" if self.depth < 1 else "full"]
        words += ["narrow"] * (self.width < 1) + ["small"] * (self.stem == "small")
        return "-".join([*words, str(self.image_size)])

    @property
    def golden(self) -> pathlib.Path:
        return GOLDEN / f"{self.name}.npz"


def _small(architecture: str, depth: float, image_size: int, width: float = 1.0) -> Case:
    return Case(architecture, depth, image_size, width=width, stem="small", train=False)


# Rows that differ only in their number of blocks are the same program here.
FAST = [
    *(Case(name, SHALLOW, 32, width=0.25) for name in ("resnet18", "resnet34")),
    *(Case(name, SHALLOW, 32, width=0.25) for name in ("resnet50", "resnet101")),
    *(Case(f"resnet{n}", SHALLOW, 16) for n in (20, 32, 44, 56)),
    *(Case(f"shufflenet_v2_{size}", SHALLOW, 48) for size in ("x0_5", "x1_0", "x2_0")),
    Case("wide_resnet50_2", SHALLOW, 32, width=0.25),
    Case("wrn_16_2", SHALLOW, 16),
    Case("mobilenet_v2", SHALLOW, 33),
    Case("efficientnet_b0", SHALLOW, 40),
    *(Case(name, SHALLOW, 32) for name in ("mnasnet1_0", "mnasnet1_3")),
    Case("densenet121", SHALLOW, 64, width=0.25),
    Case("vgg11_bn", SHALLOW, 32, width=0.25),
    Case("regnet_y_8gf", SHALLOW, 32, width=0.25),
    Case("alexnet", 1.0, 95, width=0.25),
    *(Case(f"vit_{size}_patch16_224", SHALLOW, 32) for size in ("tiny", "small")),
    Case("deit_tiny", 0.25, 32),
    Case("swin_tiny", 0.35, 117),  # the third stage has two blocks, and more than one window
    Case("convnext_tiny", SHALLOW, 32, width=0.25),
    *(
        Case(f"convnet_d{blocks}{norm}", 1.0, max(16, 2**blocks), width=0.125)
        for blocks in range(1, 7)
        for norm in ("", "_bn", "_none")
    ),
    *(
        _small(name, SHALLOW, 32)
        for name in (
            "shufflenet_v2_x0_5 mobilenet_v2 efficientnet_b0 mnasnet1_0 vit_tiny_patch16_224"
        ).split()
    ),
    *(
        _small(name, SHALLOW, 32, width=0.25)
        for name in (
            "resnet18 resnet50 wide_resnet50_2 densenet121 vgg11_bn regnet_y_8gf convnext_tiny"
        ).split()
    ),
    _small("alexnet", 1.0, 32, width=0.25),
    _small("swin_tiny", 0.35, 64),
]
IMAGENET = (
    "resnet18 resnet34 resnet50 resnet101 wide_resnet50_2 mobilenet_v2 shufflenet_v2_x0_5 "
    "shufflenet_v2_x1_0 shufflenet_v2_x2_0 efficientnet_b0 mnasnet1_0 mnasnet1_3 densenet121 "
    "vgg11_bn regnet_y_8gf alexnet vit_tiny_patch16_224 vit_small_patch16_224 deit_tiny swin_tiny "
    "convnext_tiny"
).split()
CIFAR = "resnet20 resnet32 resnet44 resnet56 wrn_16_2".split()
SLOW = [
    *(Case(name, 1.0, 224, 1000) for name in IMAGENET),
    *(Case(name, 1.0, 97, train=False) for name in IMAGENET),
    *(_small(name, 1.0, 64) for name in IMAGENET),
    _small("swin_tiny", 1.0, 32),
    *(Case(name, 1.0, 32) for name in CIFAR),
    *(Case(name, 1.0, 33, train=False) for name in CIFAR),
    *(Case(f"convnet_d{blocks}", 1.0, 64 if blocks == 6 else 32) for blocks in range(1, 7)),
    *(Case(f"convnet_d3{norm}", 1.0, 33, train=False) for norm in ("", "_bn", "_none")),
]


def generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of one tensor: of order one, so that every layer matters."""
    draw = generator(name)
    if name.endswith("running_var"):
        return draw.uniform(0.5, 1.5, shape)
    if name.endswith("weight") and len(shape) == 1:
        return draw.uniform(0.5, 1.5, shape)
    if name.endswith("layer_scale"):
        return draw.uniform(0.2, 0.6, shape)
    if len(shape) > 1 and name.endswith("weight"):
        return draw.standard_normal(shape) * np.sqrt(1.5 / np.prod(shape[1:]))
    return draw.standard_normal(shape) * 0.3


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images (3, H, W, 3) and labels (3,)."""
    images_BHWC = generator("images").standard_normal((3, case.image_size, case.image_size, 3))
    return images_BHWC, np.array([1, 4, 7], np.int32)


def module_of(case: Case):
    """Our network."""
    return build(
        case.architecture,
        case.num_classes,
        width=case.width,
        depth=case.depth,
        stem=case.stem,
        dtype=jnp.float64,
    )


def shapes_of(case: Case):
    """The shapes of our variables."""
    size = case.image_size
    images_BHWC = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    with jax.enable_x64(True):
        return jax.eval_shape(module_of(case).init, jax.random.key(0), images_BHWC)


def leaves_of(case: Case) -> dict[str, import_torch.Leaf]:
    """Our variables by PyTorch's names."""
    return import_torch.torch_leaves(shapes_of(case))


def kept(index: int, shape: tuple[int, ...]) -> np.ndarray:
    """What the ``index``-th dropout of a training step keeps: the same on both sides."""
    keep = generator(f"dropout {index}").random(shape) < 0.6
    keep.flat[index % keep.size] = True  # a block dropped for all images would not be tested
    return keep


def digest(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Shorten each output to its norm and some of its values."""
    short = {}
    for name, value in outputs.items():
        flat = np.asarray(value, np.float64).ravel()
        at = generator(name).integers(0, flat.size, SAMPLES.get(name.split(".")[0], 3))
        short[name] = np.concatenate([[np.linalg.norm(flat)], flat[at]])
    return short


def save(case: Case, outputs: dict[str, np.ndarray]) -> None:
    """Write a golden file: one array of all digests, in the order of the names."""
    short = digest(outputs)
    values = np.concatenate([short[name] for name in sorted(short)])
    np.savez_compressed(case.golden, values=values, names=_checksum(short))


def _checksum(short: dict[str, np.ndarray]) -> int:
    return zlib.crc32("\n".join(sorted(short)).encode())


def compare(case: Case, outputs: dict[str, np.ndarray], tolerance: float = 1e-8) -> list[str]:
    """Names of the outputs that are off the golden file by more than ``tolerance``, relatively."""
    short = digest(outputs)
    with np.load(case.golden) as file:
        golden, names = file["values"], int(file["names"])
    assert names == _checksum(short), "the golden file holds other outputs: make it again"
    off, start = [], 0
    for name in sorted(short):
        expected = golden[start : start + short[name].size]
        start += expected.size
        # Values are compared on the scale of the whole output. The floor is for what is zero but
        # for rounding: the gradient of a bias in front of a BatchNorm.
        scale = max(tolerance * expected[0], 1e-12)
        if not np.allclose(short[name], expected, rtol=tolerance, atol=scale):
            off.append(name)
    return off
