"""Which real images stand for their class: by hand, against loops, and with broken twins."""

from __future__ import annotations

import numpy as np
import pytest

from prism_jax.config import SELECTED_CONTROLS
from prism_jax.synthesis.selection import (
    GROUPED,
    SELECTIONS,
    Choice,
    Features,
    balanced,
    confident,
    difficulty_groups,
    herding,
    medoids,
    retrieve,
)
from prism_jax.synthesis.start import INITIALISERS

RANDOM = np.random.default_rng(0)


def choice(rows, count, log_probability=None, seed=0) -> Choice:
    rows = np.asarray(rows, np.float32).reshape(len(rows), -1)
    zeros = np.zeros(len(rows), np.float32)
    log_probability = zeros if log_probability is None else np.asarray(log_probability, np.float32)
    return Choice(Features(rows, log_probability, zeros), count, seed)


def test_controls_and_initialisers_have_the_same_names():
    assert SELECTED_CONTROLS == tuple(SELECTIONS), "config/sections.py: SELECTED_CONTROLS"
    assert {*SELECTIONS, *GROUPED} < set(INITIALISERS)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_selection_is_of_different_images_and_always_the_same(name):
    rows = np.float32(RANDOM.standard_normal((40, 6)))
    log_probability = RANDOM.standard_normal(40)
    for count in (1, 2, 7, 40):
        found = SELECTIONS[name](choice(rows, count, log_probability))
        assert len(set(found.tolist())) == count and found.min() >= 0 and found.max() < 40
        again = SELECTIONS[name](choice(rows, count, log_probability))
        np.testing.assert_array_equal(found, again)


# --- herding ----------------------------------------------------------------------------------


def test_herding_by_hand():
    # Mean 3.25. 2 is nearest; (2 + 1) / 2 is nearer than (2 + 0) / 2 and (2 + 10) / 2; then
    # (2 + 1 + 10) / 3 = 4.33 is nearer than (2 + 1 + 0) / 3 = 1.
    assert herding(choice([0, 1, 2, 10], 4)).tolist() == [2, 1, 3, 0]
    nearest_to_the_mean = np.argsort(np.abs(np.array([0, 1, 2, 10]) - 3.25))  # twin
    assert nearest_to_the_mean.tolist() == [2, 1, 0, 3]


def test_herding_against_loops():
    rows = np.float32(RANDOM.standard_normal((30, 5)))
    chosen: list[int] = []
    for _ in range(12):

        def error(i):
            together = rows[[*chosen, i]].astype(np.float64).mean(0)
            return np.linalg.norm(together - rows.astype(np.float64).mean(0))

        chosen.append(min((i for i in range(30) if i not in chosen), key=error))
    assert herding(choice(rows, 12)).tolist() == chosen


def test_equals_come_in_order():
    assert herding(choice(np.ones((4, 2)), 3)).tolist() == [0, 1, 2]
    assert confident(choice(np.zeros((4, 1)), 3, [-2, -1, -1, -3])).tolist() == [1, 2, 0]


# --- clusters ---------------------------------------------------------------------------------

# Blobs of 5, 3 and 2 images about 0, 100 and 200, in a mixed order; positions by blob.
ROWS = np.array([100.0, 3, 0, 201, 1, 103, 202, -1, 101, 5])
BLOBS = [(1, 2, 4, 7, 9), (0, 5, 8), (3, 6)]


def test_medoids_by_hand():
    # Means 1.6, 101.33 and 201.5: nearest are 1, 101, and of two equally near the first.
    assert medoids(choice(ROWS, 3)).tolist() == [4, 8, 3]
    nearest_to_the_mean = np.argsort(np.abs(ROWS - ROWS.mean()))[:3]  # twin: no clusters
    assert set(nearest_to_the_mean.tolist()) != {4, 8, 3}


def test_balanced_by_hand():
    # The same centres; then the farthest of its own: 5 is 3.4 from 1.6, 103 is 1.67 from 101.33.
    assert balanced(choice(ROWS, 5)).tolist() == [4, 8, 3, 9, 5]
    assert balanced(choice(ROWS, 6)).tolist() == [4, 8, 3, 9, 5, 6]
    # Two clusters, {0: 5 images} and {100, 200: 5 images} or three and two: centres, then margins.
    for count in (2, 3, 4):
        found = balanced(choice(ROWS, count)).tolist()
        assert len(set(found)) == count
    assert balanced(choice(ROWS, 1)).tolist() == [int(np.argmin(np.abs(ROWS - ROWS.mean())))]
    # Twin: margins of one cluster of all are elsewhere.
    farthest = np.argsort(-np.abs(ROWS - ROWS.mean()))[:3]
    assert not set(farthest.tolist()) <= {4, 8, 3, 9, 5, 6}


