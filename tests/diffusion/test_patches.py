"""Codecs that need no training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from prism_jax.diffusion import patches, pixels
from prism_jax.errors import UserError


def images(count: int = 60, size: int = 8, channels: int = 3) -> np.ndarray:
    draw = np.random.default_rng(0)
    coarse = draw.integers(0, 256, (count, size // 4, size // 4, channels))
    fine = draw.integers(-20, 21, (count, size, size, channels))
    return np.clip(coarse.repeat(4, 1).repeat(4, 2) + fine, 0, 255).astype(np.uint8)


def test_pixels_are_standardised_and_come_back():
    seen = images()
    params, signed = patches.fit_pixels(seen), pixels.from_uint8(seen)
    codec = patches.Pixels()
    latents, deviation = codec.encode(params, signed)
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=1e-5)
    assert not deviation.any()
    np.testing.assert_allclose(codec.decode(params, latents), signed, atol=1e-6)
    low, high = patches.bounds(params)
    black_and_white = codec.decode(params, jnp.stack([low, high])[:, None, None])
    np.testing.assert_allclose(black_and_white[:, 0, 0], [[-1] * 3, [1] * 3], atol=1e-6)


def test_all_components_give_images_back_and_some_the_nearest_of_their_kind():
    seen = images()
    signed, codec = pixels.from_uint8(seen), patches.Patches(4)
    whole = patches.fit_patches(seen, 4, 48)
    latents, _ = codec.encode(whole, signed)
    assert latents.shape == (60, 2, 2, 48) and whole["kept"] == pytest.approx(1)
    np.testing.assert_allclose(codec.decode(whole, latents), signed, atol=1e-5)
    some = patches.fit_patches(seen, 4, 3)
    latents, _ = codec.encode(some, signed)
    np.testing.assert_allclose(latents.std((0, 1, 2)), 1, atol=1e-4)
    lost = ((codec.decode(some, latents) - signed) ** 2).mean()
    spread = patches.patches_of(signed, 4).reshape(-1, 48).var(0).mean()
    np.testing.assert_allclose(lost / spread, 1 - some["kept"], atol=1e-4)
    low, high = patches.bounds(some)
    assert (latents >= low - 1e-4).all() and (latents <= high + 1e-4).all()


def test_components_are_scikit_learn_s():
    from sklearn.decomposition import PCA

    seen = images()
    rows = patches.patches_of(pixels.from_uint8(seen), 4).reshape(-1, 48)
    found, expected = patches.fit_patches(seen, 4, 3), PCA(3).fit(rows)
    overlap = np.abs((found["components_PC"] * expected.components_.T).sum(0))
    np.testing.assert_allclose(overlap, 1, atol=1e-4)
    np.testing.assert_allclose(found["kept"], expected.explained_variance_ratio_.sum(), atol=1e-4)
    largest = np.abs(found["components_PC"]).argmax(0)
    assert (found["components_PC"][largest, range(3)] > 0).all()


def test_a_patch_is_a_patch_of_the_image():
    image = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    found = patches.patches_of(image, 2)
    assert found[0, 0, 1].tolist() == [2, 3, 6, 7] and found[0, 1, 0].tolist() == [8, 9, 12, 13]


def test_the_bits_do_not_depend_on_threads():
    seen, found = images(3000), []
    for threads in (1, 2, 8):
        with threadpool_limits(threads):
            found.append(patches.fit_patches(seen, 4, 8))
    for name in found[0]:
        assert len({params[name].tobytes() for params in found}) == 1


def test_both_are_pure_and_traced():
    seen = images(4)
    for codec, params in [
        (patches.Pixels(), patches.fit_pixels(seen)),
        (patches.Patches(4), patches.fit_patches(seen, 4, 8)),
    ]:
        signed = pixels.from_uint8(seen)
        latents, _ = jax.jit(codec.encode)(params, signed)
        np.testing.assert_allclose(latents, codec.encode(params, signed)[0], atol=1e-5)
        assert jax.jit(codec.decode)(params, latents).shape == seen.shape


def test_images_without_contrast_are_no_division_by_zero():
    flat = np.full((3, 4, 4, 1), 7, np.uint8)
    for codec, params in [
        (patches.Pixels(), patches.fit_pixels(flat)),
        (patches.Patches(2), patches.fit_patches(flat, 2, 2)),
    ]:
        latents, _ = codec.encode(params, pixels.from_uint8(flat))
        assert np.isfinite(latents).all()


@pytest.mark.parametrize("side, components, said", [
    (3, 2, "8 x 8 px do not divide into patches of 3"),
    (4, 49, "choose 1 to 48"),
    (4, 0, "choose 1 to 48"),
])  # fmt: skip
def test_refused(side, components, said):
    with pytest.raises(UserError, match=said):
        patches.fit_patches(images(), side, components)
