from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.core import pixels
from prism_jax.types import Normalisation

GREY = Normalisation(mean=(0.3,), std=(0.17,))
CIFAR = Normalisation(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def every_level(channels: int) -> np.ndarray:
    return np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), channels, axis=-1)


def test_the_imagenet_constants():
    assert pixels.IMAGENET.mean == (0.485, 0.456, 0.406)
    assert pixels.IMAGENET.std == (0.229, 0.224, 0.225)


def test_normalise_by_hand():
    images = pixels.normalise(np.full((1, 1, 1, 3), 255, np.uint8), pixels.IMAGENET)
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images[0, 0, 0], [2.2489083, 2.4285714, 2.64], rtol=1e-6)
    images = pixels.normalise(np.zeros((1, 1, 1, 3), np.uint8), pixels.IMAGENET)
    np.testing.assert_allclose(images[0, 0, 0], [-2.117904, -2.0357143, -1.8044444], rtol=1e-6)


@pytest.mark.parametrize("normalisation", [pixels.IMAGENET, CIFAR, GREY])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_uint8_to_float_and_back_is_exact(normalisation, wrap):
    images = every_level(len(normalisation.mean))
    back = wrap(lambda x: pixels.to_uint8(pixels.normalise(x, normalisation), normalisation))(
        images
    )
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, images)


def test_truncating_is_not_exact():
    images = every_level(3)
    floats = pixels.normalise(images, pixels.IMAGENET)
    truncated = np.asarray(pixels.to_uint8(floats, pixels.IMAGENET, rounding="truncate"))
    assert 0 < (truncated != images).mean() < 0.5
    assert (images.astype(int) - truncated).max() == 1


def test_roundings_of_values_between_levels():
    between = (np.float32([10.4, 10.6, -3.0, 300.0]) / 255).reshape(1, 1, 4, 1)
    identity = Normalisation(mean=(0.0,), std=(1.0,))
    nearest = pixels.to_uint8(jnp.asarray(between), identity)
    truncated = pixels.to_uint8(jnp.asarray(between), identity, rounding="truncate")
    np.testing.assert_array_equal(nearest.ravel(), [10, 11, 0, 255])
    np.testing.assert_array_equal(truncated.ravel(), [10, 10, 0, 255])
    with pytest.raises(ValueError, match="nearest, truncate"):
        pixels.to_uint8(jnp.asarray(between), identity, rounding="up")


def test_denormalise_is_the_inverse_inside_and_clips_outside():
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(1, 2, 2, 3)
    mean, std = np.float32(CIFAR.mean), np.float32(CIFAR.std)
    np.testing.assert_allclose(
        pixels.denormalise(jnp.asarray((values - mean) / std), CIFAR), values, atol=1e-6
    )
    far = jnp.asarray([[[[-9.0, 0.0, 9.0]]]], jnp.float32)
    np.testing.assert_allclose(pixels.denormalise(far, CIFAR)[0, 0, 0], [0, CIFAR.mean[1], 1])


def test_clip_keeps_what_is_a_pixel_and_stops_what_is_not():
    low_C, high_C = pixels.valid_range(pixels.IMAGENET)
    mean, std = np.array(pixels.IMAGENET.mean), np.array(pixels.IMAGENET.std)
    np.testing.assert_allclose(low_C, -mean / std, rtol=1e-6)
    np.testing.assert_allclose(high_C, (1 - mean) / std, rtol=1e-6)
    images = jnp.stack([low_C - 1, low_C, high_C, high_C + 1]).reshape(1, 2, 2, 3)
    clipped = pixels.clip(images, pixels.IMAGENET).reshape(4, 3)
    np.testing.assert_array_equal(clipped, jnp.stack([low_C, low_C, high_C, high_C]))
    # The limits are black and white, per channel.
    np.testing.assert_array_equal(
        pixels.to_uint8(clipped.reshape(1, 2, 2, 3), pixels.IMAGENET).reshape(4, 3)[:, 0],
        [0, 0, 255, 255],
    )
    # Twin: one pair of limits for all channels lets channel 0 leave its range.
    assert (np.clip(images, low_C.min(), high_C.max()).reshape(4, 3) != clipped).any()


def test_renormalise_moves_between_spaces():
    images = every_level(3)
    moved = pixels.renormalise(pixels.normalise(images, CIFAR), CIFAR, pixels.IMAGENET)
    np.testing.assert_allclose(moved, pixels.normalise(images, pixels.IMAGENET), atol=2e-6)
    turned = pixels.renormalise(pixels.normalise(images, CIFAR), pixels.IMAGENET, CIFAR)
    assert np.abs(turned - pixels.normalise(images, pixels.IMAGENET)).max() > 0.1


def test_renormalise_to_the_same_space_is_the_same_array():
    images = jnp.ones((1, 2, 2, 3), jnp.float32)
    assert pixels.renormalise(images, CIFAR, None) is images
    assert pixels.renormalise(images, CIFAR, Normalisation(CIFAR.mean, CIFAR.std)) is images


def test_the_gradient_passes_through_renormalise():
    images = jnp.ones((1, 1, 1, 3), jnp.float32)
    gradient = jax.grad(lambda x: pixels.renormalise(x, CIFAR, pixels.IMAGENET).sum())(images)
    expected = np.array(CIFAR.std) / np.array(pixels.IMAGENET.std)
    np.testing.assert_allclose(gradient[0, 0, 0], expected, rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        images = jnp.ones((1, 1, 1, 3), jnp.float64)
        assert pixels.clip(images, CIFAR).dtype == jnp.float64
        assert pixels.renormalise(images, CIFAR, pixels.IMAGENET).dtype == jnp.float64
        assert pixels.normalise(every_level(3), CIFAR).dtype == jnp.float32
