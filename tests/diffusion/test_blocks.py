"""What no directory of a tiny network shows: long sequences, narrow numbers, wild variances."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST
from models.parity import generator

from prism_jax.diffusion import blocks, huggingface
from prism_jax.diffusion.autoencoder import AutoencoderKL
from prism_jax.diffusion.clip import ImageEncoder
from prism_jax.diffusion.unet import UNet2DCondition
from prism_jax.errors import UserError
from prism_jax.models import layers


def drawn(name, *shape):
    return jnp.asarray(generator(name).standard_normal(shape), jnp.float32)


def by_hand(query, key, value):
    """Softmax attention of (N, D) arrays, in float64."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    scores = np.exp(query @ key.T / np.sqrt(query.shape[1]))
    return scores / scores.sum(1, keepdims=True) @ value


def test_attention_in_parts(monkeypatch):
    """Whole, a part of the queries at a time, one image after another: the same, and its slope."""
    query, key, value = (drawn(name, 2, 12, 3, 4) for name in ("query", "key", "value"))
    expected = np.stack(
        [[by_hand(query[b, :, h], key[b, :, h], value[b, :, h]) for h in range(3)] for b in (0, 1)]
    ).swapaxes(1, 2)

    def attended():
        found = blocks.attend(query, key, value)
        slopes = jax.grad(lambda *given: jnp.sum(blocks.attend(*given) ** 2), (0, 1, 2))
        return found, slopes(query, key, value)

    whole, slopes = attended()
    np.testing.assert_allclose(whole, expected, atol=1e-6)
    for limit, most in (("SCORES", 100), ("QUERIES", 4)):  # then both
        monkeypatch.setattr(blocks, limit, most)
        parts, of_parts = attended()
        np.testing.assert_allclose(parts, expected, atol=1e-6)
        for left, right in zip(of_parts, slopes, strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)
    # The twins: parts, and images, that came in another order.
    assert not np.allclose(jnp.roll(parts, 4, 1), expected, atol=1e-2)
    assert not np.allclose(parts[::-1], expected, atol=1e-2)


def test_scores_are_float32_in_bfloat16():
    """Two keys whose scores are 300 and 300.5: bfloat16 has only 300 and 302 there."""
    query = jnp.full((1, 1, 1, 1), 1.0, jnp.bfloat16)
    key = jnp.array([1.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    query, key = jnp.tile(query, (1, 1, 1, 2)) * 1.0, jnp.tile(key, (1, 1, 1, 2))
    query = query.at[..., 0].set(424.0).at[..., 1].set(0.5)
    key = key.at[0, 1, 0, 1].set(2.0)
    value = jnp.array([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
    value = jnp.tile(value, (1, 1, 1, 2))
    expected = by_hand(query[0, :, 0], key[0, :, 0], value[0, :, 0])[0, 0]
    assert 0.58 < expected < 0.6
    np.testing.assert_allclose(blocks.attend(query, key, value)[0, 0, 0, 0], expected, rtol=0.01)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)  # the twin: they are bfloat16
    assert jnp.diff(jax.nn.softmax(scores / jnp.sqrt(2).astype(scores.dtype))).item() == 0


def test_a_group_norm_by_hand():
    x_BHWC = drawn("x", 2, 3, 4, 6)
    norm = blocks.GroupNorm(2, 1e-5)
    params = {"scale": drawn("scale", 6), "bias": drawn("bias", 6)}
    found = norm.apply({"params": params}, x_BHWC)
    for image in range(2):
        for channels in (slice(0, 3), slice(3, 6)):
            group = np.asarray(x_BHWC[image, :, :, channels], np.float64)
            normal = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
            expected = normal * params["scale"][channels] + params["bias"][channels]
            np.testing.assert_allclose(found[image, :, :, channels], expected, atol=1e-5)


def test_a_convolution_of_a_doubled_map_is_that_of_the_map_four_times_as_large():
    x_BHWC = drawn("x", 2, 3, 4, 5)
    params = {"kernel": drawn("kernel", 3, 3, 5, 6), "bias": drawn("bias", 6)}
    found = blocks.Doubled(6, jnp.float32).apply({"params": params}, x_BHWC)
    large_BHWC = np.repeat(np.repeat(x_BHWC, 2, 1), 2, 2)
    plain = layers.Conv(6, 3, padding=1)
    expected = plain.apply({"params": params}, large_BHWC)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    tiled = plain.apply({"params": params}, np.tile(x_BHWC, (1, 2, 2, 1)))
    assert np.abs(found - tiled).max() > 0.1


VAE = AutoencoderKL(widths=(8, 8), blocks=1, groups=2)


def test_the_deviation_is_clipped_where_its_logarithm_is_wild():
    shapes = huggingface.shapes("vae", VAE)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    encode = jax.jit(VAE.encode, compiler_options=FAST)
    for log_variance, expected in ((-100.0, np.exp(-15)), (2.0, np.e), (100.0, np.exp(10))):
        bias = jnp.array([1.0] * 4 + [log_variance] * 4)
        params["quant_conv"]["bias"] = bias
        mean, deviation = encode(params, jnp.zeros((1, 4, 4, 3)))
        np.testing.assert_allclose(mean, np.full((1, 2, 2, 4), VAE.scale), rtol=1e-6)
        np.testing.assert_allclose(deviation, expected * VAE.scale, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_precisions(dtype, tolerance):
    """What is computed in float32, and in bfloat16, against float64; results are float32."""
    module = UNet2DCondition(
        widths=(8,), attends=(True,), heads=(2,), transformers=(1,), blocks=1, context=6, groups=4,
        dtype=dtype,
    )  # fmt: skip
    quickly = functools.partial(jax.jit, compiler_options=FAST)
    leaves, structure = jax.tree.flatten(huggingface.shapes("unet", module))
    params = jax.tree.unflatten(
        structure,
        [
            drawn(str(i), *leaf.shape) * (1.2 / np.sqrt(np.prod(leaf.shape[:-1], initial=1)))
            for i, leaf in enumerate(leaves)
        ],
    )
    arguments = drawn("noisy", 2, 4, 4, 4), jnp.array([3.0, 7.0]), drawn("context", 2, 5, 6)
    found = quickly(module.predict)(params, *arguments)
    assert found.dtype == jnp.float32
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, *arguments))
        expected = np.asarray(quickly(module.clone(dtype=jnp.float64).predict)(*wide))
    assert expected.dtype == jnp.float64
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < tolerance
    assert error > tolerance / 1e4  # it was not float64 twice


def test_sizes_that_cannot_be_halved_are_refused():
    images = jax.ShapeDtypeStruct((1, 4, 5, 3), jnp.float32)
    key = jax.random.key(0)
    with pytest.raises(UserError, match="4 x 5 px do not shrink 2 times"):
        jax.eval_shape(VAE.init, key, images)
    arguments = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 8, 12, 4), (1,), (1, 1, 768))
    )
    with pytest.raises(UserError, match="8 x 12 cannot be halved 3 times"):
        jax.eval_shape(UNet2DCondition().init, key, *arguments)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(UserError, match="224 x 224 px and 3 channels.*resize"):
        jax.eval_shape(ImageEncoder().init, key, images)
