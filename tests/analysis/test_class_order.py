"""Class order and normalisation, by logits and labels: found where wrong, and only there."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_jax.analysis import class_order
from prism_jax.data.datasets import DATASETS


def readings(classes, per_class, accuracy, order, *, head=None, seed=0):
    """Logits of a network that is right with a probability, its classes in an order."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes, dtype=np.int32), per_class)
    logits = random.normal(size=(len(labels), head or classes)).astype(np.float32)
    right = random.random(len(labels)) < accuracy
    logits[np.flatnonzero(right), np.asarray(order)[labels[right]]] += 20
    return logits, labels


def test_ranks_count_what_stands_before():
    logits = np.array([[0, 3, 3, 1], [5, 4, 3, 2], [0, np.nan, 1, 2]], np.float32)
    order = np.arange(4)
    assert class_order.ranks(logits, np.array([2, 3, 3]), order).tolist() == [1, 3, 4]
    assert class_order.ranks(logits, np.array([1, 0, 0]), order).tolist() == [0, 0, 4]
    assert class_order.ranks(logits[:2], np.array([0, 1]), np.array([3, 0])).tolist() == [0, 0]


def test_the_assignment_is_the_best_of_all_orders():
    greedy_is_worse = 0
    for seed in range(20):
        counts = np.random.default_rng(seed).integers(0, 9, (5, 5))
        stated = np.arange(5)
        best = max(counts[stated, list(p)].sum() for p in itertools.permutations(range(5)))
        order = class_order.assign(counts, stated)
        assert sorted(order) == list(range(5)) and counts[stated, order].sum() == best
        left, total = counts.astype(float), 0
        for _ in range(5):  # the twin: the largest count first
            at = np.unravel_index(left.argmax(), left.shape)
            total += counts[at]
            left[at[0], :] = left[:, at[1]] = -1
        greedy_is_worse += total < best
    assert greedy_is_worse


def test_an_output_that_is_never_the_largest_is_found_too():
    """By counts alone, any output that is left over would do, and was given."""
    logits, labels = readings(4, 30, 1.0, [5, 2, 7, 3], head=9)
    third = labels == 2
    logits[third, 7] = 15  # of this class it is the second, behind that of another class
    logits[third, 5] = 20
    logits[np.flatnonzero(third)[0], 8] = 25  # and once behind one of no class
    found = class_order.find_order(logits, labels, None, 4)
    assert found.order_K.tolist() == [5, 2, 7, 3]
    by_counts = class_order.assign(class_order.confusion(logits, labels, 4), None)
    assert by_counts.tolist() == [5, 2, 8, 3]  # the twin


def test_a_tie_keeps_the_stated_order():
    stated = np.array([2, 0, 3, 1])
    assert (class_order.assign(np.ones((4, 4), np.int64), stated) == stated).all()


TEXT_12 = [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]  # places of 0..11 in 0, 1, 10, 11, 2, ...
NETTE = DATASETS["imagenette"].class_names


@pytest.mark.parametrize(
    ("order", "names", "official", "words"),
    [
        (TEXT_12, None, None, "trained on folders sorted as text"),
        (np.argsort(TEXT_12), None, None, "your labels number folders sorted as text"),
        ([*range(1, 10), 0], None, None, "background class"),
        ([9, *range(9)], None, None, "your labels count from one"),
        (np.argsort(np.argsort(np.char.lower(NETTE))), None, NETTE, "sorted by class name"),
        (
            np.argsort(np.char.lower(NETTE)),
            sorted(n.replace(" ", "_").lower() for n in NETTE),
            NETTE,
            "the network has the official order",
        ),
        (
            [0, 4, 1, 2, 3],
            ["c1", "c10", "c2", "c3", "c4"],
            None,
            "in numeric order",
        ),
    ],
)
def test_the_usual_mistakes_are_named(order, names, official, words):
    classes = len(order)
    logits, labels = readings(classes, 30, 0.8, order)
    found = class_order.find_order(
        logits, labels, np.arange(classes), classes, class_names=names, official_names=official
    )
    assert found.why is not None and words in found.why
    assert (found.order_K == order).all()
    assert found.top1 > 0.75 and found.stated_top1 < 0.3


