"""Which class each column of soft labels is: by the hard labels, where only names are there."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from prism_jax.data.datasets import DATASETS
from prism_jax.data.exchange import ImageSet
from prism_jax.data.sets.base import Found
from prism_jax.data.sets.columns import in_our_order, least_agreement
from prism_jax.data.sources import ArraySource
from prism_jax.errors import UserError

FASHION = DATASETS["fashion_mnist"].class_names


def soft_of(labels, classes, *, agree=1.0, seed=0):
    """Logits whose largest is an image's class in a share of cases, else any."""
    random = np.random.default_rng(seed)
    seen = np.where(
        random.random(len(labels)) < agree, labels, random.integers(classes, size=len(labels))
    )
    soft = random.normal(size=(len(labels), classes)).astype(np.float32)
    soft[np.arange(len(labels)), seen] += 8
    return soft


def read(names, soft, labels, *, numbered=False, ours=None, official=None):
    """The share of images whose largest soft label is their class, and what is said.

    Args:
      names: by label, in the order in which the columns stand.
      ours: them, in the order of the data's labels.
    """
    classes = tuple(names) if numbered else tuple(sorted(names))
    at = np.array([classes.index(name) for name in names])[labels]
    ours = list(ours or classes)
    order = np.array([classes.index(name) for name in ours])
    wanted = np.array([ours.index(name) for name in names])[labels]
    found = Found("table", classes, numbered, "classes", at, None, None, None, soft_NK=soft)
    logits, note = in_our_order("SET", found, order, np.arange(len(at)), wanted, official)
    return float((logits.argmax(1) == wanted).mean()), note


@pytest.mark.parametrize(
    ("names", "known", "words"),
    [
        (FASHION, {"ours": FASHION}, "as the data orders its classes"),
        (FASHION, {"official": FASHION}, "official order"),
        ([f"class_{i}" for i in range(12)], {}, "by the numbers in their names"),
        (["zebra", "ant", "newt", "bee", "yak", "cat"], {}, "as its images name them first"),
        (sorted(FASHION), {"ours": FASHION}, None),
    ],
)
@pytest.mark.parametrize("ipc", [1, 5])
def test_columns_that_stand_in_another_order_than_the_alphabets(names, known, words, ipc):
    """They were read as sorted names, and no word was said."""
    labels = np.repeat(np.arange(len(names)), ipc)
    share, note = read(names, soft_of(labels, len(names)), labels, **known)
    assert share == 1.0
    assert note is None if words is None else words in note and "sorted as text: " in note


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize(("classes", "ipc"), [(2, 20), (10, 1), (10, 10), (100, 10)])
def test_columns_in_no_known_order_are_refused(numbered, classes, ipc):
    labels = np.repeat(np.arange(classes), ipc)
    names = [f"{'kz'[c % 2]}{chr(97 + c // 10)}{chr(97 + c % 10)}" for c in range(classes)]
    soft = np.roll(soft_of(labels, classes), 1, axis=1)
    if classes == 2 and not numbered:
        pytest.skip("two columns have two orders")
    with pytest.raises(UserError, match=r"contradict its labels.* \(chance is about .*Number the"):
        read(names, soft, labels, numbered=numbered)


def test_each_order_is_tried_once():
    labels = np.arange(4)
    soft = np.roll(soft_of(labels, 4), 1, axis=1)
    with pytest.raises(UserError, match=r"columns sorted as text: 0.0% \(chance"):
        read(["a1", "a2", "a3", "a4"], soft, labels)


@pytest.mark.parametrize(
    ("classes", "ipc", "agree"),
    [(2, 500, 0.2), (2, 20, 0.6), (10, 10, 0.2), (100, 1, 0.1), (1000, 10, 0.02), (3, 1, 1.0)],
)
def test_honest_labels_that_often_disagree_are_taken_as_they_stand(classes, ipc, agree):
    labels = np.repeat(np.arange(classes), ipc)
    names = [f"{c:04d} {'zk'[c % 2]}" for c in range(classes)]
    soft = soft_of(labels, classes, agree=agree)
    share, note = read(names, soft, labels)
    assert note is None and share == (soft.argmax(1) == labels).mean()
    assert share >= least_agreement(classes, len(labels)) > 1 / classes
    with pytest.raises(UserError):  # the twin
        read(names, np.roll(soft, 1, axis=1), labels, numbered=True)


def test_a_table_of_names_with_soft_labels_in_class_order(tmp_path):
    soft = np.full((10, 10), 0.01) + 0.9 * np.eye(10)
    rows = []
    for i, name in enumerate(FASHION):
        Image.fromarray(np.full((8, 8), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "label": name, "soft_label": soft[i].tolist()})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    real = ArraySource(np.zeros((10, 8, 8, 1), np.uint8), np.arange(10), num_classes=10)
    found = ImageSet(tmp_path, DATASETS["fashion_mnist"], real, ipc=1, image_size=8)
    assert found.soft_NK.argmax(1).tolist() == found.labels_N.tolist()
    assert "100.0%" in found.soft_note
