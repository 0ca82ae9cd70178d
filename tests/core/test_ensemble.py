from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.core.ensemble import ENSEMBLES, votes

# Two teachers, two images, two classes. Frobenius norms: 5 and 10.
LOGITS_TBK = np.array([[[3, 0], [0, 4]], [[0, 8], [6, 0]]], np.float32)


def combine(name, logits_TBK, votes_T=None):
    return np.asarray(ENSEMBLES[name](jnp.asarray(logits_TBK, jnp.float32), votes_T))


PRIORS = (56.4, 42.3, 52.5, 44.2)


def softmax(scores):
    powers = np.exp(np.asarray(scores, np.float64))
    return powers / powers.sum()


def rescaled(z, axes):
    """Every teacher's logits with the mean of the teachers' norms over some axes."""
    norms = np.sqrt((z**2).sum(axes, keepdims=True))
    return (z / norms * norms.mean(0)).mean(0)


def one_norm(z_BK):
    norms = np.sqrt((z_BK**2).sum(1, keepdims=True))
    return z_BK / norms * norms.mean()


# In float64, and how it could be wrong.
TWINS = {
    "single": (lambda z: z[0], lambda z: z[0] / np.linalg.norm(z[0])),
    "mean": (lambda z: z.mean(0), lambda z: z.sum(0)),
    "norm_mean": (lambda z: rescaled(z, (1, 2)), lambda z: rescaled(z, 2)),
    "half_primary": (
        lambda z: one_norm(0.5 * z[0] + 0.5 / 3 * (z[1] + z[2] + z[3])),
        lambda z: 0.5 * one_norm(z[0]) + 0.5 * one_norm(z[1:].mean(0)),
    ),
    "committee": (
        lambda z: np.tensordot(softmax(np.array(PRIORS) / 10), z, 1),
        lambda z: np.tensordot(softmax(np.array(PRIORS) / 5), z, 1),
    ),
}


@pytest.mark.parametrize("name", ENSEMBLES)
def test_against_float64_and_a_broken_twin(name):
    scale = np.array([1, 3, 0.5, 2])[:, None, None]
    logits = np.random.default_rng(0).normal(size=(4, 5, 7)) * scale
    if name == "single":
        logits = logits[:1]
    found = combine(name, logits, votes(PRIORS, 10.0))
    right, broken = (twin(logits) for twin in TWINS[name])
    np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6)
    assert np.abs(found - broken).max() > 0.05


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


def test_half_primary_gives_all_images_one_norm():
    lengths = np.linalg.norm(
        combine("half_primary", np.random.default_rng(0).normal(size=(4, 5, 7))), axis=1
    )
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)


def test_half_primary_needs_others():
    with pytest.raises(ValueError, match="two teachers or more"):
        combine("half_primary", LOGITS_TBK[:1])


def test_the_votes_of_a_committee():
    """CV-DD's labels for ImageNet-1K, to the three digits that its section states."""
    found = votes((56.4, 42.3, 52.5, 44.2, 40.6), 10.0)
    np.testing.assert_allclose(found, [0.413, 0.101, 0.279, 0.122, 0.085], atol=6e-4)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(votes((900.0, 0.0), 1.0), [1, 0])  # nothing overflows


def test_a_committee_takes_one_vote_per_teacher():
    for wrong in (None, votes((1.0, 2.0, 3.0), 10.0)):
        with pytest.raises(ValueError, match="one vote per teacher"):
            combine("committee", LOGITS_TBK, wrong)