@pytest.mark.parametrize("classes", [3, 10, 100])
def test_any_other_order_is_found_on_images_it_was_not_estimated_from(classes):
    order = np.random.default_rng(5).permutation(classes)
    logits, labels = readings(classes, 30, 0.85, order)
    found = class_order.find_order(logits, labels, np.arange(classes), classes)
    assert found.why is None or classes == 3  # three classes have six orders, most of them usual
    assert (found.order_K == order).all()
    assert found.top1 == pytest.approx(0.86, abs=0.06)


def test_two_exchanged_classes_of_many_are_found():
    order = np.arange(50)
    order[[7, 31]] = 31, 7
    logits, labels = readings(50, 30, 0.7, order)
    found = class_order.find_order(logits, labels, np.arange(50), 50)
    assert (found.order_K == order).all() and found.why is None


@pytest.mark.parametrize(("classes", "per_class"), [(2, 50), (10, 36), (10, 500), (100, 10)])
@pytest.mark.parametrize("accuracy", [0.0, 0.4, 0.95])
def test_the_right_order_is_left_alone(classes, per_class, accuracy):
    logits, labels = readings(classes, per_class, accuracy, np.arange(classes))
    assert class_order.find_order(logits, labels, np.arange(classes), classes) is None


def test_one_image_per_class_estimates_nothing_but_shows_a_shift():
    logits, labels = readings(200, 1, 0.8, np.random.default_rng(1).permutation(200))
    assert class_order.find_order(logits, labels, np.arange(200), 200) is None
    logits, labels = readings(200, 1, 0.8, np.arange(1, 201) % 200)
    found = class_order.find_order(logits, labels, np.arange(200), 200)
    assert "background" in found.why


def test_judged_by_the_images_it_was_estimated_from_chance_would_look_permuted():
    """The broken twin of the halves: why the best of K! orders must not judge itself."""
    logits, labels = readings(100, 4, 0.0, np.arange(100))
    stated = class_order.ranks(logits, labels, np.arange(100)) == 0
    best = class_order.assign(class_order.confusion(logits, labels, 100), np.arange(100))
    itself = class_order.ranks(logits, labels, best) == 0
    assert class_order.looks_trained(itself, 100) and class_order.far_above(itself, stated, 100)
    assert class_order.find_order(logits, labels, np.arange(100), 100) is None


def test_far_above_is_certain_and_large():
    def right(count, total=1000):
        return np.arange(total) < count

    assert class_order.far_above(right(900), right(100), 10)
    assert not class_order.far_above(right(300), right(100), 10)  # certain, but not large
    assert not class_order.far_above(right(10, 10), right(0, 10), 10)  # large, but ten images


def test_the_best_of_the_far_better_normalisations_is_found():
    straight, turned = np.arange(10), np.roll(np.arange(10), 3)
    logits, labels = readings(10, 40, 0.3, straight)
    right = class_order.ranks(logits, labels, straight) == 0
    tried = {
        "worse": readings(10, 40, 0.1, straight, seed=1)[0],
        "better": readings(10, 40, 0.7, straight, seed=2)[0],
        "best": readings(10, 40, 0.9, straight, seed=3)[0],
        "second": readings(10, 40, 0.8, straight, seed=4)[0],
    }
    found = class_order.find_normalisation(tried.items(), labels, right, straight)
    assert found.name == "best" and found.finding is None
    assert found.top1 > 0.85 and found.stated_top1 == right.mean() < 0.5
    # A little better is not far better, though it is the best.
    little = {"little": readings(10, 40, 0.4, straight, seed=5)[0]}
    assert class_order.find_normalisation(little.items(), labels, right, straight) is None
    # Both mistakes at once.
    both = {"both": readings(10, 40, 0.9, turned, seed=6)[0]}
    found = class_order.find_normalisation(both.items(), labels, right, straight)
    assert found.name == "both" and (found.finding.order_K == turned).all() and found.top1 > 0.85
