"""What relabel and validate show: the parts that are not views or mixes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
from helpers.compiling import FAST

from prism_jax import rng
from prism_jax.core.augment import Augment, augment, sample_order, shuffle
from prism_jax.types import Normalisation

PIXELS = Normalisation((0.0,), (1.0,))


@functools.partial(jax.jit, static_argnums=2, compiler_options=FAST)
def augmented(seed, images, how):
    return augment(rng.root(seed), images, how, PIXELS)


def test_bands_by_hand():
    image = np.arange(36).reshape(1, 6, 6, 1)
    order = np.array([[[2, 0, 1], [1, 0, 2]]], np.int32)
    rows = [4, 5, 0, 1, 2, 3]
    columns = [2, 3, 0, 1, 4, 5]
    expected = image[0, rows][:, columns]
    np.testing.assert_array_equal(shuffle(image, order)[0], expected)
    assert not np.array_equal(image[0, columns][:, rows], expected)  # twin: the other way round


def test_every_order_is_equally_likely_and_images_differ():
    order = np.asarray(jax.jit(lambda: sample_order(rng.root(0), 4000, 3))())
    assert order.shape == (4000, 2, 3) and (np.sort(order, -1) == np.arange(3)).all()
    for axis in (0, 1):
        _, counts = np.unique(order[:, axis], axis=0, return_counts=True)
        np.testing.assert_allclose(counts / 4000, 1 / 6, atol=0.03)
    assert (order[:, 0] == order[:, 1]).all(-1).mean() < 0.3


def shown(**how):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    fields = {"crop_min": 1.0, "flip": False, **how}
    return images, np.asarray(augmented(np.uint32(3), images, Augment(**fields))[0])


def test_a_shuffled_image_has_the_same_quarters_in_other_places():
    images, plain = shown()
    np.testing.assert_allclose(plain * 255, images, atol=1e-3)
    _, turned = shown(patch_shuffle=2)

    def quarters(image):
        return {image[r : r + 4, c : c + 4].tobytes() for r in (0, 4) for c in (0, 4)}

    moved = [not np.array_equal(a, b) for a, b in zip(plain, turned, strict=True)]
    assert all(quarters(a) == quarters(b) for a, b in zip(plain, turned, strict=True))
    assert 0.5 < np.mean(moved) < 0.95  # three quarters


def test_a_padded_crop_shifts_every_image_by_itself_and_draws_nothing_else():
    images, moved = shown(crop_pad=2)
    padded = np.pad(images / 255.0, ((0, 0), (2, 2), (2, 2), (0, 0)))
    found = set()
    for i, image in enumerate(moved):
        fits = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.allclose(image, padded[i, top : top + 8, left : left + 8], atol=1e-5)
        ]
        assert len(fits) == 1
        found |= set(fits)
    assert len(found) > 12


def test_the_border_of_a_shifted_image_is_black_in_any_normalisation():
    """Padded before it is normalised; the mean colour is the twin."""
    how, colour = Augment(crop_min=1.0, flip=False, crop_pad=2), Normalisation((0.5,), (0.25,))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
    plain, normalised = (
        np.asarray(jax.jit(lambda n=n: augment(rng.root(3), images, how, n)[0])())
        for n in (PIXELS, colour)
    )
    np.testing.assert_allclose(normalised, (plain - 0.5) / 0.25, atol=1e-5)
    zeros = np.where(plain == 0, 0.0, normalised)
    assert np.abs(zeros - (plain - 0.5) / 0.25).max() > 1


def test_patches_are_exchanged_before_everything_else_and_change_no_other_draw():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), np.uint8)
    how = Augment(crop_min=0.3, flip=True, mix="cutmix", patch_shuffle=4)
    order = jax.jit(lambda: sample_order(rng.stream(rng.root(1), "shuffle"), 6, 4))()
    before = np.asarray(shuffle(images, order))
    after = augmented(np.uint32(1), before, dataclasses.replace(how, patch_shuffle=1))
    found = augmented(np.uint32(1), images, how)
    jax.tree.map(np.testing.assert_array_equal, found, after)
