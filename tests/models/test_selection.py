"""The network among a file's tensors: every wrapper and prefix, and never a part of its own."""

from __future__ import annotations

import itertools

import pytest

from prism_jax.errors import UserError
from prism_jax.models import build, import_torch
from prism_jax.models.selection import select

WANTED = {
    "conv1.weight": (8, 3, 3, 3),
    "layer1.0.bn1.weight": (8,),
    "layer1.0.bn1.running_mean": (8,),
    "fc.weight": (10, 8),
}
LAYOUTS = ("torchvision",)


def under(*keys, of=WANTED, prefix=""):
    """The tensors of a network, inside dicts, with a prefix."""
    return {(*keys, prefix + name): shape for name, shape in of.items()}


def taken(shapes, key=None, wanted=WANTED):
    """The prefix under which the network was found, dicts and all, and what was said of it."""
    found = select(shapes, wanted, LAYOUTS, key)
    assert found.fits and found.paths.keys() == wanted.keys()
    (prefix,) = {".".join(path).removesuffix(name) for name, path in found.paths.items()}
    return prefix, found.note


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "anything_"])
@pytest.mark.parametrize(
    "keys",
    [
        (),
        ("state_dict",),
        ("model",),
        ("model_state_dict",),
        ("net",),
        ("network",),
        ("module",),
        ("state_dict_ema",),
        ("ema", "module"),
        ("a word that nobody knows",),
        ("1",),
    ],
)
def test_one_network_is_found_wherever_it_is(keys, prefix):
    wrapper = "".join(f"{key}." for key in keys)
    found, note = taken(under(*keys, prefix=prefix))
    assert found == wrapper + prefix
    assert (f'from "{wrapper[:-1]}"' in (note or "")) is bool(keys)
    assert (f'without the prefix "{prefix}"' in (note or "")) is bool(prefix)
    assert note is None or "\n" not in note


def test_prefixes_may_be_repeated_and_mixed():
    for count in (2, 3):
        for parts in itertools.product(("module.", "_orig_mod.", "model."), repeat=count):
            assert taken(under("state_dict", prefix="".join(parts)))[0].endswith("".join(parts))


@pytest.mark.parametrize("word", ["module", "_orig_mod", "_fsdp_wrapped_module"])
def test_words_around_a_part_of_the_network(word):
    """As a DataParallel of the features alone, or a compiled block, leaves them."""
    shapes = {
        ("state_dict", name.replace("layer1.", f"layer1.{word}.")): shape
        for name, shape in WANTED.items()
    }
    found = select(shapes, WANTED, LAYOUTS)
    assert found.fits and found.paths.keys() == WANTED.keys()
    assert f'without "{word}." within names' in found.note
    # A network with such a name of its own keeps it.
    own = {name.replace("layer1.", f"layer1.{word}."): shape for name, shape in WANTED.items()}
    assert taken(under("model", of=own), wanted=own)[0] == "model."


def test_a_prefix_of_the_architecture_is_not_taken_off():
    """All names of this network begin with "encoder.", and a file's may once more."""
    encoder = {f"encoder.{name}": shape for name, shape in WANTED.items()}
    assert taken(under(of=encoder), wanted=encoder) == ("", None)
    assert taken(under("model", of=encoder), wanted=encoder)[0] == "model."
    again = under(of=encoder, prefix="encoder.")
    assert taken(again, wanted=encoder)[0] == "encoder."
    # Without it, all are missing: nothing is guessed.
    assert not select(under(), encoder, LAYOUTS).fits


@pytest.mark.parametrize(
    ("architecture", "size"),
    [("mobilenet_v2", 32), ("vit_tiny_patch16_224", 32), ("swin_tiny", 32)],
)
@pytest.mark.parametrize("prefix", ["", "features.", "blocks.", "module.model."])
def test_networks_whose_own_names_have_prefixes(architecture, size, prefix):
    module = build(architecture, 10, depth=0.25)
    leaves = import_torch.torch_leaves(import_torch.variable_shapes(module, (size, size, 3)))
    wanted = {name: leaf.torch_shape for name, leaf in leaves.items()}
    assert taken(under("state_dict", of=wanted, prefix=prefix), wanted=wanted)[0] == (
        f"state_dict.{prefix}"
    )


def test_names_of_other_code_bases_under_a_prefix():
    theirs = {"model.conv_stem.weight": (8, 3, 3, 3), "model.classifier.weight": (10, 8)}
    wanted = {"features.0.0.weight": (8, 3, 3, 3), "classifier.1.weight": (10, 8)}
    found = select(under(of=theirs), wanted, ("torchvision", "timm_mobilenet_v2"))
    assert found.fits and set(found.paths) == {"conv_stem.weight", "classifier.weight"}


