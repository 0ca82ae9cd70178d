"""Every architecture against its published PyTorch implementation, in float64.

The golden files hold what PyTorch computed; where it is installed, they are checked too.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST
from models import parity

from prism_jax.core import losses, statistics
from prism_jax.models import ARCHITECTURES, import_torch, layers, swin, vit


def variables_of(case):
    """The case's weights, in float64."""
    leaves = parity.leaves_of(case)
    tensors = {name: parity.tensor(name, leaf.torch_shape) for name, leaf in leaves.items()}
    return import_torch.from_state_dict(tensors, parity.shapes_of(case), np.float64)


def drop_alike():
    """Make dropout and stochastic depth keep what ``parity.kept`` says, in order of their calls."""
    calls = itertools.count()

    def drop(run, args, kwargs, context):
        part = context.module
        if not isinstance(part, layers.Dropout) or part.rate == 0:
            return run(*args, **kwargs)
        x, train = args
        assert train
        shape = x.shape[:1] + (1,) * (x.ndim - 1) if part.whole_images else x.shape
        return x * parity.kept(next(calls), shape) / (1 - part.rate)

    return nn.intercept_methods(drop)


def run(case, function, *args):
    """Run a function once: compile fast, not well, where there is little to compute."""
    options = None if case.depth == case.width == 1 else FAST
    return jax.jit(function, compiler_options=options)(*args)


def outputs(case):
    """The same outputs by the same names as ``torch_networks.outputs``."""
    with jax.enable_x64(True):
        module, variables = parity.module_of(case), variables_of(case)
        images_BHWC, labels_B = parity.batch(case)
        first_bn = ARCHITECTURES[case.architecture].first_bn

        def objective(images_BHWC, variables):
            logits_BK, sown = module.apply(variables, images_BHWC, mutable=["bn_statistics"])
            loss, moments = losses.cross_entropy(logits_BK, labels_B), sown.get("bn_statistics", {})
            if moments:
                loss += parity.ALPHA_BN * statistics.alignment(
                    statistics.by_layer(moments),
                    statistics.by_layer(variables["batch_stats"]),
                    first=first_bn,
                    first_multiplier=parity.FIRST_BN,
                )
            return loss, (logits_BK, moments)

        def by_pixels(images_BHWC, variables):
            frozen = layers.freeze(variables)
            return jax.value_and_grad(objective, has_aux=True)(images_BHWC, frozen)

        (_, (logits, moments)), pixels = run(case, by_pixels, images_BHWC, variables)
        found = {"logits": np.asarray(logits), "pixels": np.asarray(pixels)}
        found |= named("moments", {"batch_stats": moments})
        if case.train:

            def loss(params, batch_stats):
                with drop_alike():
                    logits_BK, updated = module.apply(
                        {"params": params, "batch_stats": batch_stats},
                        images_BHWC,
                        train=True,
                        mutable=["batch_stats"],
                    )
                return losses.cross_entropy(logits_BK, labels_B), updated

            gradient, updated = run(
                case,
                jax.grad(loss, has_aux=True),
                variables["params"],
                variables.get("batch_stats", {}),
            )
            found |= named("gradient", {"params": gradient}) | named("updated", updated)
        return found


def named(what, variables):
    tensors = import_torch.to_state_dict(variables)
    return {f"{what}.{name}": value for name, value in tensors.items()}


# Of a family whose members differ in width or in the number of blocks alone, one is compared in
# every run of the tests; what the others' numbers are, test_registry.py checks in all.
LIKE_ANOTHER = (
    "resnet34 resnet101 resnet32 resnet44 resnet56 wide_resnet50_2 shufflenet_v2_x1_0 "
    "shufflenet_v2_x2_0 mnasnet1_3 vit_small_patch16_224"
).split()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, marks=pytest.mark.slow if c.architecture in LIKE_ANOTHER else ())
        for c in parity.FAST
    ],
    ids=lambda case: case.name,
)
def test_shallow_networks_match_pytorch(case):
    assert parity.compare(case, outputs(case)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.SLOW, ids=lambda case: case.name)
def test_full_networks_match_pytorch(case):
    assert parity.compare(case, outputs(case)) == []


def test_every_architecture_has_a_case():
    published = {name for name, row in ARCHITECTURES.items() if row.weights}
    assert {case.architecture for case in parity.FAST} == published
    trained = {case.architecture for case in parity.FAST if case.train}
    assert trained == published
    compared = {ARCHITECTURES[c.architecture].family for c in parity.FAST
                if c.architecture not in LIKE_ANOTHER}  # fmt: skip
    assert compared == {row.family for row in ARCHITECTURES.values() if row.weights}
    small = {ARCHITECTURES[c.architecture].family for c in parity.FAST if c.stem == "small"}
    one_stem = {ARCHITECTURES[name].family for name in parity.CIFAR} | {"convnet"}
    assert {row.family for row in ARCHITECTURES.values() if row.weights} - small <= one_stem