def test_a_cluster_of_one_takes_its_margin_from_what_is_left():
    rows = np.array([0.0, 0.1, 0.25, 50.0])
    found = balanced(choice(rows, 4)).tolist()
    assert found[:2] == [1, 3] and found[2] == 2 and found[3] == 0


@pytest.mark.parametrize("count", [3, 6])
def test_clusters_against_scikit_learn_alone(count):
    """The choice made once more, from the labels and centres of k-means itself."""
    from sklearn.cluster import KMeans

    rows = np.float32(
        np.concatenate([RANDOM.normal(c, 1, (12, 4)) for c in (0, 9, 18, 27, 36, 45)])
    )
    model = KMeans(count, n_init=1, random_state=3).fit(rows.astype(np.float64))
    by_size = sorted(range(count), key=lambda i: -(model.labels_ == i).sum())
    centre, margin = [], []
    for cluster in by_size:
        mine = np.flatnonzero(model.labels_ == cluster)
        far = np.linalg.norm(rows[mine] - model.cluster_centers_[cluster], axis=1)
        centre.append(int(mine[far.argmin()]))
        margin.append(int(mine[far.argmax()]))
    assert medoids(choice(rows, count, seed=3)).tolist() == centre
    assert balanced(choice(rows, 2 * count, seed=3)).tolist() == centre + margin
    assert balanced(choice(rows, 2 * count - 1, seed=3)).tolist() == centre + margin[:-1]


# --- difficulty -------------------------------------------------------------------------------


def test_groups_by_hand():
    # Ranks 0 3 1 4 2 and 1 2 0 4 3; their sums 1 5 1 8 5, of equals the first.
    difficulty = np.array([[0.1, 0.8, 0.2, 0.9, 0.5], [20.0, 30, 10, 50, 40]])
    found = difficulty_groups(difficulty, 2)
    assert [group.tolist() for group in found] == [[0, 2, 1], [4, 3]]
    assert [GROUPED["real_group_easiest"](g) for g in found] == [0, 4]
    assert [GROUPED["real_group_hardest"](g) for g in found] == [1, 3]
    # Twin: the mean of the difficulties is decided by the teacher with the larger numbers.
    by_mean = np.argsort(difficulty.mean(0))
    assert by_mean.tolist() == [2, 0, 1, 4, 3]


def test_groups_hold_every_image_once_from_easy_to_hard():
    difficulty = RANDOM.standard_normal((1, 47))
    found = difficulty_groups(difficulty, 10)
    assert sorted(np.concatenate(found).tolist()) == list(range(47))
    assert {len(group) for group in found} == {4, 5}
    assert (np.diff(difficulty[0][np.concatenate(found)]) > 0).all()
    few = difficulty_groups(difficulty[:, :3], 7)
    assert [len(group) for group in few] == [1] * 7
    assert few[0] == few[3] == few[6] and few[1] == few[4]


# --- retrieval --------------------------------------------------------------------------------


def test_retrieval_by_hand():
    pool = Features(np.array([[2.0, 0], [0, 3], [1, 1]]), np.zeros(3), np.array([5.0, 1, 3]))
    asked = np.array([[7.0, 1], [1, 9]])
    assert retrieve(asked, pool, simplicity=0.0).tolist() == [0, 1]
    assert retrieve(asked, pool, simplicity=1.0).tolist() == [1, 1]  # the simplest, for all
    # Of the first: 0.9 * 0.0202 + 0.1, 0.9 * 1.717 and 0.9 * 0.4 + 0.05.
    assert retrieve(asked, pool, simplicity=0.1).tolist() == [0, 1]
    # At 0.5: 0.0101 + 0.5, 0.8586 and 0.2 + 0.25.
    assert retrieve(asked, pool, simplicity=0.5).tolist() == [2, 1]


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7])
def test_retrieval_against_loops(weight):
    rows, asked = RANDOM.standard_normal((20, 4)), RANDOM.standard_normal((6, 4))
    rows *= np.exp(RANDOM.standard_normal((20, 1)))
    complexity = RANDOM.uniform(3, 9, 20)

    def cost(x, i, *, units=True):
        a, b = (v / np.linalg.norm(v) if units else v for v in (x, rows[i]))
        simple = (complexity[i] - complexity.min()) / (complexity.max() - complexity.min())
        return (1 - weight) * np.linalg.norm(a - b) ** 2 + weight * simple

    expected = [min(range(20), key=lambda i, x=x: cost(x, i)) for x in asked]
    found = retrieve(asked, Features(rows, np.zeros(20), complexity), simplicity=weight)
    assert found.tolist() == expected
    lengths_count = [min(range(20), key=lambda i, x=x: cost(x, i, units=False)) for x in asked]
    assert lengths_count != expected  # twin


def test_a_pool_of_equals_gives_the_first():
    pool = Features(np.ones((3, 2)), np.zeros(3), np.full(3, 2.0))
    assert retrieve(np.zeros((1, 2)), pool, simplicity=0.5).tolist() == [0]
