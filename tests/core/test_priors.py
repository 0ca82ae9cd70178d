"""Image-side terms against NumPy and finite differences, with twins that are seen to differ."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST

from prism_jax.config.sections import Recover
from prism_jax.core.priors import PRIORS, flatness
from prism_jax.synthesis import Recipe

PER_CLASS = 3


def value_and_gradient(prior):
    """Of images alone, compiled."""
    return jax.jit(jax.value_and_grad(lambda x: prior(x, PER_CLASS)), compiler_options=FAST)


RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(2 * PER_CLASS, 5, 6, 2)) * 0.15


def norm(x):
    return np.sqrt((x**2).sum())


def variation(x, *, second_diagonal=True):
    total = norm(x[:, :, 1:] - x[:, :, :-1]) + norm(x[:, 1:] - x[:, :-1])
    down = x[:, 1:, :-1] - x[:, :-1, 1:]
    up = x[:, 1:, 1:] - x[:, :-1, :-1]
    return total + norm(down) + norm(up if second_diagonal else down)


def l2(x, *, of_batch=False):
    return norm(x) if of_batch else np.mean([norm(image) for image in x])


def pooled(x, size=32):
    """Adaptive average pooling, cell by cell."""
    for axis in (1, 2):
        length = x.shape[axis]
        bounds = [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]
        x = np.stack([np.take(x, range(a, b), axis).mean(axis) for a, b in bounds], axis)
    return x


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def density(x, *, anchor=None, classes_mixed=False, of_singular_values=False):
    """The divergence of each class; the target comes from ``anchor``, which does not move."""
    total = 0.0
    anchor = x if anchor is None else anchor
    for i in range(len(x) // PER_CLASS):
        rows = np.arange(len(x))[i::2] if classes_mixed else np.arange(i * 3, i * 3 + 3)
        spectra = []
        for images in (anchor, x):
            flat = pooled(images[rows]).reshape(PER_CLASS, -1)
            values = np.linalg.svd(flat, compute_uv=False)
            spectra.append(values if of_singular_values else values**2)
        target, found = softmax(spectra[0] / 4), softmax(spectra[1])
        total += (target * np.log(target / found)).sum()
    return total


BY_NUMPY = {"total_variation": variation, "image_l2": l2, "densification": density}
TWINS = {
    "total_variation": [lambda x: variation(x, second_diagonal=False)],
    "image_l2": [lambda x: l2(x, of_batch=True)],
    "densification": [
        lambda x: density(x, classes_mixed=True),
        lambda x: density(x, of_singular_values=True),
    ],
}


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_every_term_has_its_weight_in_config_and_engine(name):
    """The weight of a term is a field of its name."""
    assert {f.name for f in dataclasses.fields(Recover)} >= {name}, "config/sections.py: Recover"
    assert getattr(Recipe, name, None) == 0.0, "synthesis/recipe.py: Recipe, by default 0.0"
    assert name in BY_NUMPY and name in TWINS, "a formula and its twins in BY_NUMPY and TWINS"


@pytest.mark.parametrize("name", sorted(PRIORS))
def test_value_and_gradient(name):
    with jax.enable_x64(True):
        value, gradient = value_and_gradient(PRIORS[name])(IMAGES)
        assert value.dtype == jnp.float64
        gradient = np.asarray(gradient)
    reference = BY_NUMPY[name]
    np.testing.assert_allclose(value, reference(IMAGES), rtol=1e-12)
    for twin in TWINS[name]:
        assert abs(twin(IMAGES) / float(value) - 1) > 1e-3

    fixed = {"anchor": IMAGES} if name == "densification" else {}
    for _ in range(3):
        way = RANDOM.normal(size=IMAGES.shape)

        def slope(anchor=fixed, way=way, reference=reference):
            ahead, behind = (reference(IMAGES + s * way, **anchor) for s in (1e-6, -1e-6))
            return (ahead - behind) / 2e-6

        np.testing.assert_allclose((gradient * way).sum(), slope(), rtol=1e-6)
        if fixed:  # twin: a target that moves with the images
            assert abs(slope({}) / (gradient * way).sum() - 1) > 1e-2


def test_equal_images_have_a_finite_gradient():
    """Eigenvalues that coincide, as those of a class that starts from one image."""
    equal = np.tile(IMAGES[:1], (2 * PER_CLASS, 1, 1, 1)).astype(np.float32)
    for name, prior in PRIORS.items():
        both = value_and_gradient(prior)
        for images in (equal, np.zeros_like(equal)):
            assert np.isfinite(both(images)[1]).all(), name


def test_flatness_against_numpy():
    logits, average = RANDOM.normal(size=(2, 4, 5)) * 3

    def by_numpy(z, a=average, per_image=False):
        p, q = (np.apply_along_axis(softmax, 1, x / 4) for x in (a, z))
        divergence = p * np.log(p / q)
        return divergence.sum(1).mean() if per_image else divergence.mean()

    with jax.enable_x64(True):
        value, (gradient, by_average) = jax.jit(
            jax.value_and_grad(flatness, argnums=(0, 1)), compiler_options=FAST
        )(logits, average)
        gradient = np.asarray(gradient)
    np.testing.assert_allclose(value, by_numpy(logits), rtol=1e-12)
    np.testing.assert_array_equal(by_average, 0)
    way = RANDOM.normal(size=logits.shape)
    slope = (by_numpy(logits + 1e-6 * way) - by_numpy(logits - 1e-6 * way)) / 2e-6
    np.testing.assert_allclose((gradient * way).sum(), slope, rtol=1e-6)
    assert abs(by_numpy(logits, per_image=True) / float(value) - 1) > 1
    assert abs(by_numpy(average, logits) / float(value) - 1) > 1e-3  # the other way round
