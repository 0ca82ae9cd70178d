from __future__ import annotations

import pytest

from prism_jax.data import sources
from prism_jax.data.sources import open_source
from prism_jax.errors import UserError


@pytest.mark.parametrize("source", [name for name in sources.SOURCES if name != "sklearn"])
@pytest.mark.parametrize("path", [None, "nowhere/at/all"])
def test_a_missing_path_says_what_belongs_there(source, path):
    name = "cifar10" if source == "cifar" else "mnist"
    with pytest.raises(UserError, match="needs dataset.path to be") as error:
        open_source(name=name, source=source, path=path, split="train", image_size=28)
    assert str(path) in str(error.value) or "not set" in str(error.value)


def test_unknown_source_lists_the_known(tmp_path):
    with pytest.raises(UserError, match="sklearn, npz, idx, cifar, folder, tar, tfds"):
        open_source(name="mnist", source="zip", path=tmp_path, split="train", image_size=28)
    with pytest.raises(UserError, match="holds the data set digits only"):
        open_source(name="mnist", source="sklearn", path=None, split="train", image_size=28)
