"""The stem by phases, as TPUs have it, against the one that every other platform has."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST_ALIKE
from helpers.networks import furthest, random_variables

from prism_jax import parallel
from prism_jax.models import build, layers, stem

jit = functools.partial(jax.jit, compiler_options=FAST_ALIKE)
TOLD = ["bn_statistics", "conv_inputs"]


class Stem(nn.Module):
    kernel: int
    features: int = 5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        return stem.conv_norm_pool(
            x, self.features, self.kernel, names=("conv1", "bn1"), train=train, dtype=self.dtype
        )


@pytest.fixture
def on_tpu(monkeypatch):
    """Take the forms of a TPU from here on, when called."""
    return lambda: monkeypatch.setattr(parallel, "platform", lambda: "tpu")


def variables_of(module, shape):
    """Of order one, every second scale of a BatchNorm below zero."""

    def signed(path, leaf):
        if path[-1].key != "scale":
            return leaf
        return leaf * np.where(np.arange(len(leaf)) % 2, -1, 1).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(signed, random_variables(module, shape[1:], 0))


def read(module, variables, x_BHWC):
    """Output, everything told, and the gradient of a function of all of it."""
    weights = np.random.default_rng(1).standard_normal(50_000).astype(np.float32)

    def energy(x_BHWC):
        y, told = module.apply(variables, x_BHWC, mutable=TOLD)
        leaves = [leaf.astype(jnp.float32) for leaf in (y, *jax.tree.leaves(told))]
        return sum(jnp.vdot(weights[: x.size], jnp.sin(x).ravel()) for x in leaves), (y, told)

    gradient, found = jit(jax.grad(energy, has_aux=True))(x_BHWC)
    return gradient, *found


SIZES = [(16, 20), (15, 18), (13, 17), (14, 11)]  # even and odd, before and after the convolution


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("size", SIZES)
def test_phases_are_the_whole(kernel, size, on_tpu):
    module = Stem(kernel)
    x = np.random.default_rng(2).standard_normal((3, *size, 3)).astype(np.float32)
    variables = variables_of(module, x.shape)
    variables["params"]["bn1"]["scale"][2] = 0.0
    assert variables["params"]["bn1"]["scale"].min() < 0
    frozen = layers.freeze(variables)
    wanted = read(module, frozen, x)
    on_tpu()
    found = read(module, frozen, x)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert furthest(found, wanted) < 2e-5
    assert furthest(read(module, layers.freeze(turned(variables)), x), wanted) > 0.1  # twin


def turned(variables):
    """Every scale of the other sign."""
    scales = {**variables["params"]["bn1"], "scale": -variables["params"]["bn1"]["scale"]}
    return {**variables, "params": {**variables["params"], "bn1": scales}}


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("size", [*SIZES, (3, 4)])
def test_phases_of_a_convolution_have_its_gradients(kernel, size):
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, weights = (
            draw.standard_normal((2, *size, 3)),
            draw.standard_normal((kernel, kernel, 3, 4)),
        )
        padding = (kernel - 1) // 2
        dy = draw.standard_normal((2, *(-(-side // 2) for side in size), 4))
        whole, gradients = pulled(
            lambda *given: layers.conv2d(*given, stride=2, padding=padding), dy, x, weights
        )
        by_phases = functools.partial(pulled, lambda *given: stem.convolve(*given, padding))
        maps, found = by_phases(phases(dy), x, weights)
        assert furthest(maps, phases(whole)) < 1e-12
        assert furthest(found, gradients) < 1e-11
        _, twin = by_phases(phases(np.roll(dy, 1, 1)), x, weights)
        assert furthest(twin, gradients) > 0.1


def test_bfloat16_gradients_of_phases_are_rounded_a_few_times():
    """The four of the images are added in bfloat16: twice the error of a whole convolution's."""
    draw = np.random.default_rng(0)
    x, weights = (
        draw.standard_normal(s).astype(np.float32) for s in ((2, 32, 32, 3), (7, 7, 3, 8))
    )
    dy = draw.standard_normal((2, 16, 16, 8)).astype(np.float32)

    def gradient(dtype, phased):
        x_, k, d = (jnp.asarray(a, jnp.bfloat16).astype(dtype) for a in (x, weights, dy))
        if phased:
            return pulled(lambda x: stem.convolve(x, k, 3), phases(d), x_)[1][0]
        return pulled(lambda x: layers.conv2d(x, k, stride=2, padding=3), d, x_)[1][0]

    exact = np.float64(gradient(jnp.float32, False))
    errors = [
        np.linalg.norm(np.float64(gradient(jnp.bfloat16, phased)) - exact) / np.linalg.norm(exact)
        for phased in (False, True)
    ]
    assert 1e-3 < errors[0] < 2e-3 and errors[1] < 4e-3, errors


