"""Every row of the registry: counts, first BatchNorm, smallest images, embeddings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from prism_jax import models, training
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES, import_torch, layers, layouts
from prism_jax.types import Normalisation

KEY = functools.partial(jax.random.key, 0, impl="threefry2x32")


def shapes(module, size, channels=3):
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    return jax.eval_shape(module.init_with_output, KEY(), images)


# They differ from one of the others in a number.
LIKE_ANOTHER = [
    *("resnet34", "resnet101", "wide_resnet50_2", "resnet32", "resnet44", "resnet56"),
    *("shufflenet_v2_x1_0", "shufflenet_v2_x2_0", "mnasnet1_0", "vit_small_patch16_224"),
    *("deit_tiny", "convnet_d4_none"),
    *(f"convnet_d{n}{norm}" for n in (1, 2, 3, 5, 6) for norm in ("", "_bn", "_none")),
]
KINDS = [name for name in ARCHITECTURES if name not in LIKE_ANOTHER]


ROWS = [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in ARCHITECTURES]


@pytest.mark.parametrize("name", ROWS)
def test_counts_are_the_published_ones(name):
    row = ARCHITECTURES[name]
    logits, variables = shapes(models.build(name, row.classes), row.image_size)
    assert logits.shape == (2, row.classes)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == row.parameters
    assert len(jax.tree.leaves(variables.get("batch_stats", {}))) == 2 * row.batch_norms
    assert set(variables) <= {"params", "batch_stats"}
    if row.first_bn:
        assert {"mean", "var"} == set(variables["batch_stats"][row.first_bn[0]])


PUBLISHED = {  # where the name is not torchvision's own
    "swin_tiny": "swin_t",
    "vit_tiny_patch16_224": "timm",
    "vit_small_patch16_224": "timm",
    "deit_tiny": "deit_tiny_patch16_224",
}


def published(name, torch_networks):
    """The network as its own code base builds it, without memory for its weights."""
    row, known = ARCHITECTURES[name], torch_networks.tv.list_models()
    with torch_networks.torch.device("meta"):
        # RegNet computes its widths with tensors.
        if (official := PUBLISHED.get(name, name)) in known and name != "regnet_y_8gf":
            return torch_networks.tv.get_model(official, weights=None)
        if name in PUBLISHED:
            return torch_networks.timm.create_model(name if official == "timm" else official)
        case = torch_networks.parity.Case(name, 1.0, row.image_size, row.classes)
        return torch_networks.NETWORKS[name](case)


@pytest.mark.parametrize("name", ROWS)
def test_rows_state_what_pytorch_has(name):
    reason = "needs torch, torchvision and timm; the rows state what they have"
    torch_networks = pytest.importorskip(
        "models.torch_networks", reason=reason, exc_type=ImportError
    )
    torch, row, norms = torch_networks.torch, ARCHITECTURES[name], []
    if not row.weights:
        pytest.skip("nothing is published of it")
    net = published(name, torch_networks).eval()
    assert sum(p.numel() for p in net.parameters()) == row.parameters
    for part_name, part in net.named_modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_hook(lambda *_, part_name=part_name: norms.append(part_name))
    images = torch.empty((2, 3, row.image_size, row.image_size), device="meta")
    assert net(images).shape == (2, row.classes)
    assert len(norms) == row.batch_norms
    assert row.first_bn == ((norms[0],) if norms else None)

    _, variables = shapes(models.build(name, row.classes), row.image_size)
    ours = {n: leaf.torch_shape for n, leaf in import_torch.torch_leaves(variables).items()}
    theirs = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    assert ours == {n: shape for n, shape in theirs.items() if not layouts.UNUSED.search(n)}

    size = row.min_image_size["imagenet"]
    if "patch16" not in name and name != "deit_tiny" and not name.startswith("convnet_d"):
        assert net(torch.empty((2, 3, size, size), device="meta")).shape == (2, row.classes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_are_complete(name):
    row = ARCHITECTURES[name]
    assert re.fullmatch(r"(\d{4}\.\d{4,5})?", row.paper)
    assert set(row.weights) <= set(layouts.LAYOUTS)
    assert set(row.min_image_size) == set(models.registry.STEMS)
    assert row.min_image_size["small"] <= row.min_image_size["imagenet"] <= row.image_size
    assert (row.batch_norms > 0) == (row.first_bn is not None)
    assert row.family and row.parameters > 0


@pytest.mark.parametrize("name", KINDS)
def test_the_first_batch_norm_of_the_registry_runs_first(name):
    row = ARCHITECTURES[name]
    module = models.build(name, 10, width=0.25, depth=0.01)
    assert (
        models.first_layers(module, (row.image_size, row.image_size, 3))[layers.BatchNorm]
        == row.first_bn
    )


def test_the_network_of_the_page_on_teachers_is_complete(monkeypatch):
    """As it stands there, it passes what every row passes."""
    page = pathlib.Path(__file__).parents[2] / "docs" / "teachers.md"
    code = page.read_text().split("## A network of your own")[1].split("```python\n")[1]
    found = {"nn": nn, "jnp": jnp, "layers": layers, "Architecture": models.registry.Architecture}
    exec(code.split("```")[0], found)
    monkeypatch.setitem(ARCHITECTURES, "lenet", found["row"])
    checks = (
        test_counts_are_the_published_ones, test_rows_are_complete,
        test_the_first_batch_norm_of_the_registry_runs_first,
    )  # fmt: skip
    for check in checks:
        check("lenet")
    for stem in models.registry.STEMS:
        test_scaled_networks_on_their_smallest_images("lenet", stem)
    wrong = dataclasses.replace(found["row"], parameters=10_767)
    monkeypatch.setitem(ARCHITECTURES, "lenet", wrong)
    with pytest.raises(AssertionError):
        test_counts_are_the_published_ones("lenet")


def test_a_deeper_convnet_needs_larger_images():
    for depth, size in ((0.3, 2), (1.0, 8), (2.0, 64)):
        assert ARCHITECTURES["convnet_d3"].smallest("imagenet", depth) == size
        shapes(models.build("convnet_d3", 10, width=0.1, depth=depth), size)
    with contextlib.suppress(ZeroDivisionError):  # which JAX 0.10 raises for nothing
        _, found = shapes(models.build("convnet_d3", 10, width=0.1, depth=2.0), 32)
        assert found["params"]["classifier"]["kernel"].shape[0] == 0  # nothing is left
    assert ARCHITECTURES["resnet18"].smallest("small", 2.0) == 8


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", KINDS)
def test_scaled_networks_on_their_smallest_images(name, stem):
    row = ARCHITECTURES[name]
    size = row.min_image_size[stem]
    module = models.build(name, 7, width=0.25, depth=0.01, stem=stem, dtype=jnp.bfloat16)
    logits, variables = shapes(module, size, channels=1)
    assert logits.shape == (2, 7) and logits.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) < row.parameters / 3

    images = jax.ShapeDtypeStruct((2, size, size, 1), jnp.float32)
    read = functools.partial(module.apply, mutable=["bn_statistics", "features"])
    _, told = jax.eval_shape(read, variables, images)
    expected = jax.tree.structure(variables.get("batch_stats", {}))
    assert jax.tree.structure(told.get("bn_statistics", {})) == expected
    (embedding,) = jax.tree.leaves(told["features"])
    leaves = jax.tree.leaves(variables["params"])
    heads = {leaf.shape[0] for leaf in leaves if leaf.ndim == 2 and leaf.shape[1] == 7}
    assert embedding.ndim == 2 and embedding.shape[1] in heads and embedding.shape[1] != 7


def test_depth_and_width_at_one_change_nothing():
    assert models.build("resnet18", 10) == models.build("resnet18", 10, width=1.0, depth=1.0)
    assert hash(models.build("resnet18", 10)) == hash(models.build("resnet18", 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "resnet81"}, "no architecture 'resnet81'; did you mean resnet18"),
        ({"architecture": "zzz"}, "There are: alexnet, convnet_d1"),
        ({"stem": "big"}, "must be one of: imagenet, small"),
        ({"width": 0.0}, "width of resnet18 is 0.0; it must be positive"),
        ({"depth": -1.0}, "depth of resnet18 is -1.0; it must be positive"),
        ({"num_classes": 0}, "num_classes of resnet18 is 0; it must be positive"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    with pytest.raises(UserError) as caught:
        models.build(**{"architecture": "resnet18", "num_classes": 10, **arguments})
    assert message in str(caught.value)


class Reversed(nn.Module):
    """Its first BatchNorm in the tree is the second to run."""

    @nn.compact
    def __call__(self, x, train=False):
        x = layers.BatchNorm(name="z")(x, train)
        return layers.global_avg_pool(layers.BatchNorm(name="a")(x, train))


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return Reversed(name="inside")(x, train)


def test_the_first_batch_norm_is_the_first_to_run():
    assert models.first_layers(Reversed(), (8, 8, 3))[layers.BatchNorm] == ("z",)
    assert models.first_layers(Nested(), (8, 8, 3))[layers.BatchNorm] == ("inside", "z")
    variables = Reversed().init(KEY(), jnp.zeros((1, 8, 8, 3)))
    assert next(iter(sorted(variables["batch_stats"]))) == "a"  # the tree's order would be wrong


# Ten suffice for the others. Without convolutions nearness has to be learnt too: 66 % after ten.
EPOCHS = {"vit_tiny_patch16_224": 30}
# At a quarter of their width some have few channels: floors a little below what was measured.
FLOORS = {
    "resnet20": 0.85, "wrn_16_2": 0.85, "mobilenet_v2": 0.85, "shufflenet_v2_x0_5": 0.75,
    "efficientnet_b0": 0.9, "mnasnet1_3": 0.9, "vit_tiny_patch16_224": 0.85,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KINDS, "wide_resnet50_2", "convnet_d3", "convnet_d3_none"])
def test_every_family_learns_digits(name):
    """Narrow and shallow, by one recipe; the accuracies are in docs/testing.md."""
    digits = load_digits()
    images = np.kron(digits.images, np.ones((1, 2, 2)))[..., None] * (255 / 16)
    images, labels = images.astype(np.uint8), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1437], order[1437:]
    scale = Normalisation((0.3,), (0.37,))
    module = models.build(name, 10, width=0.25, depth=0.34, stem="small")
    variables = training.fit(
        module, images[train], labels[train], normalisation=scale,
        epochs=EPOCHS.get(name, 10), batch_size=64,
        crop_min=0.8, flip=False, learning_rate=1e-3,
    )  # fmt: skip
    top1 = training.test(module, variables, images[test], labels[test], scale).top1
    print(f"{name}: {top1:.1%}")
    assert top1 > FLOORS.get(name, 0.95)
