"""Which of our labels the classes of a published set are."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from prism_jax.data.datasets import DATASETS
from prism_jax.data.sets.base import Found
from prism_jax.data.sets.classes import class_map
from prism_jax.data.sources import ArraySource
from prism_jax.errors import UserError


def ordered(names, *, numbered=False, stated=None, info="imagenet", **known) -> list[str]:
    """The set's names in the order of our labels."""
    count = len(names)
    real = ArraySource(np.zeros((count, 2, 2, 3), np.uint8), np.arange(count), num_classes=count)
    for attribute, value in known.items():
        setattr(real, attribute, value)
    found = Found("folder", tuple(names), numbered, "classes", np.arange(count), None, None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        order = class_map("SET", found, real, DATASETS[info], stated)
    return [names[at] for at in order]


CIFAR = DATASETS["cifar10"].class_names
NETTE = DATASETS["imagenette"].imagenet_indices


@pytest.mark.parametrize(
    ("names", "wanted", "known"),
    [
        (sorted(CIFAR, reverse=True), list(CIFAR), {"info": "cifar10"}),
        ([n.upper() for n in CIFAR[::-1]], [n.upper() for n in CIFAR], {"info": "cifar10"}),
        (["new002", "new000", "new001"], ["new000", "new001", "new002"], {}),
        (["2_c", "0_a", "1_b"], ["0_a", "1_b", "2_c"], {"class_names": ("x", "y", "z")}),
        (["1", "2", "3"], ["1", "2", "3"], {}),  # it counts from one
        (["b", "c", "a"], ["a", "b", "c"], {}),  # nothing is known: as ImageFolder
        (["n01484850", "n01440764"], ["n01440764", "n01484850"], {"imagenet_indices": (0, 2)}),
        (["2", "0"], ["0", "2"], {"imagenet_indices": (0, 2)}),  # ImageNet's own numbers
        (["2", "0"], ["2", "0"], {"imagenet_indices": (2, 0)}),
        (["00482", "00217"], ["00217", "00482"], {"imagenet_indices": (217, 482)}),
    ],
)
def test_found(names, wanted, known):
    assert ordered(names, **known) == wanted


def test_names_in_the_files_order_are_matched_by_name_not_by_number():
    permuted = list(CIFAR[5:] + CIFAR[:5])
    assert ordered(permuted, numbered=True, info="cifar10") == list(CIFAR)
    assert ordered(permuted, numbered=True, info="cifar10", stated=("numbers",)) == permuted


@pytest.mark.parametrize(
    ("names", "numbered", "known", "says"),
    [
        (["a", "b", "c"], False, {"class_names": ("x", "y", "z")}, ("=text", "=NAME,NAME")),
        (["a", "b", "c"], True, {"class_names": ("x", "y", "z")}, ("=numbers", "=NAME,NAME")),
        (["0", "2", "5"], False, {}, ("=numbers   in the order", "=NAME,NAME")),
        (["0", "2", "5"], False, {"imagenet_indices": (0, 1, 2)}, ("as ImageNet does",)),
    ],
)
def test_two_readings_are_refused_with_the_flag_that_decides(names, numbered, known, says):
    with pytest.raises(UserError) as caught:
        ordered(names, numbered=numbered, **known)
    for part in ("recover.initialise_classes", *says):
        assert part in str(caught.value)


def test_names_whose_numbers_sort_otherwise_as_text_are_warned_of():
    names = ["a1_x9", "a10_x8", "a2_x7"]
    with pytest.raises(UserWarning, match=r"they are a10_x8, a1_x9, .*numbers a1_x9, a2_x7, .*="):
        ordered(names)
    assert ordered(names, stated=("a2_x7", "a1_x9", "a10_x8")) == ["a2_x7", "a1_x9", "a10_x8"]
    assert ordered(["a2_x7", "b_1"]) == ["a2_x7", "b_1"]  # numbers that change nothing


def test_a_stated_order_decides():
    names, known = ["a", "b", "c"], {"class_names": ("x", "y", "z")}
    assert ordered(names, stated=("c", "a", "b"), **known) == ["c", "a", "b"]
    assert ordered(names, stated=("text",), **known) == ["a", "b", "c"]
    assert ordered(["5", "0", "20"], stated=("numbers",)) == ["0", "5", "20"]
    assert ordered(["5", "0", "20"], stated=("text",)) == ["0", "20", "5"]
    with pytest.raises(UserError, match="not in the set d; not named c"):
        ordered(names, stated=("a", "b", "d"))


def test_classes_that_no_image_has_are_no_classes():
    real = ArraySource(np.zeros((2, 2, 2, 3), np.uint8), [0, 1], num_classes=2)
    found = Found("npz", ("a", "b", "c"), True, "classes", np.array([2, 0]), None, None, None)
    assert class_map("SET", found, real, DATASETS["imagenet"]).tolist() == [0, 2]
    with pytest.raises(UserError, match="SET has 3 classes, but dataset.num_classes is 2"):
        class_map("SET", found._replace(labels_N=np.arange(3)), real, DATASETS["imagenet"])


def test_two_classes_of_one_name_are_told_apart_by_their_numbers():
    """As ImageNet's two cranes are."""
    names, known = ["crane", "a", "crane"], {"class_names": ("x", "y", "z")}
    with pytest.raises(UserError, match="one name .crane..*initialise_classes=numbers; else give"):
        ordered(names, numbered=True, **known)
    assert ordered(names, numbered=True, stated=("numbers",), **known) == names
    with pytest.raises(UserError, match="one name"):
        ordered(names, stated=("numbers",), **known)
