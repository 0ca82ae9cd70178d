"""Statistics of real images against NumPy, batch by batch and image by image."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers.compiling import fast_programs, only_fast_alike
from helpers.networks import COLOUR, TwoConvs, random_variables
from scipy import ndimage

from prism_jax import rng
from prism_jax.core import pixels, statistics, views
from prism_jax.data.pipeline import batches
from prism_jax.data.sources import ArraySource
from prism_jax.errors import UserError
from prism_jax.models import build
from prism_jax.synthesis import Recipe, Shown, measuring, misalignment
from prism_jax.teachers import describe

__all__ = ["fast_programs", "only_fast_alike"]  # fixtures
pytestmark = pytest.mark.usefixtures("only_fast_alike")

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
def test_shifted_images_have_black_borders():
    """As the references pad: pixels, before they are normalised."""
    (batch,) = read(batch_size=17)
    found = measuring.mean([measurer(False, crop_pad=3, flip=False).total([batch], group=3)])
    key = rng.stream(rng.root(SEED), measuring.VIEWS, 3, batch.number)
    how = {"crop_scale": (0.5, 1.0), "crop_pad": 3, "flip": False, "roll": 0, "batch": 17}
    view = jax.jit(lambda: views.sample_view(key, SHAPE[:2], **how))()
    tops, lefts = (np.asarray(view.crop[:, axis]).astype(int) + 3 for axis in (0, 1))
    padded = np.pad(batch.images_BHWC, ((0, 0), (3, 3), (3, 3), (0, 0)))
    cut = [p[t : t + 8, left : left + 8] for p, t, left in zip(padded, tops, lefts, strict=True)]
    images = np.asarray(pixels.normalise(np.stack(cut), COLOUR))
    for name in ("conv1", "conv2"):
        stats = numpy_statistics(layers_of(images)[name], True)
        for stat, value in stats.items():
            np.testing.assert_allclose(found["conv"][name][stat], value, rtol=2e-4, atol=2e-5)
    # Twin: the mean colour, which is black of no data set, moves the statistics.
    grey = np.asarray(views.apply_view(pixels.normalise(batch.images_BHWC, COLOUR), view))
    moved = (
        numpy_statistics(layers_of(grey)["conv1"], True)["mean"] - found["conv"]["conv1"]["mean"]
    )
    assert np.abs(moved).max() > 0.05


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


# --- groups: the network in training mode -----------------------------------------------------


def train_mode_moments(images, *, running=False):
    """Moments of both BatchNorms' inputs; the first normalises with the batch's, or as it is."""
    params, found = VARIABLES["params"], {}
    y = np.asarray(images, np.float64)
    for i, stride in ((1, 1), (2, 2)):
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        reach = stride * ((y.shape[1] - 1) // stride) + 1
        kernel = params[f"conv{i}"]["kernel"].astype(np.float64)
        z = sum(
            padded[:, u : u + reach : stride, v : v + reach : stride] @ kernel[u, v]
            for u in range(3)
            for v in range(3)
        )
        mean, var = z.mean((0, 1, 2)), z.var((0, 1, 2))
        found[f"bn{i}"] = {"mean": mean, "var": var}
        if running:
            mean, var = (VARIABLES["batch_stats"][f"bn{i}"][name] for name in ("mean", "var"))
        bn = params[f"bn{i}"]
        y = np.maximum((z - mean) / np.sqrt(var + 1e-5) * bn["scale"] + bn["bias"], 0)
    return found


@pytest.mark.usefixtures("fast_programs")
def test_a_group_is_measured_in_training_mode_against_numpy():
    found_batches = read(batch_size=SIZE)[:2]
    found = measuring.mean([measurer(False, train=True).total(found_batches, group=2)])
    assert set(found) == {"bn"}
    shown_batches = [seen(batch, 2, SIZE) for batch in found_batches]
    expected, twin = (
        jax.tree.map(
            lambda *x: np.mean(x, 0), *(train_mode_moments(x, running=r) for x in shown_batches)
        )
        for r in (False, True)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found["bn"], expected
    )
    assert np.abs(found["bn"]["bn2"]["mean"] - twin["bn2"]["mean"]).max() > 1e-2  # evaluation mode


# --- every image by itself --------------------------------------------------------------------


def reader(of, **fields):
    teacher = describe("a", MODULE, SHAPE)
    return measuring.Reader(of(teacher, COLOUR), VARIABLES, **fields)


@pytest.mark.usefixtures("fast_programs")
def test_difficulties_against_numpy():
    found = reader(measuring.difficulty_of).read(read(shuffle=False), 0)["difficulty_N"]
    assert found.shape == (17,) and found.dtype == np.float32
    images = np.asarray(pixels.normalise(IMAGES, COLOUR))
    for i in range(17):
        told, far = train_mode_moments(images[i : i + 1], running=True), 0
        for name, running in VARIABLES["batch_stats"].items():
            ratio = (told[name]["var"] + 1e-6) / (running["var"].astype(np.float64) + 1e-6)
            mean = np.linalg.norm(told[name]["mean"] - running["mean"])
            far += (mean + np.linalg.norm(np.log(ratio))) / len(ratio) ** 0.5 / 2
        assert found[i] == pytest.approx(far, rel=1e-3)
    # Twin: the moments of a whole batch say nothing of an image.
    assert found.std() > 1e-2


def test_reading_is_the_same_on_any_devices_and_in_any_batches():
    one = reader(measuring.difficulty_of).read(read(shuffle=False), 0)["difficulty_N"]
    spread = reader(measuring.difficulty_of, devices=jax.devices()[:8])
    shorter = read(shuffle=False, batch_size=3)
    np.testing.assert_array_equal(spread.read(shorter, 0)["difficulty_N"], one)
    assert spread._map.traces == 1
    reversed_source = ArraySource(IMAGES[::-1], np.arange(17) % 2, num_classes=2)  # twin
    other = batches(reversed_source, batch_size=6, epochs=1, seed=0, name="x", shuffle=False)
    assert not np.array_equal(spread.read(other, 0)["difficulty_N"], one)


@pytest.mark.usefixtures("fast_programs")
def test_features_are_what_the_head_reads_and_probabilities_of_the_class():
    module = build("convnet_d1_bn", 5, width=0.125)
    variables = random_variables(module, SHAPE, 1)
    of = measuring.features_of(describe("b", module, SHAPE), COLOUR)
    found = measuring.Reader(of, variables).read(read(shuffle=False), 3)
    images = pixels.normalise(IMAGES, COLOUR)
    logits = np.asarray(jax.jit(module.apply)(variables, images), np.float64)
    head = next(v for v in variables["params"].values() if np.ndim(v.get("kernel")) == 2)
    by_head = found["embedding_ND"] @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(by_head, logits, rtol=1e-3, atol=1e-3)
    expected = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found["log_probability_N"], expected[:, 3], rtol=1e-3, atol=1e-4)
    assert np.abs(found["log_probability_N"] - expected[:, 2]).max() > 1e-2  # twin


def test_complexity_against_scipy():
    images = RANDOM.integers(0, 256, (3, 12, 9, 3), np.uint8)
    images[1] = 77  # flat
    images[2] = np.arange(9, dtype=np.uint8)[:, None] * 20  # a slope has one gradient, but at ends
    found = np.asarray(measuring.complexity(images))
    for image, value in zip(images, found, strict=True):
        grey = image.astype(np.float64).mean(-1) / 255
        smooth = ndimage.gaussian_filter(grey, 1.0)
        down, across = np.gradient(smooth)
        assert value == pytest.approx((down**2 + across**2).var(), rel=1e-3, abs=1e-12)
    assert found[1] < 1e-10 < found[2] < found[0]
    rough = np.stack(np.gradient(images[0].astype(np.float64).mean(-1) / 255))
    assert (rough**2).sum(0).var() > 2 * found[0]  # twin: not smoothed


def skew(x_BHWC, patch):
    """A kind of statistics that is not here."""
    x = x_BHWC - x_BHWC.mean((0, 1, 2))
    return {"skew": (x**3).mean((0, 1, 2))}


@pytest.mark.usefixtures("fast_programs")
@pytest.mark.parametrize("kind", [*statistics.KINDS, "skew"])
def test_every_kind_is_measured_and_matched(kind, monkeypatch):
    """Also one that is a row of the table and nothing else."""
    monkeypatch.setitem(statistics.OF_CONVOLUTIONS, "skew", statistics.Kind(("skew",), skew))
    monkeypatch.setattr(statistics, "NAMES", (*statistics.NAMES, "skew"))
    teacher = describe("a", MODULE, SHAPE)
    _, found = measurer(False).total(read(), group=0)
    conv = jax.tree.map(lambda x: (x / len(IMAGES)).astype(np.float32), found["conv"])
    variables = {**VARIABLES, measuring.CONV: conv}
    images = pixels.normalise(IMAGES[:4], COLOUR)
    labels = np.zeros(4, np.int32)

    def far(match):
        recipe = Recipe(match=match, statistic_patch=PATCH)
        reading = teacher.read(
            variables, images, COLOUR, statistics="bn" in match, conv_inputs=match != ("bn",)
        )
        shown = Shown(labels, 1.0, 1.0)
        return float(misalignment(recipe, teacher, variables, reading, shown, None)[0])

    alone, others = far((kind,)), tuple(k for k in (*statistics.KINDS, "skew") if k != kind)
    assert alone > 0
    assert far((*others, kind)) > far(others) + 1e-3
    # Twin: what is not measured is named, not left out.
    del conv["conv1"]["skew"]
    if kind == "skew":
        with pytest.raises(UserError, match="missing: skew of conv1 in its targets"):
            far((kind,))