@pytest.mark.parametrize(
    ("plain", "average"),
    [
        (("state_dict",), ("state_dict_ema",)),
        (("model",), ("model_ema",)),
        (("model",), ("ema",)),
        (("model",), ("ema", "module")),
        (("state_dict",), ("ema_state_dict",)),
        (("net",), ("swa_model",)),
        (("student",), ("teacher",)),
    ],
)
def test_an_average_is_taken_and_the_plain_one_can_be_chosen(plain, average):
    for order in ((plain, average), (average, plain)):
        shapes = under(*order[0]) | under(*order[1])
        prefix, note = taken(shapes)
        assert prefix == ".".join(average) + "."
        assert "averaged over the training" in note and f"weights_key={'.'.join(plain)}" in note
        chosen, note = taken(shapes, key=".".join(plain))
        assert chosen == ".".join(plain) + "." and "average" not in note
        assert taken(shapes, key=".".join(average))[0] == prefix


def test_both_as_names_with_prefixes_in_one_dict():
    shapes = under("state_dict", prefix="model.") | under("state_dict", prefix="ema_model.module.")
    assert taken(shapes)[0] == "state_dict.ema_model.module."
    assert taken(shapes, key="state_dict.model")[0] == "state_dict.model."


def test_the_network_beside_its_average_in_one_module():
    shapes = under("ema", "online_model") | under("ema", "ema_model") | under("net")
    assert taken(shapes)[0] == "ema.ema_model."
    assert taken(shapes, key="ema.online_model")[0] == "ema.online_model."


def test_an_average_of_only_the_parameters_is_left_and_said_to_be():
    parameters = {n: shape for n, shape in WANTED.items() if "running" not in n}
    prefix, note = taken(under("model") | under("ema", of=parameters))
    assert prefix == "model." and "an average, which has not all tensors" in note


def test_several_networks_are_not_guessed_between():
    shapes = under("first") | under("second", prefix="module.")
    with pytest.raises(UserError, match='2 networks that fit.*"first" or "second.module"'):
        taken(shapes)
    assert taken(shapes, key="second")[0] == "second.module."
    with pytest.raises(UserError, match='no tensor of it is under weights_key="third".*"first"'):
        taken(shapes, key="third")
    # Of another width, it is another network.
    wide = {name: (2 * shape[0], *shape[1:]) for name, shape in WANTED.items()}
    assert taken(under("student") | under("teacher", of=wide))[0] == "student."


def test_what_stands_beside_is_left_out_by_name():
    beside = {
        ("state_dict", "criterion.weight"): (10,),
        ("state_dict", "model.n_averaged"): (),
        ("optimizer", "state", "0", "exp_avg"): (8, 3, 3, 3),
    }
    prefix, note = taken(under("state_dict", prefix="model.") | beside)
    assert prefix == "state_dict.model."
    assert "left out 1 other tensor: state_dict.criterion.weight" in note


def test_an_optimiser_with_the_same_names_is_no_network():
    moments = under("opt_state", "0", "mu") | under("optimizer", "exp_avg")
    assert taken(under("params") | moments)[0] == "params."


def test_a_part_too_many_is_not_left_out_silently():
    """A deeper network has all names of a shallower one: it is not that network."""
    deeper = {**WANTED, "layer1.1.bn1.weight": (8,)}
    found = select(under("model", of=deeper), WANTED, LAYOUTS)
    assert not found.fits and "layer1.1.bn1.weight" in found.paths


def test_what_does_not_fit_is_still_taken_out_of_its_wrapper():
    less = {name: shape for name, shape in WANTED.items() if name != "fc.weight"}
    found = select(under("model", prefix="module.", of=less), WANTED, LAYOUTS)
    assert not found.fits and found.paths.keys() == less.keys()
    parts = under("state_dict", prefix="backbone.", of=less) | {("state_dict", "head.w"): (10, 8)}
    found = select(parts, WANTED, LAYOUTS)
    assert not found.fits and found.paths.keys() == less.keys() and "head.w" in found.note
    other = {f"stages.{i}.weight": (8,) for i in range(9)} | {"head.weight": (10, 8)}
    found = select(under("model", prefix="module.", of=other), WANTED, LAYOUTS)
    assert not found.fits and found.paths.keys() == other.keys()
