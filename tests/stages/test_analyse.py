"""What analyse asks of networks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.networks import random_variables

from prism_jax.config import Network
from prism_jax.errors import UserError
from prism_jax.models import build
from prism_jax.stages import analyse
from prism_jax.stages.networks import Networks
from prism_jax.types import Normalisation

SHAPE, THEIRS, DATAS = (8, 8, 1), (0.2, 0.1), (0.7, 0.9)


def cosines(*, own: tuple[float, ...] | None, data: tuple[float, float]):
    """Of random images, by a network that has a normalisation of its own, or none."""
    module, random = build("convnet_d1_bn", 3, width=0.125), np.random.default_rng(0)
    images, labels = random.integers(0, 256, (12, *SHAPE), np.uint8), np.arange(12) % 3
    half = len(own or ()) // 2
    stated = {} if own is None else {"mean": own[:half], "std": own[half:]}
    config = SimpleNamespace(
        analyse=SimpleNamespace(network="n"),
        network=lambda name: Network(architecture="resnet18", checkpoint="f", **stated),
    )
    inputs = SimpleNamespace(
        normalisation=Normalisation(data[:1], data[1:]),
        test_set=lambda: (images, labels),
        info=SimpleNamespace(name="grey", channels=1),
    )
    networks = Networks(config, None, inputs)
    networks.build = lambda name: module
    networks.load = lambda name: random_variables(module, SHAPE, 0)
    context = SimpleNamespace(config=config, networks=networks, inputs=inputs)
    return analyse._cosines(context, images, images[::-1], labels)["real"]


def test_an_imported_network_reads_images_as_it_was_trained():
    assert cosines(own=THEIRS, data=DATAS) == cosines(own=None, data=THEIRS)
    assert cosines(own=THEIRS, data=DATAS) != cosines(own=None, data=DATAS)  # the twin
    with pytest.raises(UserError, match="networks.n.mean has 2 numbers; grey has 1 channels"):
        cosines(own=(*THEIRS, 0.3, 0.4)[:4], data=DATAS)


@pytest.mark.parametrize(
    ("generates", "nearest", "began"),
    [(False, [], True), (True, [3, 1], True), (True, [], False)],
)
def test_noise_is_no_image_that_something_began_as(monkeypatch, generates, nearest, began):
    monkeypatch.setattr(analyse.generator, "wanted", lambda context: generates)
    monkeypatch.setattr(analyse, "_nearest", lambda context: nearest)
    assert analyse.began_as_images(None) == began
    if not began:
        with pytest.raises(UserError, match="began as a generator's noise"):
            analyse.initial_images(SimpleNamespace(config=None))
