"""Weights that do not fit: what would is told first, with the flags to state."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from prism_jax.errors import UserError
from prism_jax.models import build, fitting, import_torch

SHAPE = (16, 16, 3)


def state_of(architecture, classes=10, shape=SHAPE, **form):
    """Zeros by the names and shapes of a network's state dict."""
    shapes = import_torch.variable_shapes(build(architecture, classes, **form), shape)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return import_torch.to_state_dict(zeros)


@pytest.fixture(scope="module")
def small():
    return state_of("convnet_d1_bn", width=0.0625)


def refused(tensors, architecture="convnet_d1_bn", classes=10, shape=SHAPE, width=0.0625, **form):
    with pytest.raises(UserError) as caught:
        fitting.fit(tensors, "w.pth", architecture, classes, image_shape=shape, width=width, **form)
    return str(caught.value)


def test_all_misfits_are_told_at_once(small):
    state = dict(small)
    state["extra.weight"] = state.pop("classifier.bias")
    state["features.0.weight"] = state["features.0.weight"][:, :1]
    message = refused(state)
    assert "1 tensors missing from the file: classifier.bias" in message
    assert "not in the network: extra.weight" in message
    assert "features.0.weight: file (8, 1, 3, 3), network (8, 3, 3, 3)" in message


def test_parameters_without_running_statistics_are_called_that(small):
    lacking = {name: array for name, array in small.items() if "running" not in name}
    assert 0 < len(lacking) < len(small)
    message = refused(lacking)
    assert "It lacks BatchNorm's running statistics" in message and "State the" not in message
    assert "It lacks" not in refused({**lacking, "extra.weight": np.zeros(1)})


def test_another_architecture_is_recognised():
    """A file of ResNet-20 (CIFAR) for 100 classes, as resnet32."""
    message = refused(state_of("resnet20", 100), "resnet32", 100, width=1.0)
    assert "It looks like resnet20" in message.splitlines()[1]


def test_another_number_of_classes_says_what_can_be_done(small):
    message = refused(small, classes=4)
    assert "head of 10 classes; 4 were asked" in message
    assert "networks.NAME.head_classes=10" in message and "class_indices" in message
    assert "networks.NAME.start_from=" in message
    message = refused(small, classes=20)  # no choice of outputs makes ten of them twenty
    assert "head of 10 classes; 20 were asked" in message and "class_indices" not in message
    assert "networks.NAME.start_from=" in message


def test_other_images_are_named(small):
    assert "another size than 32 x 32 px" in refused(small, shape=(32, 32, 3))
    assert "It reads 3 channels; the images have 1" in refused(small, shape=(16, 16, 1))
    message = refused(small, shape=(32, 32, 1), classes=4)
    assert "another size" in message and "3 channels" in message and "10 classes" in message


def test_images_too_small_are_refused_with_the_minimum(small):
    assert "resnet18 needs images of 32 px or more, with the small stem 8" in refused(
        small, architecture="resnet18", shape=(16, 224, 3)
    )
    assert "convnet_d1_bn needs images of 2 px" in refused(small, shape=(1, 1, 3))


@pytest.mark.parametrize(
    ("architecture", "have", "ask", "stated"),
    [
        ("resnet18", {"stem": "small"}, {}, "--stem=small"),
        ("resnet18", {}, {"stem": "small"}, "--stem=imagenet"),
        ("resnet18", {"stem": "small", "width": 0.25}, {}, "--stem=small --width=0.25"),
        ("resnet18", {"stem": "small", "depth": 0.5}, {}, "--stem=small --depth=0.5"),
        ("convnet_d3_bn", {"width": 0.25}, {"width": 2.0}, "--width=0.25"),
        ("convnet_d3", {}, {"width": 0.5}, "--width=1.0"),
        ("convnet_d2_bn", {"width": 1.3}, {}, "--width=1.3"),
        ("alexnet", {"stem": "small"}, {}, "--stem=small"),
    ],
)
def test_another_form_is_found_and_stated_first(architecture, have, ask, stated):
    state = state_of(architecture, shape=(64, 64, 3), **have)
    message = refused(state, architecture, shape=(64, 64, 3), **{"width": 1.0, **ask})
    first, *rest = message.splitlines()[1:]
    assert f"It fits with {stated} (in a run --config.networks.NAME." in first
    assert not any("channel" in line or "head has" in line for line in rest)
    # What the message says to state does fit.
    flags = dict(flag[2:].split("=") for flag in stated.split())
    form = {"width": 1.0, **ask} | {k: v if k == "stem" else float(v) for k, v in flags.items()}
    fitting.fit(state, "w.pth", architecture, 10, image_shape=(64, 64, 3), **form)


@pytest.mark.parametrize(
    ("architecture", "end", "asked"),
    [("mobilenet_v2", "features.18", 0.5), ("mnasnet1_0", "layers.14", 1.0)],
)
def test_a_narrow_network_that_ends_in_full_is_called_so(architecture, end, asked):
    """As torchvision's mobilenet_v2(width_mult=0.5) and mnasnet0_5, and timm's."""
    ours = state_of(architecture, shape=(64, 64, 3), width=0.5)
    state = dict(ours)
    for name, tensor in state.items():
        if name.startswith(end) or name.startswith("layers.15."):
            state[name] = np.zeros((1280, *tensor.shape[1:]), np.float32)
    state["classifier.1.weight"] = np.zeros((10, 1280), np.float32)
    message = refused(state, architecture, shape=(64, 64, 3), width=asked)
    assert "all 1,280 channels at its end" in message.splitlines()[1]
    if asked == 1.0:  # the twin: one that ends as narrow as it is
        message = refused(ours, architecture, shape=(64, 64, 3), width=asked)
        assert "--width=0.5" in message and "1,280" not in message


def test_form_channels_and_classes_are_told_together():
    state = state_of("resnet18", 100, (32, 32, 1), stem="small", width=0.25)
    lines = refused(state, "resnet18", shape=(32, 32, 3), width=1.0).splitlines()
    assert "--stem=small --width=0.25" in lines[1]
    assert "reads 1 channel; the images have 3 channels" in lines[2]
    assert "head has 100 classes; 10 were asked for" in lines[3]


def test_no_form_is_invented():
    """Layers of uneven widths fit no width; the message says only what is different."""
    state = state_of("convnet_d3_bn", width=0.5)
    state["features.8.weight"] = np.zeros((24, 64, 3, 3), np.float32)
    message = refused(state, "convnet_d3_bn", width=1.0)
    assert "It fits with" not in message and "State the architecture, width" in message


def test_what_is_suspicious_is_told_where_something_does_not_fit(small):
    assert "the digits differ." in refused(small, width=0.5, also="the digits differ")


def test_numbers_that_stand_for_others_are_refused(small):
    for dtype in (np.int8, np.uint8, np.bool_, np.complex64):
        cast = {**small, "classifier.weight": small["classifier.weight"].astype(dtype)}
        assert f"classifier.weight holds {np.dtype(dtype)} numbers" in refused(cast)
