from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from prism_jax.data import datasets
from prism_jax.data.datasets import DATASETS, dataset_info, imagenet_positions
from prism_jax.data.sources import open_source, read_all
from prism_jax.errors import UserError


def test_digits_constants_are_those_of_the_training_split():
    info = DATASETS["digits"]
    train = open_source(name="digits", source="sklearn", path=None, split="train", image_size=16)
    pixels = read_all(train)[0].astype(np.float64) / 255
    np.testing.assert_allclose(info.normalisation.mean, pixels.mean(axis=(0, 1, 2)), atol=5e-5)
    np.testing.assert_allclose(info.normalisation.std, pixels.std(axis=(0, 1, 2)), atol=5e-5)
    # The test split has other moments: taking the wrong one would be seen.
    test = open_source(name="digits", source="sklearn", path=None, split="test", image_size=16)
    assert abs(info.normalisation.mean[0] - (read_all(test)[0] / 255).mean()) > 5e-5


def test_rows_are_filed_under_their_own_name():
    assert all(info.name == name for name, info in DATASETS.items())
    assert len(set(DATASETS["cifar100"].class_names)) == 100
    assert list(DATASETS["cifar100"].class_names) == sorted(DATASETS["cifar100"].class_names)
    assert len(DATASETS["imagenette"].imagenet_indices) == 10


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'cifar10'.*digits, mnist"):
        dataset_info("cifar-10")


def test_imagenets_classes_are_its_ids_in_sorted_order():
    wnids = datasets.imagenet_wnids()
    assert len(wnids) == 1000 and list(wnids) == sorted(wnids)
    assert imagenet_positions(wnids) == tuple(range(1000))
    assert imagenet_positions(wnids[::-1]) == tuple(range(999, -1, -1))
    assert imagenet_positions(["n02102040", "n01440764"]) == (217, 0)
    assert imagenet_positions(["n02102040", "n99999999"]) is None
    assert imagenet_positions(["dog"]) is imagenet_positions([]) is None
    assert len(datasets.imagenet_validation_wnids()) == 50000


def test_all_of_imagenet_is_known_without_the_list_and_a_part_is_not(monkeypatch):
    wnids = datasets.imagenet_wnids()
    monkeypatch.setattr(datasets, "imagenet_wnids", lambda: ())
    assert imagenet_positions(wnids[::-1]) == tuple(range(999, -1, -1))
    assert imagenet_positions(wnids[:10]) is None
    assert imagenet_positions([f"class {i}" for i in range(1000)]) is None


def test_every_set_names_its_labelled_test_images():
    unlabelled = {name for name, info in DATASETS.items() if "test" not in info.test_splits}
    assert unlabelled == {"imagenet", "imagenette", "tiny_imagenet"}


SPOKEN = {
    "arrays": ("cifar10", None, ["airplane", "automobile"], 2),
    "WordNet IDs of a part": ("imagenette", ["n03028079", "n01440764"], ["church", "tench"], None),
    "WordNet IDs of no table of names": ("imagenet", ["n03028079", "n01440764"], None, None),
    "folders in another order": (
        "fashion_mnist", ["Ankle_boot", "T-shirt_top"], ["ankle boot", "T-shirt/top"], None,
    ),
    "two of ten": ("cifar10", ["cat", "dog"], ["cat", "dog"], None),
    "numbers": ("cifar10", ["03", "5"], ["cat", "dog"], None),
    "numbers of nothing": ("imagenet", ["3", "5"], None, None),
    "words of one's own": ("imagenet", ["french_horn", "tench"], ["french horn", "tench"], None),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOKEN)
def test_classes_are_called_what_they_are(what):
    name, names, expected, first = SPOKEN[what]
    found = datasets.spoken(names, datasets.dataset_info(name))
    assert (found and found[:first]) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["n01440764", "n03028079"], None),
        (["0", "1", "10"], None),
        (["great_tit", "wren"], ["great tit", "wren"]),
        (["n01440764", "wren"], ["n01440764", "wren"]),  # one of them is a name
    ],
)
def test_folders_of_one_s_own_are_names_only_where_they_are_words(names, expected):
    """A prompt "a photo of a n01440764" says nothing to anybody."""
    fields = {"name": "birds", "num_classes": len(names), "class_names": tuple(names)}
    info = dataclasses.replace(datasets.dataset_info("cifar10"), **fields)
    assert datasets.spoken(names, info) == expected
