from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.core.ensemble import ENSEMBLES

# Two teachers, two images, two classes. Frobenius norms: 5 and 10.
LOGITS_TBK = np.array([[[3, 0], [0, 4]], [[0, 8], [6, 0]]], np.float32)


def combine(name, logits_TBK):
    return np.asarray(ENSEMBLES[name](jnp.asarray(logits_TBK, jnp.float32)))


def test_single_takes_exactly_one_teacher():
    np.testing.assert_array_equal(combine("single", LOGITS_TBK[:1]), LOGITS_TBK[0])
    with pytest.raises(ValueError, match="one teacher, not 2"):
        combine("single", LOGITS_TBK)


def test_mean_by_hand():
    np.testing.assert_array_equal(combine("mean", LOGITS_TBK), [[1.5, 4], [3, 2]])


def test_norm_mean_by_hand():
    # Both are rescaled to 7.5: the first by 1.5, the second by 0.75.
    np.testing.assert_allclose(combine("norm_mean", LOGITS_TBK), [[2.25, 3], [2.25, 3]], rtol=1e-6)


def test_norm_mean_takes_one_norm_per_teacher_not_per_image():
    norms_TB = np.linalg.norm(LOGITS_TBK, axis=2)
    twin = (LOGITS_TBK * (norms_TB.mean(0) / norms_TB)[..., None]).mean(0)
    assert np.abs(twin - combine("norm_mean", LOGITS_TBK)).max() > 0.1


def test_norm_mean_does_not_hear_how_loud_a_teacher_is():
    louder = LOGITS_TBK * np.float32([[[1]], [[100]]])
    quiet, loud = combine("norm_mean", LOGITS_TBK), combine("norm_mean", louder)
    np.testing.assert_allclose(
        loud / np.linalg.norm(loud), quiet / np.linalg.norm(quiet), rtol=1e-5
    )
    quiet, loud = combine("mean", LOGITS_TBK), combine("mean", louder)
    assert np.abs(loud / np.linalg.norm(loud) - quiet / np.linalg.norm(quiet)).max() > 0.1


def test_half_primary_by_hand():
    # Half of the first plus half of the second: (1.5, 4) and (3, 2), of norms sqrt(18.25) and
    # sqrt(13); both are rescaled to the mean of these two.
    mixed = np.array([[1.5, 4], [3, 2]])
    norms = np.sqrt([18.25, 13])
    expected = mixed / norms[:, None] * norms.mean()
    np.testing.assert_allclose(combine("half_primary", LOGITS_TBK), expected, rtol=1e-6)


def test_half_primary_against_float64_with_four_teachers():
    logits = np.random.default_rng(0).normal(size=(4, 5, 7))
    mixed = 0.5 * logits[0] + (0.5 / 3) * (logits[1] + logits[2] + logits[3])
    norms = np.sqrt((mixed**2).sum(1, keepdims=True))
    result = combine("half_primary", logits)
    np.testing.assert_allclose(result, mixed / norms * norms.mean(), rtol=2e-5)
    lengths = np.linalg.norm(result, axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)
    # Twin: the primary as one among four.
    assert np.abs(combine("mean", logits) - result).max() > 0.1


def test_half_primary_needs_others():
    with pytest.raises(ValueError, match="two teachers or more"):
        combine("half_primary", LOGITS_TBK[:1])
