"""DWA's step uphill against NumPy, the gradient of a softmax written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from prism_jax.core import losses
from prism_jax.core.perturbation import ascend

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(3, 2, 2, 2))
LABELS = np.array([3, 0, 1])
PARAMS = {"kernel": RANDOM.normal(size=(8, 4)), "bias": RANDOM.normal(size=4)}
RHO, STEPS = 0.7, 4


def loss(params, images_BHWC):
    logits_BK = images_BHWC.reshape(len(LABELS), -1) @ params["kernel"] + params["bias"]
    return losses.cross_entropy(logits_BK, LABELS)


def numpy_steps(*, sign=1.0, per_tensor=False, length=RHO / STEPS):
    """The weights after all steps, and the sum of the images' gradients on the way."""
    params, probes = dict(PARAMS), np.zeros_like(IMAGES)
    flat = IMAGES.reshape(len(LABELS), -1)
    for _ in range(STEPS):
        logits = flat @ params["kernel"] + params["bias"]
        error = np.exp(logits - logits.max(1, keepdims=True))
        error /= error.sum(1, keepdims=True)
        error[np.arange(len(LABELS)), LABELS] -= 1
        error /= len(LABELS)
        gradient = {"kernel": flat.T @ error, "bias": error.sum(0)}
        probes += (error @ params["kernel"].T).reshape(IMAGES.shape)
        norms = {name: np.sqrt((g**2).sum()) for name, g in gradient.items()}
        whole = np.sqrt(sum(n**2 for n in norms.values()))
        for name, g in gradient.items():
            norm = norms[name] if per_tensor else whole
            params[name] = params[name] + sign * length * g / (norm + 1e-12)
    return params, probes


def package_steps():
    with jax.enable_x64(True):
        params, images = jax.tree.map(jnp.asarray, (PARAMS, IMAGES))
        probes = jnp.zeros_like(images)
        for _ in range(STEPS):
            params, by_images = ascend(loss, params, images, length=RHO / STEPS)
            probes += by_images
        return jax.device_get((params, probes))


def largest_difference(a, b):
    return max(np.abs(a[name] - b[name]).max() for name in PARAMS)


def test_steps_against_numpy_and_twins():
    params, probes = package_steps()
    expected, expected_probes = numpy_steps()
    assert largest_difference(params, expected) < 1e-12
    np.testing.assert_allclose(probes, expected_probes, rtol=1e-10)
    for twin in ({"sign": -1.0}, {"per_tensor": True}, {"length": RHO}):
        assert largest_difference(params, numpy_steps(**twin)[0]) > 1e-2


def test_every_step_is_uphill_and_of_one_length():
    params, _ = package_steps()
    assert loss(params, IMAGES) > loss(PARAMS, IMAGES)
    with jax.enable_x64(True):
        once, _ = ascend(loss, jax.tree.map(jnp.asarray, PARAMS), IMAGES, length=0.3)
    moved = sum(((np.asarray(once[name]) - PARAMS[name]) ** 2).sum() for name in PARAMS)
    np.testing.assert_allclose(np.sqrt(moved), 0.3, rtol=1e-10)


def test_weights_without_a_gradient_stay_what_they_are():
    params, _ = ascend(lambda p, x: 0.0 * x.sum() + 0.0 * p["w"].sum(), {"w": jnp.ones(2)},
                       jnp.ones((1, 1, 1, 1)), length=0.5)  # fmt: skip
    np.testing.assert_array_equal(params["w"], 1.0)
