"""Published weights reach their published accuracy; needs real data, which is not distributed.

The folder is ``$PRISM_JAX_SHARED_DATA``, or ``shared/data`` beside the repository. Its README
states the accuracies.
"""

from __future__ import annotations

import io
import os
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from prism_jax.data import weights
from prism_jax.models import build

BESIDE = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
DATA = pathlib.Path(os.environ.get("PRISM_JAX_SHARED_DATA", BESIDE))
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no folder {DATA}")
IMAGENET = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def accuracy(module, variables, images_BHWC, labels_B, batch_size, classes=slice(None)):
    forward = jax.jit(module.apply)
    batches = (
        np.asarray(images_BHWC[i : i + batch_size], np.float32)
        for i in range(0, len(labels_B), batch_size)
    )
    logits = np.concatenate([forward(variables, batch) for batch in batches])
    return float((logits[:, classes].argmax(1) == labels_B).mean())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "file", "expected"),
    [("resnet20", "resnet20-12fca82f.th", 0.9164), ("resnet44", "resnet44-014dd654.th", 0.9341)],
)
def test_cifar_resnets(architecture, file, expected):
    with np.load(DATA / "cifar10" / "cifar10_lossless_subset.npz") as data:
        images, labels = data["test_images"], data["test_labels"]
    assert images.shape == (1017, 32, 32, 3)
    images = (images / 255 - IMAGENET[0]) / IMAGENET[1]
    variables = weights.load(
        str(DATA / "weights" / file), architecture, 10, image_shape=(32, 32, 3)
    )
    module = build(architecture, 10)
    top1 = accuracy(module, variables, images, labels, 113)
    assert top1 == pytest.approx(expected, abs=0.0006)  # half an image
    # The twin: with running statistics of their initial values, the network is lost.
    fresh = jax.tree.map(np.ones_like, variables["batch_stats"])
    broken = accuracy(module, {**variables, "batch_stats": fresh}, images[:226], labels[:226], 113)
    assert broken < 0.5


@pytest.mark.slow
def test_mobilenet_v2_on_one_image_per_class():
    images = []
    with tarfile.open(DATA / "imagenet_sample" / "imagenet_sample1000_256.tar") as archive:
        members = sorted((m for m in archive if m.isfile()), key=lambda member: member.name)
        members = [m for m in members if m.name.lower().endswith((".jpeg", ".jpg", ".png"))]
        assert len(members) == 1000
        for member in members:
            image = Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB")
            # The central 87.5 %, as at training; 225 px: even sizes cost four points.
            side = round(min(image.size) * 0.875)
            left, top = ((size - side) // 2 for size in image.size)
            image = image.crop((left, top, left + side, top + side))
            images.append(np.asarray(image.resize((225, 225), Image.Resampling.BICUBIC)))
    variables = weights.load(
        str(DATA / "weights" / "mobilenet_v2_tfslim.safetensors"),
        "mobilenet_v2",
        1000,
        image_shape=(225, 225, 3),
    )
    module, labels = build("mobilenet_v2", 1000), np.arange(1000)
    top1 = accuracy(module, variables, np.stack(images) / 127.5 - 1, labels, 40)
    assert 0.80 < top1 < 0.86  # 0.830 from larger originals
