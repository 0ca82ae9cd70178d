"""The benchmarks compare like with like: PyTorch's loops have our objective."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.command import ROOT

from prism_jax.core.pixels import IMAGENET
from prism_jax.models import build, import_torch, lookup
from prism_jax.synthesis import Recipe, Shown, teacher_gradient
from prism_jax.teachers import describe

torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
sys.path.append(str(ROOT / "benchmarks"))
import torch_peer  # noqa: E402

SIZE, CLASSES, BATCH = 32, 10, 4


def loop(names, *, released):
    torch.manual_seed(0)
    return torch_peer.Recover(
        names, batch=BATCH, size=SIZE, small_stem=True, released=released, roll=2, classes=CLASSES
    )


def loss_and_gradient(made, drawn):
    """Of the loop's first images, unviewed; the gradient as NHWC."""
    images = made.images.detach().clone().requires_grad_(True)
    loss = made.loss(images, drawn)
    (gradient,) = torch.autograd.grad(loss, images)
    return loss.item(), gradient.permute(0, 2, 3, 1).numpy()


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_the_released_structure_is_the_same_mathematics():
    names = ("resnet18", "shufflenet_v2_x0_5")
    fast, released = (loop(names, released=x) for x in (False, True))
    for drawn in ((0,), (0, 1)):
        ours, theirs = (loss_and_gradient(made, drawn) for made in (fast, released))
        assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
        assert distance(ours[1], theirs[1]) < 1e-2  # a ReLU may fall on either side of zero
    fast._teachers[0]._first = 1.0
    wrong = loss_and_gradient(fast, (0,))
    assert wrong[0] != pytest.approx(loss_and_gradient(released, (0,))[0], rel=1e-3)


@pytest.mark.parametrize("released", [False, True])
def test_an_iteration_moves_the_images_within_their_range(released):
    made = loop(("shufflenet_v2_x0_5",), released=released)
    before = made.images.detach().clone()
    made.step((0,))
    after = made.images.detach()
    low, high = torch_peer.valid_range("cpu")
    assert (after >= low).all() and (after <= high).all()
    inside = (before >= low) & (before <= high)
    assert (after - before)[inside].abs().max() < 0.051  # the learning rate
    assert (after != before).any()


def test_pytorch_and_the_engine_have_one_objective():
    made = loop(("resnet18",), released=False)
    module = build("resnet18", CLASSES, stem="small")
    shape = (SIZE, SIZE, 3)
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.float32))
    tensors = {k: v.numpy() for k, v in made._teachers[0].net.state_dict().items()}
    tensors = import_torch.rename(tensors, lookup("resnet18").weights)
    variables = import_torch.from_state_dict(tensors, like, np.float32)
    gradient = teacher_gradient(Recipe(), describe("resnet18", module, shape), IMAGENET)
    images = jnp.asarray(made.images.detach().permute(0, 2, 3, 1).numpy())
    shown = Shown(jnp.arange(BATCH) % CLASSES, jnp.float32(1), jnp.float32(1))
    quick = {"xla_backend_optimization_level": 0}
    read, _, ours = jax.jit(gradient, compiler_options=quick)(variables, images, shown, None)
    loss, theirs = loss_and_gradient(made, (0,))
    assert float(read["ce"] + 0.01 * read["bn"]) == pytest.approx(loss, rel=1e-4)
    assert distance(np.asarray(ours), theirs) < 1e-2
    made._teachers[0]._first = 1.0
    loss, theirs = loss_and_gradient(made, (0,))
    assert float(read["ce"] + 0.01 * read["bn"]) != pytest.approx(loss, rel=1e-3)
    assert distance(np.asarray(ours), theirs) > 1e-2
