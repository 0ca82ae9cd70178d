"""Diversity, against numbers worked out by hand and an independent implementation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import cosine_similarity

from prism_jax.analysis import diversity


def test_cosine_of_two_small_classes_by_hand():
    embeddings_ND = np.array(
        [
            [3.0, 0.0],  # class 0: pairs at 90, 45 and 45 degrees
            [0.0, 0.5],
            [2.0, 2.0],
            [1.0, 0.0],  # class 1: one pair at 180 degrees
            [-7.0, 0.0],
            [5.0, 5.0],  # class 2: alone
        ]
    )
    labels_N = np.array([0, 0, 0, 1, 1, 2])
    by_hand = ((0 + np.sqrt(0.5) + np.sqrt(0.5)) / 3 + (-1)) / 2
    found = diversity.intra_class_cosine(embeddings_ND, labels_N)
    assert found == pytest.approx(by_hand, abs=1e-12)

    # Broken twins: pairs of an image with itself counted; all pairs of all classes pooled.
    with_itself = ((3 + 2 * 2 * np.sqrt(0.5)) / 9 + 0) / 2
    pooled = (np.sqrt(0.5) * 2 - 1) / 4
    assert found != pytest.approx(with_itself, abs=1e-3)
    assert found != pytest.approx(pooled, abs=1e-3)


def test_cosine_equals_an_independent_implementation():
    rng = np.random.default_rng(0)
    embeddings_ND = rng.standard_normal((40, 16)).astype(np.float32) + 0.5
    labels_N = rng.integers(0, 5, 40)
    means = []
    for label in range(5):
        (rows,) = np.nonzero(labels_N == label)
        similar = cosine_similarity(embeddings_ND[rows].astype(np.float64))
        pairs = itertools.combinations(range(len(rows)), 2)
        means.append(np.mean([similar[i, j] for i, j in pairs]))
    assert diversity.intra_class_cosine(embeddings_ND, labels_N) == pytest.approx(
        np.mean(means), abs=1e-12
    )


def test_without_two_images_of_a_class_there_is_no_cosine():
    assert diversity.intra_class_cosine(np.eye(3), np.arange(3)) is None


def test_an_embedding_of_length_zero_is_similar_to_nothing():
    embeddings_ND = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    found = diversity.intra_class_cosine(embeddings_ND, np.zeros(3, int))
    assert found == pytest.approx(1 / 3, abs=1e-12)


def test_distance_by_hand():
    a = np.zeros((2, 1, 2, 1), np.uint8)
    b = np.array([255, 0, 51, 0], np.uint8).reshape(a.shape)
    assert diversity.distance(a, b) == pytest.approx(np.sqrt((1 + 0.04) / 4), abs=1e-12)
    assert diversity.distance(b, a) == diversity.distance(a, b)
    wrapped = np.sqrt(np.square((a - b) / 255).mean())  # the twin: uint8 arithmetic wraps
    assert diversity.distance(a, b) != pytest.approx(wrapped, abs=1e-3)


def test_embeddings_are_read_in_batches_of_one_shape():
    shapes = []

    def read(images_BHWC):
        shapes.append(images_BHWC.shape)
        return images_BHWC.reshape(len(images_BHWC), -1) * 2.0

    images_NHWC = np.arange(7 * 4, dtype=np.float32).reshape(7, 2, 2, 1)
    found = diversity.embeddings(read, images_NHWC, batch_size=3)
    np.testing.assert_array_equal(found, images_NHWC.reshape(7, 4) * 2)
    assert found.dtype == np.float32
    assert set(shapes) == {(3, 2, 2, 1)}


def test_mean_and_variance_of_the_pairs_of_every_class_by_hand():
    # Class 0: pairs at 90, 45 and 45 degrees; class 2: one pair at 180; class 3: alone; 1: empty.
    embeddings_ND = np.array([[3.0, 0], [0, 0.5], [2.0, 2], [1.0, 0], [-7.0, 0], [5.0, 5]])
    found = diversity.class_cosines(embeddings_ND, np.array([0, 0, 0, 2, 2, 3]), 4)
    h = np.sqrt(0.5)
    assert found.mean_K == pytest.approx([2 * h / 3, np.nan, -1, np.nan], nan_ok=True)
    variance = np.var([0, h, h])
    assert found.variance_K == pytest.approx([variance, np.nan, 0, np.nan], nan_ok=True)
    with_itself = np.var([0, h, h, 0, h, h, 1, 1, 1])  # the twin
    assert found.variance_K[0] != pytest.approx(with_itself, abs=1e-3)


@pytest.mark.parametrize("images, dimensions", [(30, 5), (6, 20)])
def test_variance_equals_that_of_the_listed_pairs(images, dimensions):
    rng = np.random.default_rng(0)
    embeddings_ND = rng.standard_normal((images, dimensions)).astype(np.float32) + 0.5
    pairs = cosine_similarity(embeddings_ND)[~np.eye(images, dtype=bool)]
    found = diversity.class_cosines(embeddings_ND, np.zeros(images, int), 1)
    assert found.mean_K[0] == pytest.approx(pairs.mean(), abs=1e-6)
    assert found.variance_K[0] == pytest.approx(pairs.var(), abs=1e-6)


def test_vendi_counts_what_has_nothing_in_common():
    basis = np.eye(4)
    assert diversity.vendi(basis) == pytest.approx(4.0)
    assert diversity.vendi(np.repeat(basis[:2], 3, axis=0) * 9.0) == pytest.approx(2.0)
    assert diversity.vendi(np.ones((5, 3))) == pytest.approx(1.0)
    # Two at an angle: eigenvalues (1 + c) / 2 and (1 - c) / 2.
    c = 0.6
    found = diversity.vendi(np.array([[1.0, 0.0], [c, 0.8]]))
    assert found == pytest.approx(np.exp(-(0.8 * np.log(0.8) + 0.2 * np.log(0.2))))
    assert found != pytest.approx(1 / (0.8**2 + 0.2**2))  # the twin: another order of entropy
