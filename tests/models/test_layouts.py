"""Weight files of other code bases: their names become ours, and the network is the same."""

from __future__ import annotations

from collections import Counter

import jax
import numpy as np
import pytest

from prism_jax.data import weights
from prism_jax.errors import UserError
from prism_jax.models import ARCHITECTURES, build, import_torch, layouts


def names(architecture, *given):
    tensors = {name: np.zeros(1) for name in given}
    return list(layouts.rename(tensors, ARCHITECTURES[architecture].weights))


@pytest.mark.parametrize(
    ("architecture", "renamed"),
    [
        (
            "densenet121",
            {
                "features.denseblock1.denselayer2.norm.1.weight": (
                    "features.denseblock1.denselayer2.norm1.weight"
                )
            },
        ),
        (
            "swin_tiny",
            {
                "layers.0.blocks.1.mlp.fc1.weight": "features.1.1.mlp.0.weight",
                "layers.0.downsample.reduction.weight": "features.2.reduction.weight",
                "layers.2.downsample.reduction.weight": "features.6.reduction.weight",
                "patch_embed.norm.bias": "features.0.2.bias",
            },
        ),
        (
            "swin_tiny",
            {
                "layers.3.blocks.1.mlp.fc2.weight": "features.7.1.mlp.3.weight",
                "layers.1.downsample.reduction.weight": "features.2.reduction.weight",
                "layers.3.downsample.norm.weight": "features.6.norm.weight",
                "head.fc.bias": "head.bias",
            },
        ),
        (
            "convnext_tiny",
            {
                "stages.2.8.dwconv.weight": "features.5.8.block.0.weight",
                "stages.2.8.norm.weight": "features.5.8.block.2.weight",
                "stages.2.8.gamma": "features.5.8.layer_scale",
                "downsample_layers.0.1.weight": "features.0.1.weight",
                "norm.weight": "classifier.0.weight",
                "head.bias": "classifier.2.bias",
            },
        ),
        (
            "convnext_tiny",
            {
                "stem.1.bias": "features.0.1.bias",
                "stages.0.blocks.2.mlp.fc1.weight": "features.1.2.block.3.weight",
                "stages.3.downsample.0.weight": "features.6.0.weight",
                "head.norm.weight": "classifier.0.weight",
                "head.fc.weight": "classifier.2.weight",
            },
        ),
        (
            "mobilenet_v2",
            {
                "conv_stem.weight": "features.0.0.weight",
                "blocks.0.0.bn2.bias": "features.1.conv.2.bias",
                "blocks.5.2.conv_pwl.weight": "features.16.conv.2.weight",
                "bn2.running_var": "features.18.1.running_var",
            },
        ),
        (
            "efficientnet_b0",
            {
                "conv_stem.weight": "features.0.0.weight",
                "blocks.0.0.se.conv_reduce.bias": "features.1.0.block.1.fc1.bias",
                "blocks.4.2.se.conv_expand.bias": "features.5.2.block.2.fc2.bias",
                "blocks.6.0.bn3.running_mean": "features.7.0.block.3.1.running_mean",
            },
        ),
        (
            "mnasnet1_0",
            {
                "conv_stem.weight": "layers.0.weight",
                "blocks.0.0.conv_pw.weight": "layers.6.weight",
                "blocks.1.2.bn3.weight": "layers.8.2.layers.7.weight",
                "classifier.weight": "classifier.1.weight",
            },
        ),
        (
            "regnet_y_8gf",
            {
                "stem.bn.weight": "stem.1.weight",
                "s1.b1.downsample.conv.weight": "trunk_output.block1.block1-0.proj.0.weight",
                "s3.b10.conv2.bn.bias": "trunk_output.block3.block3-9.f.b.1.bias",
                "s4.b1.se.fc2.bias": "trunk_output.block4.block4-0.f.se.fc2.bias",
                "head.fc.weight": "fc.weight",
            },
        ),
        (
            "resnet18",
            {
                "layer2.0.shortcut.0.weight": "layer2.0.downsample.0.weight",
                "layer2.0.shortcut.1.running_var": "layer2.0.downsample.1.running_var",
                "linear.weight": "fc.weight",
                "layer1.0.conv1.weight": "layer1.0.conv1.weight",
            },
        ),
        ("resnet20", {"fc.weight": "linear.weight", "layer1.0.bn1.bias": "layer1.0.bn1.bias"}),
        (
            "vgg11_bn",
            {"pre_logits.fc2.weight": "classifier.3.weight", "head.fc.bias": "classifier.6.bias"},
        ),
    ],
)  # fmt: skip
def test_names_of_other_code_bases(architecture, renamed):
    assert names(architecture, *renamed) == list(renamed.values())


