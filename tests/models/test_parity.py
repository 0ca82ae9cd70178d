"""Every architecture against its published PyTorch implementation, in float64.

The golden files hold what PyTorch computed; where it is installed, they are checked too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import parity

from prism_jax.models import ARCHITECTURES, build, convnet, import_torch, layers


def variables_of(module, case):
    """The case's weights, in float64."""
    size = case.image_size
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    )
    leaves = import_torch.torch_leaves(shapes)
    tensors = {name: parity.tensor(name, leaf.torch_shape) for name, leaf in leaves.items()}
    return import_torch.from_state_dict(tensors, shapes, np.float64)


def without_chance(module):
    """The module without dropout and stochastic depth."""
    rates = {"dropout", "stochastic_depth"} & set(module.__dataclass_fields__)
    return module.clone(**dict.fromkeys(rates, 0.0))


def outputs(case, module=None):
    """The same outputs by the same names as ``torch_networks.outputs``."""
    with jax.enable_x64(True):
        if module is None:
            module = build(case.architecture, case.num_classes, depth=case.depth, dtype=jnp.float64)
        module = without_chance(module)
        variables = variables_of(module, case)
        images_BHWC, labels_B = parity.batch(case)

        def objective(images_BHWC, variables):
            logits_BK, sown = module.apply(variables, images_BHWC, mutable=["bn_statistics"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B).mean()
            moments = sown.get("bn_statistics", {})
            running = variables.get("batch_stats", {})
            gaps = jax.tree.map(lambda a, b: jnp.linalg.norm(a - b), moments, running)
            return loss + 0.01 * sum(jax.tree.leaves(gaps)), (logits_BK, moments)

        (_, (logits, moments)), pixels = jax.jit(jax.value_and_grad(objective, has_aux=True))(
            images_BHWC, variables
        )
        found = {"logits": np.asarray(logits), "pixels": np.asarray(pixels)}
        moments = import_torch.to_state_dict({"batch_stats": moments})
        found |= {f"moments.{name}": value for name, value in moments.items()}
        if case.train:

            def loss(params, batch_stats):
                logits_BK, updated = module.apply(
                    {"params": params, "batch_stats": batch_stats},
                    images_BHWC,
                    train=True,
                    mutable=["batch_stats"],
                )
                ce = optax.softmax_cross_entropy_with_integer_labels(logits_BK, labels_B).mean()
                return ce, updated

            gradient, updated = jax.jit(jax.grad(loss, has_aux=True))(
                variables["params"], variables["batch_stats"]
            )
            gradient = import_torch.to_state_dict({"params": gradient})
            found |= {f"gradient.{name}": value for name, value in gradient.items()}
            updated = import_torch.to_state_dict(updated)
            found |= {f"updated.{name}": value for name, value in updated.items()}
        return found


# Shallow, but with linear layers of a hundred million weights, or twins of other cases.
LARGE = {"vgg11_bn", "alexnet", "wide_resnet50_2", "regnet_y_8gf", "convnet_d4_none"}
SHALLOW = [
    pytest.param(case, marks=pytest.mark.slow if case.architecture in LARGE else ())
    for case in parity.FAST
]


@pytest.mark.parametrize("case", SHALLOW, ids=lambda case: case.name)
def test_shallow_networks_match_pytorch(case):
    assert parity.compare(case, outputs(case)) == []


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.SLOW, ids=lambda case: case.name)
def test_full_networks_match_pytorch(case):
    assert parity.compare(case, outputs(case)) == []


def test_every_architecture_has_a_case():
    tested = {case.architecture for case in parity.FAST + parity.SLOW}
    convnets = {name for name in ARCHITECTURES if name.startswith("convnet_d")}
    assert set(ARCHITECTURES) - convnets <= tested


def test_another_epsilon_is_seen(monkeypatch):
    class Twin(layers.BatchNorm):
        epsilon: float = 1.1e-5

    monkeypatch.setitem(convnet.NORMS, "batch", Twin)
    case = next(case for case in parity.FAST if case.name == "convnet_d3_bn-full-16")
    off = parity.compare(case, outputs(case))
    assert "logits" in off and "pixels" in off and "gradient.classifier.weight" in off


@pytest.mark.slow
@pytest.mark.parametrize("case", parity.FAST, ids=lambda case: case.name)
def test_golden_files_are_what_pytorch_computes(case):
    pytest.importorskip("torch", reason="the golden files stand for PyTorch where it is missing")
    from models import torch_networks

    assert parity.compare(case, torch_networks.outputs(case), 1e-10) == []
