"""Statistics of real images against NumPy, batch by batch and image by image."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.compiling import fast_programs
from helpers.networks import COLOUR, TwoConvs, random_variables

from prism_jax import rng
from prism_jax.core import pixels, views
from prism_jax.data.pipeline import batches
from prism_jax.data.sources import ArraySource
from prism_jax.synthesis import measuring
from prism_jax.teachers import describe

__all__ = ["fast_programs"]  # a fixture

SHAPE, SIZE, PATCH, SEED = (8, 8, 3), 6, 4, 5
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (17, *SHAPE), np.uint8)
SOURCE = ArraySource(IMAGES, np.arange(17) % 2, num_classes=2)
MODULE = TwoConvs()
VARIABLES = random_variables(MODULE, SHAPE, 0)


def measurer(per_image, **fields):
    given = {"batch_size": SIZE, "patch": PATCH, "crop_min": 0.5, "flip": True, "seed": SEED}
    teacher = describe("a", MODULE, SHAPE)
    return measuring.Measurer(teacher, VARIABLES, COLOUR, per_image=per_image, **given | fields)


def read(**fields):
    fields = {"batch_size": SIZE, "epochs": 1, "seed": SEED, "name": "order", **fields}
    return list(batches(SOURCE, **fields))


@jax.jit
def apply(images_BHWC):
    return MODULE.apply(VARIABLES, images_BHWC, mutable=["conv_inputs", "bn_statistics"])


def layers_of(images_BHWC):
    """The inputs of all layers, as the network itself computes them."""
    _, sown = apply(images_BHWC)
    inputs = {name: np.asarray(x["x"], np.float64) for name, x in sown["conv_inputs"].items()}
    kernels = VARIABLES["params"]
    for i, stride in ((1, 1), (2, 2)):
        x = inputs[f"conv{i}"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        size = (x.shape[1] - 1) // stride + 1
        reach = stride * (size - 1) + 1
        inputs[f"bn{i}"] = sum(
            padded[:, u : u + reach : stride, v : v + reach : stride]
            @ kernels[f"conv{i}"]["kernel"][u, v].astype(np.float64)
            for u in range(3)
            for v in range(3)
        )
    return inputs


def numpy_statistics(x, patches):
    """Mean and variance of channels, and of patches; 8 px are two patches of 4 a side."""
    found = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
    if patches:
        cut = [x[:, r : r + PATCH, c : c + PATCH] for r in (0, 4) for c in (0, 4)]
        found["patch_mean"] = np.array([c.mean() for c in cut])
        found["patch_var"] = np.array([c.var() for c in cut])
    return found


@jax.jit
def shown(images_BHWC, group, number):
    """A batch as it is shown: normalised, one view per image."""
    key, size = rng.stream(rng.root(SEED), measuring.VIEWS, group, number), len(images_BHWC)
    view = views.sample_view(key, SHAPE[:2], crop_scale=(0.5, 1.0), flip=True, roll=0, batch=size)
    return views.apply_view(pixels.normalise(images_BHWC, COLOUR), view)


def seen(batch, group, size):
    """The same of a batch whose views are drawn for so many images."""
    images = np.resize(batch.images_BHWC, (size, *SHAPE))
    return np.asarray(shown(images, group, batch.number))[: len(batch.images_BHWC)]


def expected(found_batches, group, per_image):
    total = {}
    for batch in found_batches:
        images = seen(batch, group, SIZE if per_image else len(batch.images_BHWC))
        parts = [images[i : i + 1] for i in range(len(images))] if per_image else [images]
        for part in parts:
            for name, x in layers_of(part).items():
                for stat, value in numpy_statistics(x, name.startswith("conv")).items():
                    share = len(part) / 17
                    total[name, stat] = total.get((name, stat), 0) + share * value
    return total


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("per_image", [False, True])
def test_means_over_the_set_against_numpy(per_image):
    found_batches = read()
    assert [len(b.images_BHWC) for b in found_batches] == [6, 6, 5]
    measuring_all = measurer(per_image)
    found = measuring.mean([measuring_all.total(found_batches, group=3)])
    assert measuring_all._map.traces == (1 if per_image else 2)  # one program for all sizes, or not
    for (name, stat), value in expected(found_batches, 3, per_image).items():
        kind = "conv" if name.startswith("conv") else "bn"
        if kind == "bn" and not per_image:
            assert found["bn"] == {}
            continue
        np.testing.assert_allclose(found[kind][name][stat], value, rtol=2e-4, atol=2e-4)
        assert found[kind][name][stat].dtype == np.float32
    # Twin: the variance within images is not that within batches.
    other = expected(found_batches, 3, not per_image)
    assert np.abs(other["conv2", "var"] - found["conv"]["conv2"]["var"]).max() > 1e-2


@pytest.mark.parametrize("per_image", [False, True])
def test_devices_and_shards_change_nothing(per_image):
    found_batches = read()
    whole = measurer(per_image).total(found_batches, group=0)
    spread = measurer(per_image, devices=jax.devices()[:8]).total(found_batches, group=0)
    jax.tree.map(np.testing.assert_array_equal, whole, spread)
    shards = [
        measurer(per_image).total(part, group=0) for part in (found_batches[:2], found_batches[2:])
    ]
    assert [images for images, _ in shards] == [12, 5]
    jax.tree.map(np.testing.assert_array_equal, measuring.mean(shards), measuring.mean([whole]))
    # Twin: other coordinates, other views.
    other = measurer(per_image).total(found_batches, group=1)
    assert not np.array_equal(other[1]["conv"]["conv1"]["var"], whole[1]["conv"]["conv1"]["var"])
