from __future__ import annotations

import numpy as np
import pytest

from prism_jax.data.datasets import DATASETS, dataset_info
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