# --- the twins: one operation is another, and the comparison sees it --------------------------


def other_epsilon(run, args, kwargs, context):
    part = context.module
    epsilon = part.epsilon
    object.__setattr__(part, "epsilon", 1.1 * epsilon)  # modules are frozen
    try:
        return run(*args, **kwargs)
    finally:
        object.__setattr__(part, "epsilon", epsilon)


def other_momentum(run, args, kwargs, context):
    part = context.module
    object.__setattr__(part, "momentum", 1.1 * part.momentum)
    return run(*args, **kwargs)


def padded_on_one_side(run, args, kwargs, context):
    """Two pixels in front and none behind, in place of one and one."""
    (x,) = args
    return run(jnp.pad(x[:, :-1, :-1], ((0, 0), (1, 0), (1, 0), (0, 0))))


def no_branch(run, args, kwargs, context):
    return jnp.zeros_like(run(*args, **kwargs))


# architecture: what is done to the layer of this name, or the function put in another's place.
MUTATIONS = {
    "resnet18": ("layer2.0.conv1", padded_on_one_side),
    "resnet50": ("layer2.0.downsample.1", no_branch),
    "wide_resnet50_2": ("layer3.0.bn2", other_epsilon),
    "resnet20": ("layer2.0.bn2", no_branch),
    "wrn_16_2": ("block2.layer.0.convShortcut", no_branch),
    "mobilenet_v2": ((nn, "relu6"), nn.relu),
    "shufflenet_v2_x0_5": ("stage3.0.branch1.3", no_branch),
    "efficientnet_b0": ("features.3.0.block.2.fc2", no_branch),
    "mnasnet1_0": ("layers.9.0.layers.4", other_momentum),
    "densenet121": ("features.denseblock2.denselayer1.conv2", padded_on_one_side),
    "vgg11_bn": ("features.5", other_epsilon),
    "regnet_y_8gf": ((nn, "relu"), nn.leaky_relu),
    "alexnet": ("features.3", padded_on_one_side),
    "vit_tiny_patch16_224": ((vit, "gelu"), nn.gelu),  # approximate
    "swin_tiny": ((swin, "MASKED"), -5.0),
    "convnext_tiny": ("features.3.0.block.0", padded_on_one_side),
    "convnet_d3": ("features.5", other_epsilon),
    "convnet_d3_bn": ("features.1", other_momentum),
    "convnet_d3_none": ("features.3", padded_on_one_side),
}


SLOW_TWINS = (
    "resnet18 resnet50 wide_resnet50_2 wrn_16_2 mobilenet_v2 efficientnet_b0 mnasnet1_0 "
    "densenet121 regnet_y_8gf"
).split()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(n, marks=pytest.mark.slow if n in SLOW_TWINS else ()) for n in MUTATIONS],
)
def test_another_operation_is_seen(architecture, monkeypatch):
    where, mutation = MUTATIONS[architecture]
    case = next(case for case in parity.FAST if case.architecture == architecture)
    reached = []

    def mutate(run, args, kwargs, context):
        if context.method_name != "__call__" or context.module.name != where:
            return run(*args, **kwargs)
        reached.append(where)
        return mutation(run, args, kwargs, context)

    if isinstance(where, tuple):
        monkeypatch.setattr(*where, mutation)
        reached.append(where)
    with nn.intercept_methods(mutate):
        off = parity.compare(case, outputs(case))
    assert reached
    expected = {"logits", "pixels", "gradient"}
    if ARCHITECTURES[architecture].batch_norms:
        expected |= {"moments", "updated"}
    if mutation is other_momentum:
        expected = {"updated"}
    assert {name.split(".")[0] for name in off} == expected


@pytest.mark.parametrize("case", parity.FAST, ids=lambda case: case.name)
def test_golden_files_are_what_pytorch_computes(case):
    reason = "needs torch, torchvision and timm; the golden files stand for them"
    torch_networks = pytest.importorskip(
        "models.torch_networks", reason=reason, exc_type=ImportError
    )
    assert parity.compare(case, torch_networks.outputs(case), 1e-10) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.SLOW, ids=lambda case: case.name)
def test_golden_files_of_full_networks_are_what_pytorch_computes(case):
    test_golden_files_are_what_pytorch_computes(case)
