"""What both sides of a parity test share: cases, weights, inputs, and digests of outputs.

Weights are drawn per tensor by a generator seeded with the tensor's PyTorch name, so that the
golden files hold outputs only.
"""

from __future__ import annotations

import dataclasses
import pathlib
import zlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
SAMPLES = {"pixels": 64, "logits": 64}
SHALLOW = 0.01  # one block per stage


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one batch of images; ``train`` also compares a training step."""

    architecture: str
    depth: float
    image_size: int
    num_classes: int = 10
    train: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture}-{'shallow' if self.depth < 1 else 'full'}-{self.image_size}"

    @property
    def golden(self) -> pathlib.Path:
        return GOLDEN / f"{self.name}.npz"


FAST = [
    Case("resnet18", SHALLOW, 32, train=True),
    Case("resnet50", SHALLOW, 32),
    Case("wide_resnet50_2", SHALLOW, 32),
    Case("resnet20", SHALLOW, 16, train=True),
    Case("wrn_16_2", SHALLOW, 16),
    Case("mobilenet_v2", SHALLOW, 33),
    Case("shufflenet_v2_x0_5", SHALLOW, 48, train=True),
    Case("efficientnet_b0", SHALLOW, 40),
    Case("mnasnet1_0", SHALLOW, 32),
    Case("densenet121", SHALLOW, 64),
    Case("vgg11_bn", SHALLOW, 32),
    Case("regnet_y_8gf", SHALLOW, 32),
    Case("alexnet", 1.0, 95),
    Case("vit_tiny_patch16_224", SHALLOW, 32),
    Case("swin_tiny", 0.35, 68),
    Case("convnext_tiny", SHALLOW, 32),
    Case("convnet_d3", 1.0, 16),
    Case("convnet_d3_bn", 1.0, 16, train=True),
    Case("convnet_d4_none", 1.0, 16),
]
SLOW = [
    *(
        Case(name, 1.0, 224, 1000)
        for name in (
            "resnet18 resnet34 resnet50 resnet101 wide_resnet50_2 mobilenet_v2 "
            "shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x2_0 efficientnet_b0 mnasnet1_0 "
            "mnasnet1_3 densenet121 vgg11_bn regnet_y_8gf alexnet vit_tiny_patch16_224 "
            "vit_small_patch16_224 deit_tiny swin_tiny convnext_tiny"
        ).split()
    ),
    *(
        Case(name, 1.0, 32)
        for name in "resnet20 resnet32 resnet44 resnet56 wrn_16_2 convnet_d1 convnet_d3".split()
    ),
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
    np.savez_compressed(case.golden, values=np.concatenate([short[n] for n in sorted(short)]))


def compare(case: Case, outputs: dict[str, np.ndarray], tolerance: float = 1e-8) -> list[str]:
    """Names of the outputs that are off the golden file by more than ``tolerance``, relatively."""
    short = digest(outputs)
    with np.load(case.golden) as file:
        golden = file["values"]
    ours = np.concatenate([short[name] for name in sorted(short)])
    assert golden.shape == ours.shape, "the golden file holds other outputs: make it again"
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