def test_our_own_names_stay_and_counters_go():
    for architecture in ARCHITECTURES:
        head = "linear.bias" if "cifar_fc" in ARCHITECTURES[architecture].weights else "fc.bias"
        ours = ["features.0.0.weight", "stem.0.weight", head]
        assert names(architecture, *ours) == ours
    index = "layers.0.blocks.1.attn.relative_position_index"
    assert names("swin_tiny", "norm.weight", index) == ["norm.weight"]


def test_layouts_are_known():
    named = {layout for row in ARCHITECTURES.values() for layout in row.weights}
    assert named == set(layouts.LAYOUTS)


@pytest.mark.parametrize(
    ("architecture", "stem", "theirs"),
    [
        ("resnet18", "small", (("fc", "linear"), ("downsample", "shortcut"))),
        ("resnet20", "imagenet", (("linear", "fc"),)),
    ],
)
def test_files_of_cifars_resnets_under_other_names(architecture, stem, theirs, tmp_path):
    shape = (32, 32, 3)
    module = build(architecture, 10, width=0.0625, stem=stem)
    like = import_torch.variable_shapes(module, shape)
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda s: draw.normal(size=s.shape).astype(np.float32), like)
    tensors = {}
    for name, tensor in import_torch.to_state_dict(variables).items():
        for ours, other in theirs:
            name = name.replace(ours, other)
        tensors[f"net.module.{name}"] = tensor
    asked = {"image_shape": shape, "width": 0.0625}
    path = str(tmp_path / "w.npz")
    np.savez(path, **tensors)
    loaded = weights.load(path, architecture, 10, stem=stem, **asked)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, variables))
    if stem == "small":  # the twin: the same file as a network of the large stem
        with pytest.raises(UserError, match="It fits with --stem=small"):
            weights.load(path, architecture, 10, **asked)
    np.savez(path, **{n: t for n, t in tensors.items() if not n.endswith("conv1.weight")})
    with pytest.raises(UserError, match="tensors missing from the file"):
        weights.load(path, architecture, 10, stem=stem, **asked)


TIMM = {
    "mobilenetv2_100": "mobilenet_v2",
    "efficientnet_b0": "efficientnet_b0",
    "mnasnet_100": "mnasnet1_0",
    "convnext_tiny": "convnext_tiny",
    "swin_tiny_patch4_window7_224": "swin_tiny",
    "densenet121": "densenet121",
    "resnet18": "resnet18",
    "vit_tiny_patch16_224": "vit_tiny_patch16_224",
    "regnety_080_tv": "regnet_y_8gf",
    "vgg11_bn": "vgg11_bn",
}


@pytest.mark.slow
@pytest.mark.parametrize("theirs", TIMM)
def test_a_timm_checkpoint_is_the_same_network(theirs, tmp_path):
    reason = "needs torch, torchvision and timm"
    torch_networks = pytest.importorskip(
        "models.torch_networks", reason=reason, exc_type=ImportError
    )
    torch, ours = torch_networks.torch, TIMM[theirs]
    network = torch_networks.timm.create_model(theirs).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=draw)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=draw))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "timm.pth")
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    def logits(variables):
        return np.asarray(jax.jit(build(ours, 1000).apply)(variables, images))

    path, shape = str(tmp_path / "timm.pth"), images.shape[1:]
    variables = weights.load(path, ours, 1000, image_shape=shape)
    scale = np.std(wanted)
    assert scale > 0
    np.testing.assert_allclose(logits(variables) / scale, wanted / scale, rtol=0, atol=2e-3)
    # The twin: two tensors of one shape change places.
    leaves, tree = jax.tree.flatten(variables["params"])
    ((shape, _),) = Counter(x.shape for x in leaves if x.ndim == 1).most_common(1)
    same = [i for i, x in enumerate(leaves) if x.shape == shape]
    leaves[same[0]], leaves[same[1]] = leaves[same[1]], leaves[same[0]]
    swapped = logits({**variables, "params": jax.tree.unflatten(tree, leaves)})
    assert np.abs(swapped - wanted).max() / scale > 1e-2