@functools.partial(jit, static_argnums=0)
def pulled(function, dy, *given):
    """What a function gives, and the gradient of its product with ``dy`` by each argument."""
    y, pull_back = jax.vjp(function, *given)
    return y, pull_back(dy)


def phases(x_BHWC):
    return tuple(x_BHWC[:, i::2, j::2] for i, j in stem.PARITIES)


@pytest.mark.parametrize("swapped", [(0, 2, 1, 3), (3, 1, 2, 0)])
def test_a_swapped_phase_is_seen(swapped, on_tpu, monkeypatch):
    module, x = Stem(7), np.random.default_rng(2).standard_normal((3, 16, 16, 3))
    frozen = layers.freeze(variables_of(module, x.shape))
    wanted = read(module, frozen, x.astype(np.float32))
    on_tpu()
    whole = stem.convolve
    monkeypatch.setattr(stem, "convolve", lambda *given: tuple(whole(*given)[i] for i in swapped))
    assert furthest(read(module, frozen, x.astype(np.float32)), wanted) > 0.1


def test_bfloat16_is_rounded_alike(on_tpu):
    """Pooled before it is scaled or after: rounding keeps the order of two values."""
    module, x = (
        Stem(7, dtype=jnp.bfloat16),
        np.random.default_rng(2).standard_normal((3, 16, 16, 3)),
    )
    frozen = layers.freeze(variables_of(module, x.shape))
    _, wanted, told = read(module, frozen, x.astype(np.float32))
    on_tpu()
    _, found, told_by_phases = read(module, frozen, x.astype(np.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), np.float32(wanted), atol=0.05)
    assert furthest(told_by_phases, told) < 0.02


def test_the_first_of_equal_maxima_has_the_gradient():
    x = np.random.default_rng(0).integers(0, 3, (2, 9, 9, 3)).astype(np.float32)  # many ties
    dy = np.random.default_rng(1).standard_normal((2, 5, 5, 3)).astype(np.float32)
    wanted, padded = np.zeros_like(x), np.full((2, 11, 11, 3), -np.inf, np.float32)
    padded[:, 1:-1, 1:-1] = x
    for b, i, j, c in np.ndindex(dy.shape):
        row, column = divmod(padded[b, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c].argmax(), 3)
        wanted[b, 2 * i + row - 1, 2 * j + column - 1, c] += dy[b, i, j, c]
    pooled, found = pooled_by_phases(x, dy)
    np.testing.assert_array_equal(pooled, layers.max_pool(jnp.asarray(x), 3, 2, 1))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    turned = pooled_by_phases(x[:, ::-1, ::-1], dy[:, ::-1, ::-1])[1][:, ::-1, ::-1]
    assert furthest(turned, wanted) > 0.1  # twin: there the last of them is the first


def pooled_by_phases(x_BHWC, dy_BHWC):
    """The maxima and the gradient of a whole map."""
    pooled, gradients = pulled(
        lambda maps: stem.max_pool(maps, x_BHWC.shape[1:3]), dy_BHWC, phases(x_BHWC)
    )
    gradient = np.zeros_like(x_BHWC)
    for (i, j), part in zip(stem.PARITIES, *gradients, strict=True):
        gradient[:, i::2, j::2] = part
    return pooled, gradient


@pytest.mark.parametrize("frozen, train", [(False, False), (True, True)])
def test_what_is_not_frozen_has_the_stem_of_every_platform(frozen, train, on_tpu):
    module, x = Stem(7), np.random.default_rng(2).standard_normal((3, 16, 16, 3))
    variables = variables_of(module, x.shape)
    if frozen:
        variables = layers.freeze(variables)
    run = lambda: jit(  # noqa: E731
        lambda x: module.apply(variables, x, train, mutable=TOLD)
    )(x.astype(np.float32))
    wanted = run()
    on_tpu()
    assert furthest(run(), wanted) == 0.0


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "densenet121"])
def test_networks_are_the_same_by_phases(name, on_tpu):
    module = build(name, num_classes=3, width=0.25, depth=0.1)
    x = np.random.default_rng(2).standard_normal((2, 64, 64, 3)).astype(np.float32)
    frozen = layers.freeze(variables_of(module, x.shape))
    wanted = read(module, frozen, x)
    on_tpu()
    calls, whole = [], stem.convolve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stem, "convolve", lambda *given: calls.append(1) or whole(*given))
        found = read(module, frozen, x)
    assert calls
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    assert furthest(found, wanted) < 1e-4 * scale
