"""Images kept as floats: layouts, spaces, whitening."""

from __future__ import annotations

import numpy as np
import pytest

from prism_jax.data.sets import floats
from prism_jax.data.sets.base import Stated
from prism_jax.data.sets.floats import to_pixels, zca_inverse
from prism_jax.data.sources import ArraySource, read_all
from prism_jax.errors import UserError

UNIT = Stated((0.0,) * 3, (1.0,) * 3)


def real(count=300, size=4):
    """Images whose pixels depend on one another."""
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (count, size, size, 3)).astype(float)
    smooth = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2)) / 3
    return ArraySource(smooth.astype(np.uint8), np.zeros(count, int), num_classes=1)


def test_layouts_and_types():
    pixels = np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3), np.uint8)
    for images in (pixels, pixels.transpose(0, 3, 1, 2)):
        np.testing.assert_array_equal(to_pixels("x", images, Stated(), real()), pixels)
    halves = (pixels / 255).astype(np.float64)
    np.testing.assert_array_equal(to_pixels("x", halves, UNIT, real()), pixels)
    grey = to_pixels("x", pixels[..., 0], Stated(), real())
    np.testing.assert_array_equal(grey, pixels[..., :1])
    with pytest.raises(UserError, match="which axis has the 1 or 3 channels is not clear"):
        to_pixels("x", np.zeros((5, 3, 3, 3), np.uint8), Stated(), real())
    with pytest.raises(UserError, match="of type int64; they must be uint8 or floats"):
        to_pixels("x", pixels.astype(int), Stated(), real())
    with pytest.raises(UserError, match="not finite"):
        to_pixels("x", np.full((1, 3, 4, 4), np.nan), UNIT, real())


def whiten(pixels_NHWC, among_NHWC):
    """kornia's ZCAWhitening(eps=0.1), by its definition and with an SVD."""
    rows, among = (
        x.transpose(0, 3, 1, 2).reshape(len(x), -1) / 255.0 for x in (pixels_NHWC, among_NHWC)
    )
    mean = among.mean(0)
    u, s, _ = np.linalg.svd(np.cov(among.T))
    matrix = u @ np.diag(1 / np.sqrt(s + 0.1)) @ u.T
    height, width, channels = pixels_NHWC.shape[1:]
    return ((rows - mean) @ matrix).reshape(-1, channels, height, width).astype(np.float32)


def test_real_images_are_read_once_for_a_whitening(monkeypatch):
    source, read = real(count=50), []
    monkeypatch.setattr(floats, "read_all", lambda s: read.append(s) or read_all(s))
    for _ in range(3):
        to_pixels("x", np.zeros((2, 4, 4, 3), np.float32), Stated(whitening="zca"), source)
    assert len(read) == 1
    with pytest.raises(UserError, match=r"real images of the shape .* they have \(4, 4, 3\)"):
        to_pixels("x", np.zeros((2, 5, 5, 3), np.float32), Stated(whitening="zca"), source)


def test_a_whitening_is_undone():
    source = real()
    among = np.stack([source.image(i) for i in range(len(source))])
    whitened = whiten(among[:10], among)
    found = to_pixels("x", whitened, Stated(whitening="zca"), source)
    np.testing.assert_array_equal(found, among[:10])
    other = to_pixels("x", whitened, Stated(whitening="zca"), real(count=40))
    assert (other != among[:10]).mean() > 0.5  # the twin: the whitening of other images


def test_the_whitening_of_uncorrelated_rows_by_hand():
    """Two numbers, variances 2 and 8 (unbiased), no covariance: the deviations, with epsilon."""
    rows = np.array([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0], [0, 0]]) * np.sqrt(2)
    mean, inverse = zca_inverse(rows)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    np.testing.assert_allclose(inverse, np.diag(np.sqrt([2.1, 8.1])), atol=1e-12)


def test_a_whitening_that_cannot_be_undone():
    with pytest.raises(UserError, match=r"they have \(4, 4, 3\): set dataset.image_size"):
        to_pixels("x", np.zeros((1, 3, 8, 8), np.float32), Stated(whitening="zca"), real())
    with pytest.raises(UserError, match="of up to 4096 numbers; those of x have 12288"):
        to_pixels("x", np.zeros((1, 3, 64, 64), np.float32), Stated(whitening="zca"), real())
