"""Layers: every form of a convolution against lax, normalisation against its definition."""

from __future__ import annotations

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers.compiling import jit
from helpers.networks import TwoConvs, furthest, random_variables
from jax import lax

from prism_jax import parallel
from prism_jax.models import build, layers


@dataclasses.dataclass(frozen=True)
class Shape:
    """A convolution, and the forms a CPU should take: forward, input and kernel gradient."""

    map: tuple[int, int]
    kernel: int
    stride: int
    padding: int
    channels: tuple[int, int]
    groups: int
    forms: tuple[str, str, str]


STEPS = ("forward", "input_gradient", "kernel_gradient")
DENSE, TAPS = ("dense", "dense", "dense"), ("taps", "taps", "dense")
TWO_ROWS = ("two rows", "two rows", "dense")
SPLIT, DEPTHWISE, PRODUCT = ("split",) * 3, ("depthwise",) * 3, ("product",) * 3
SHAPES = [
    Shape((8, 8), 3, 1, 1, (4, 6), 1, DENSE),
    Shape((8, 9), 3, 2, 1, (4, 6), 1, DENSE),
    Shape((8, 8), 3, 1, 0, (4, 6), 1, DENSE),
    Shape((5, 5), 1, 1, 1, (4, 6), 1, DENSE),
    Shape((2, 2), 3, 1, 1, (4, 6), 1, TAPS),
    Shape((1, 1), 3, 1, 1, (4, 6), 1, TAPS),
    Shape((2, 3), 5, 2, 2, (4, 6), 1, TAPS),
    Shape((4, 4), 3, 2, 1, (4, 6), 1, ("dense", "taps", "dense")),
    Shape((9, 9), 7, 4, 2, (3, 4), 1, ("dense", "taps", "dense")),
    Shape((6, 6), 3, 1, 1, (4, 4), 4, DEPTHWISE),
    Shape((7, 6), 3, 2, 1, (4, 4), 4, DEPTHWISE),
    Shape((2, 1), 5, 1, 2, (4, 4), 4, DEPTHWISE),
    Shape((2, 2), 5, 2, 2, (4, 4), 4, DEPTHWISE),
    Shape((7, 7), 1, 2, 0, (4, 4), 4, DEPTHWISE),
    Shape((6, 6), 3, 2, 1, (4, 8), 2, SPLIT),
    Shape((2, 2), 3, 1, 1, (4, 8), 2, SPLIT),
    Shape((5, 5), 3, 1, 1, (4, 8), 4, ("lax",) * 3),
    Shape((28, 28), 3, 1, 1, (64, 64), 1, TWO_ROWS),
    Shape((29, 30), 3, 1, 1, (64, 65), 1, TWO_ROWS),
    Shape((29, 30), 3, 1, 0, (65, 64), 1, ("two rows", "dense", "dense")),
    Shape((28, 28), 3, 2, 1, (64, 64), 1, DENSE),
    Shape((28, 28), 3, 1, 1, (64, 63), 1, DENSE),
    Shape((7, 7), 1, 2, 0, (4, 6), 1, PRODUCT),
    Shape((5, 4), 1, 1, 0, (4, 6), 1, PRODUCT),
    Shape((9, 8), 4, 4, 0, (3, 6), 1, PRODUCT),
    Shape((9, 9), 7, 1, 3, (4, 4), 4, DEPTHWISE),
]


def arrays(shape, dtype=np.float64):
    draw = np.random.default_rng(0)
    inputs, features = shape.channels
    kernel = (shape.kernel, shape.kernel, inputs // shape.groups, features)
    x = draw.standard_normal((2, *shape.map, inputs))
    return x.astype(dtype), draw.standard_normal(kernel).astype(dtype)


def ours(shape, x, kernel):
    return layers.conv2d(x, kernel, stride=shape.stride, padding=shape.padding, groups=shape.groups)


def plain(shape, x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel,
        (shape.stride, shape.stride),
        [(shape.padding, shape.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups,
    )


@functools.partial(jit, static_argnums=(0, 1))
def passes(conv, shape, x, kernel):
    """Value, input gradient, kernel gradient."""
    y, pull = jax.vjp(functools.partial(conv, shape), x, kernel)
    return [y, *pull(jnp.cos(y))]


@functools.partial(jit, static_argnums=(0, 1))
def second_gradients(conv, shape, x, kernel):
    """Gradients of the size of both gradients: reverse over reverse."""

    def size(x, kernel):
        loss = lambda x, k: jnp.sum(jnp.sin(conv(shape, x, k)))  # noqa: E731
        return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, kernel))

    return jax.grad(size, (0, 1))(x, kernel)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_form_is_the_convolution(shape):
    with jax.enable_x64(True):
        x, kernel = arrays(shape)
        assert furthest(passes(ours, shape, x, kernel), passes(plain, shape, x, kernel)) < 1e-10


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 7, 10, 22, 24)], ids=str)
def test_gradients_have_gradients(shape):
    with jax.enable_x64(True):
        x, kernel = arrays(shape)
        ours_and_plain = (second_gradients(conv, shape, x, kernel) for conv in (ours, plain))
        assert furthest(*ours_and_plain) < 1e-9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_form_follows_the_shape(shape):
    x, kernel = arrays(shape, np.float32)
    spec = layers.Spec(x.shape, kernel.shape, shape.stride, shape.padding, shape.groups)
    chosen = tuple(layers.choose_form(step, spec, "cpu") for step in STEPS)
    assert chosen == shape.forms
    # A product whose rows a stride picks is what XLA:GPU cannot compile.
    point = shape.forms == PRODUCT and shape.stride == 1
    on_gpu, on_tpu = (
        {layers.choose_form(step, spec, platform) for step in STEPS} for platform in ("gpu", "tpu")
    )
    fused = shape.forms == DEPTHWISE and shape.kernel <= 5
    assert on_gpu == {"product" if point else "fused" if fused else "lax"}
    assert on_tpu == {"lax apart" if shape.groups == 1 else "lax"}


def test_every_form_is_tested():
    tested = {form for shape in SHAPES for form in shape.forms}
    assert tested | {"lax apart", "fused", "eights"} == set(layers.FORMS)


@pytest.fixture
def platform(request, monkeypatch):
    """Trace everything as for this platform."""
    monkeypatch.setattr(parallel, "platform", lambda: request.param)
    return request.param


everywhere = pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"], indirect=True)


@pytest.mark.parametrize("platform", ["tpu", "gpu"], indirect=True)
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 9, 10, 12, 14, 22, 23, 24)], ids=str)
def test_forms_of_other_platforms_are_the_convolution(shape, platform):
    with jax.enable_x64(True):
        x, kernel = arrays(shape)
        conv = lambda *args: ours(*args)  # noqa: E731 (a new function is traced anew)
        assert furthest(passes(conv, shape, x, kernel), passes(plain, shape, x, kernel)) < 1e-10
        twin = lambda shape, x, kernel: ours(shape, x, kernel[::-1] + 0.1)  # noqa: E731
        assert furthest(passes(twin, shape, x, kernel), passes(plain, shape, x, kernel)) > 1e-2


EIGHTS = {"groups": 16, "features": 16, "images": 97, "stride": 1}


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({}, "eights"),
        ({"images": 96}, "lax"),  # three quarters of 128
        ({"images": 128}, "eights"),
        ({"images": 192}, "lax"),
        ({"groups": 12, "features": 12}, "lax"),
        ({"groups": 32, "features": 32}, "eights"),
        ({"groups": 40, "features": 40}, "lax"),
        ({"groups": 232, "features": 232, "stride": 2}, "eights"),
        ({"groups": 240, "features": 240, "stride": 2}, "lax"),
        ({"features": 32}, "lax"),  # two of a channel
        ({"groups": 1}, "lax apart"),
    ],
    ids=str,
)
def test_a_tpu_takes_eight_channels_at_a_time_where_eight_are_a_tile(change, form):
    asked = EIGHTS | change
    x_shape = (asked["images"], 5, 4, 16 if asked["groups"] == 1 else asked["groups"])
    kernel = (3, 3, x_shape[-1] // asked["groups"], asked["features"])
    spec = layers.Spec(x_shape, kernel, asked["stride"], 1, asked["groups"])
    assert {layers.choose_form(step, spec, "tpu") for step in STEPS} == {form}


@pytest.mark.parametrize("platform", ["tpu"], indirect=True)
@pytest.mark.parametrize(
    "shape",
    [
        Shape((5, 4), 3, 1, 1, (16, 16), 16, DEPTHWISE),
        Shape((6, 7), 5, 2, 2, (24, 24), 24, DEPTHWISE),
        Shape((3, 2), 5, 1, 2, (8, 8), 8, DEPTHWISE),
    ],
    ids=str,
)
def test_eight_channels_at_a_time_are_the_depthwise_convolution(shape, platform, monkeypatch):
    with jax.enable_x64(True):
        draw = np.random.default_rng(0)
        x = draw.standard_normal((97, *shape.map, shape.groups))
        kernel = draw.standard_normal((shape.kernel, shape.kernel, 1, shape.groups))
        conv = lambda *args: ours(*args)  # noqa: E731 (a new function is traced anew)
        wanted = passes(plain, shape, x, kernel)
        assert furthest(passes(conv, shape, x, kernel), wanted) < 1e-10
        monkeypatch.setattr(
            layers.jnp, "eye", lambda n, dtype: jnp.roll(np.eye(n, dtype=dtype), 1, 0)
        )
        twin = lambda *args: ours(*args)  # noqa: E731
        assert furthest(passes(twin, shape, x, kernel), wanted) > 1e-2


def test_a_gpu_adds_the_products_of_bfloat16_in_float32():
    shape = Shape((14, 14), 5, 1, 2, (4, 4), 4, DEPTHWISE)
    x, kernel = map(jnp.asarray, arrays(shape, jnp.bfloat16))
    spec = layers.Spec(x.shape, kernel.shape, shape.stride, shape.padding, shape.groups)
    exact = plain(shape, x.astype(np.float32), kernel.astype(np.float32))
    with jax.disable_jit():  # a fusion may leave out the rounding
        wide, narrow = (layers.FORMS[f].forward(x, kernel, spec) for f in ("fused", "depthwise"))
    rounded, off, twin = (
        float(jnp.linalg.norm(y.astype(np.float32) - exact))
        for y in (exact.astype(jnp.bfloat16), wide, narrow)
    )
    assert wide.dtype == jnp.bfloat16 and off < 1.7 * rounded < twin / 1.5


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 4, 7, 10, 14)], ids=str)
def test_gradients_are_the_same_inside_a_loop(shape):
    with jax.enable_x64(True):
        x, kernel = arrays(shape)

        def descend(conv):
            def step(_, state):
                loss = lambda x, k: jnp.sum(jnp.sin(conv(shape, x, k)))  # noqa: E731
                return tuple(
                    a - 0.1 * g for a, g in zip(state, jax.grad(loss, (0, 1))(*state), strict=True)
                )

            return jit(lambda n, s: lax.fori_loop(0, n, step, s))(3, (x, kernel))

        assert furthest(descend(ours), descend(plain)) < 1e-10


PLAIN, TRANSPOSED = layers.FORMS["lax"], layers.FORMS["dense"].input_gradient


@pytest.mark.parametrize(
    ("form", "twin"),
    [
        ("dense", {"input_gradient": lambda dy, k, s: TRANSPOSED(dy, k[::-1, ::-1], s)}),
        ("taps", {"forward": lambda x, k, s: PLAIN.forward(x, k[::-1], s)}),
        ("two rows", {"forward": lambda x, k, s: PLAIN.forward(x[:, ::-1], k, s)}),
        ("product", {"input_gradient": lambda dy, k, s: PLAIN.input_gradient(-dy, k, s)}),
        ("depthwise", {"kernel_gradient": lambda x, dy, s: jnp.zeros(s.kernel_shape, x.dtype)}),
    ],
)
def test_a_broken_form_is_seen(form, twin, monkeypatch):
    shape = next(s for s in SHAPES if form in s.forms)
    with jax.enable_x64(True):
        x, kernel = arrays(shape)
        monkeypatch.setitem(layers.FORMS, form, layers.FORMS[form]._replace(**twin))
        broken = lambda *args: ours(*args)  # noqa: E731 (a new function is traced anew)
        found = passes(broken, shape, x, kernel)
        assert furthest(found, passes(plain, shape, x, kernel)) > 1e-2


@pytest.mark.parametrize("shape", [s for s in SHAPES if s.kernel > 1], ids=str)
def test_kernels_flipped_before(shape):
    """The input's gradient is the same bits; a wrong flipped kernel is seen where it is read."""
    x, kernel = arrays(shape, np.float32)

    def gradient(flipped):
        options = {"stride": shape.stride, "padding": shape.padding, "groups": shape.groups}
        conv = lambda x: jnp.sum(jnp.sin(layers.conv2d(x, kernel, flipped_HWOI=flipped, **options)))  # noqa: E731
        return jax.jit(jax.grad(conv))(x)

    plain_BHWC = gradient(None)
    flipped_HWOI = jit(layers.flip)(kernel)
    np.testing.assert_array_equal(gradient(flipped_HWOI), plain_BHWC)
    read = shape.forms[1] in ("dense", "two rows")
    assert read != np.array_equal(gradient(-np.asarray(flipped_HWOI)), plain_BHWC)


def test_a_frozen_network_gets_every_kernel_flipped_once(monkeypatch):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = layers.Conv(4, 3, padding=1, name="wide")(x)
            return layers.Conv(5, 1, name="point")(x)

    x = jnp.ones((1, 6, 6, 3))
    variables = Two().init(jax.random.key(0), x)
    prepared = layers.freeze(variables)
    ((path, flipped_HWOI),) = jax.tree_util.tree_leaves_with_path(prepared["flipped"])
    assert "wide" in jax.tree_util.keystr(path)
    kernel_HWIO = np.asarray(variables["params"]["wide"]["kernel"])
    np.testing.assert_array_equal(flipped_HWOI[0, 2], kernel_HWIO[2, 0].T)
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    assert not layers.freeze(variables)["flipped"]  # nothing there reads it
    monkeypatch.undo()
    gradient = lambda v: jax.grad(lambda x: jnp.sum(jnp.sin(Two().apply(v, x))))(x)  # noqa: E731
    np.testing.assert_array_equal(gradient(prepared), gradient(variables))
    broken = {**prepared, "flipped": jax.tree.map(jnp.negative, prepared["flipped"])}
    assert not np.allclose(gradient(broken), gradient(variables))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_forms_keep_the_dtype(dtype, tolerance):
    for shape in (SHAPES[i] for i in (0, 4, 7, 10, 14)):
        x, kernel = arrays(shape, dtype)
        y = jit(ours, static_argnums=0)(shape, x, kernel)
        assert y.dtype == dtype
        exact = jit(plain, static_argnums=0)(shape, *map(np.float32, (x, kernel)))
        assert furthest([np.float32(y)], [exact]) < tolerance * float(np.max(np.abs(exact)))


@everywhere
@pytest.mark.parametrize(
    ("shape", "plain_on"), [(SHAPES[9], {"tpu"}), (SHAPES[14], {"tpu", "gpu"})]
)
def test_other_platforms_keep_the_plain_convolution(shape, plain_on, platform):
    lowered = jax.jit(functools.partial(ours, shape)).lower(*arrays(shape, np.float32))
    groups = f"feature_group_count = {shape.groups}"
    assert (groups in lowered.as_text()) == (platform in plain_on)


@everywhere
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])  # max pooling; depthwise, products
def test_the_forms_of_other_platforms_are_not_traced(name, platform):
    network = build(name, 10, depth=0.25)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x)

    def energy(variables, x):
        variables = layers.freeze(variables)
        logits_BK, told = network.apply(variables, x, mutable=["bn_statistics"])
        moments = jax.tree.leaves(layers.whole_statistics(told["bn_statistics"]))
        return logits_BK.sum() + sum(leaf.sum() for leaf in moments)

    assert not choices(jax.make_jaxpr(jax.grad(energy, 1))(variables, x))
    twin = lambda x: lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos)  # noqa: E731
    assert choices(jax.make_jaxpr(twin)(x))


def choices(jaxpr) -> list[str]:
    """What is left to be chosen by the platform when a program is lowered."""
    return re.findall("platform_index", str(jaxpr))


class Norm(nn.Module):
    """A BatchNorm by name, as networks have it."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC, train=False):
        return layers.BatchNorm(dtype=self.dtype, name="bn")(x_BHWC, train)


def norm_variables():
    return {
        "params": {"bn": {"scale": jnp.float32([2, 3]), "bias": jnp.float32([1, -1])}},
        "batch_stats": {"bn": {"mean": jnp.float32([0.5, 0]), "var": jnp.float32([4, 9])}},
    }


# Channel means 2 and 10; biased variances 2.5 and 50; unbiased ones 10/3 and 200/3.
FOUR_PIXELS = jnp.float32([[[[0, 0], [4, 20]], [[2, 10], [2, 10]]]]) + jnp.float32(
    [[[[0, 0], [0, 0]], [[1, 0], [-1, 0]]]]
)


def test_evaluation_normalises_with_running_statistics():
    y = Norm().apply(norm_variables(), FOUR_PIXELS)
    expected = (
        (FOUR_PIXELS - np.array([0.5, 0])) / np.sqrt(np.array([4, 9]) + 1e-5) * np.array([2, 3])
    )
    np.testing.assert_allclose(y, expected + np.array([1, -1]), rtol=1e-6)


def test_moments_of_the_input_are_told_when_asked_for():
    variables = norm_variables()
    _, told = Norm().apply(variables, FOUR_PIXELS, mutable=["bn_statistics"])
    shape_of = jax.tree.structure
    assert shape_of(told["bn_statistics"]) == shape_of(variables["batch_stats"])
    moments = told["bn_statistics"]["bn"]
    np.testing.assert_allclose(moments["mean"], [2, 10], rtol=1e-6)
    np.testing.assert_allclose(moments["var"], [2.5, 50], rtol=1e-6)  # biased
    assert not np.allclose(moments["var"], [10 / 3, 200 / 3], rtol=1e-2)


def test_moments_cost_nothing_when_nobody_asks():
    text = str(jax.make_jaxpr(lambda x: Norm().apply(norm_variables(), x))(FOUR_PIXELS))
    assert "reduce_sum" not in text
    asked = lambda x: Norm().apply(norm_variables(), x, mutable=["bn_statistics"])  # noqa: E731
    assert "reduce_sum" in str(jax.make_jaxpr(asked)(FOUR_PIXELS))


def test_initialising_leaves_no_moments_behind():
    assert set(Norm().init(jax.random.key(0), FOUR_PIXELS)) == {"params", "batch_stats"}


def test_training_updates_running_statistics_as_pytorch_does():
    y, updated = Norm().apply(norm_variables(), FOUR_PIXELS, train=True, mutable=["batch_stats"])
    running = updated["batch_stats"]["bn"]
    np.testing.assert_allclose(running["mean"], [0.9 * 0.5 + 0.2, 1.0], rtol=1e-6)
    np.testing.assert_allclose(running["var"], [3.6 + 1 / 3, 8.1 + 20 / 3], rtol=1e-6)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), [1, -1], atol=1e-6)
    np.testing.assert_allclose(jnp.var(y, (0, 1, 2)), [4, 9], rtol=1e-4)


def test_training_leaves_fixed_statistics_alone():
    y = Norm().apply(norm_variables(), FOUR_PIXELS, train=True)
    np.testing.assert_allclose(jnp.mean(y, (0, 1, 2)), [1, -1], atol=1e-6)


# --- BatchNorm groups ---


def groups_by_numpy(images, groups, *, order=None):
    """Group after group through PyTorch's update, in float64: outputs and running statistics."""
    v = norm_variables()
    scale, bias = (np.asarray(v["params"]["bn"][k], np.float64) for k in ("scale", "bias"))
    mean, var = (np.asarray(v["batch_stats"]["bn"][k], np.float64) for k in ("mean", "var"))
    parts, outputs = np.split(images.astype(np.float64), np.cumsum(groups)[:-1]), []
    for x in parts:
        centred = x - x.mean((0, 1, 2))
        outputs.append(centred / np.sqrt((centred**2).mean((0, 1, 2)) + 1e-5) * scale + bias)
    for x in [parts[i] for i in order or range(len(parts))]:
        mean = 0.9 * mean + 0.1 * x.mean((0, 1, 2))
        var = 0.9 * var + 0.1 * x.var((0, 1, 2), ddof=1)
    return np.concatenate(outputs), mean, var


def groups_by_layer(images, groups):
    part = layers.BatchPart(groups, 0, len(images))
    apply = jit(Norm().apply, static_argnames=("train", "mutable"))
    with layers.part_of_batch(part):
        y, updated = apply(norm_variables(), images, train=True, mutable=("batch_stats",))
    return y, updated["batch_stats"]["bn"]["mean"], updated["batch_stats"]["bn"]["var"]


@pytest.mark.parametrize("groups", [(3, 3, 3), (4, 3, 2), (9,), (8, 1)])
def test_each_group_is_normalised_by_itself_and_taken_up_in_order(groups):
    random = np.random.default_rng(0)
    images = random.normal(3, 2, (9, 2, 3, 2)) * np.arange(1, 10)[:, None, None, None]
    found = groups_by_layer(images.astype(np.float32), groups)
    assert furthest(found, groups_by_numpy(images, groups)) < 2e-4 * np.abs(images).max()
    if len(groups) > 1:  # twins: one group for all; the last group first
        assert furthest(found, groups_by_numpy(images, (9,))) > 0.1
        backwards = list(range(len(groups)))[::-1]
        assert furthest(found, groups_by_numpy(images, groups, order=backwards)) > 0.1


def test_groups_leave_fixed_statistics_and_evaluation_alone():
    images = np.random.default_rng(0).normal(size=(4, 2, 2, 2)).astype(np.float32)
    with layers.part_of_batch(layers.BatchPart((2, 2), 0, 4)):
        fixed = Norm().apply(norm_variables(), images, train=True)
        evaluated = Norm().apply(norm_variables(), images)
    assert furthest([fixed], groups_by_numpy(images, (2, 2))[:1]) < 1e-5
    np.testing.assert_array_equal(evaluated, Norm().apply(norm_variables(), images))


def test_groups_that_are_not_the_batch_are_a_mistake():
    with pytest.raises(AssertionError):
        groups_by_layer(np.zeros((5, 2, 2, 2), np.float32), (2, 2))


@pytest.mark.parametrize("mean", [0, 10, 100])
def test_moments_of_channels_far_from_zero(mean):
    """float32, standard deviation 1: the variance loses digits as (mean / std)^2, no more."""
    exact = np.random.default_rng(0).normal(mean, 1, (8, 16, 16, 64))
    x = jnp.asarray(exact, jnp.float32)
    var_C = np.asarray(x, np.float64).var((0, 1, 2))
    bound = 1e-6 * (1 + mean**2)
    error = lambda x: np.abs(layers.moments(x)[1] / var_C - 1).max()  # noqa: E731
    assert error(x) < bound
    assert error(x.astype(jnp.bfloat16).astype(jnp.float32)) > bound


@everywhere
def test_gradients_of_moments(platform):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (2, 3, 3, 2)))

        def distance(moments):
            mean_C, var_C = moments
            return jnp.linalg.norm(mean_C - 1.0) + jnp.linalg.norm(var_C - 2.0)

        one_pass = jit(jax.grad(lambda x: distance(layers.moments(x))))(x)
        two_pass = jit(jax.grad(lambda x: distance((x.mean((0, 1, 2)), x.var((0, 1, 2))))))(x)
        np.testing.assert_allclose(one_pass, two_pass, rtol=1e-12)


@pytest.mark.parametrize("form", layers.MEANS)
def test_every_form_of_the_means(form):
    x = np.random.default_rng(0).normal(3, 2, (3, 4, 5, 6))
    both = [x.mean((0, 1, 2)), (x**2).mean((0, 1, 2))]
    assert furthest(layers.MEANS[form](jnp.asarray(x, jnp.float32)), both) < 1e-4
    assert furthest(layers.MEANS[form](jnp.asarray(-x, jnp.float32)), both) > 1


@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_a_frozen_norm_is_folded_once(platform):
    frozen = layers.freeze(norm_variables())
    y = Norm().apply(norm_variables(), FOUR_PIXELS)
    np.testing.assert_array_equal(Norm().apply(frozen, FOUR_PIXELS), y)
    other = {**frozen, "folded": jax.tree.map(jnp.negative, frozen["folded"])}
    np.testing.assert_array_equal(Norm().apply(other, FOUR_PIXELS), -y)  # it is what is read
    # A batch's own statistics and another epsilon are not what was folded.
    trained = Norm().apply(norm_variables(), FOUR_PIXELS, train=True)
    np.testing.assert_array_equal(Norm().apply(other, FOUR_PIXELS, train=True), trained)
    wide = layers.BatchNorm(epsilon=1.0, name=None)
    bare = {kind: tree["bn"] for kind, tree in other.items() if tree}
    plain_norm = {kind: tree["bn"] for kind, tree in norm_variables().items()}
    np.testing.assert_array_equal(
        wide.apply(bare, FOUR_PIXELS), wide.apply(plain_norm, FOUR_PIXELS)
    )


def test_moments_of_bfloat16_are_float32():
    network = Norm(dtype=jnp.bfloat16)
    x = FOUR_PIXELS.astype(jnp.bfloat16)
    y, told = network.apply(norm_variables(), x, mutable=["bn_statistics"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(told)} == {np.dtype(np.float32)}


def test_the_sums_that_a_gpu_is_told_make_the_moments(monkeypatch):
    with jax.enable_x64(True):
        module = TwoConvs(dtype=jnp.float64)
        frozen = layers.freeze(random_variables(module, (9, 8, 3), 0))
        x = np.random.default_rng(1).normal(1, 2, (4, 9, 8, 3))

        def told(x):
            logits, sown = module.apply(frozen, x, mutable=["bn_statistics"])
            return logits, layers.whole_statistics(sown["bn_statistics"])

        def energy(x):
            leaves = jax.tree.leaves(told(x))
            return sum(jnp.linalg.norm(leaf - 0.1 * i) for i, leaf in enumerate(leaves))

        def passes():
            energy_again = lambda x: energy(x)  # noqa: E731 (a new function is traced anew)
            return told(x), jit(jax.grad(energy_again))(x)

        wanted = passes()
        monkeypatch.setattr(parallel, "platform", lambda: "gpu")
        found = passes()
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        assert furthest(found, wanted) < 1e-5  # shares of pixels are float32
        whole, last = layers.whole_statistics, ("bn2", "share")

        def miscounted(told):
            flat = traverse_util.flatten_dict(told)
            return whole(traverse_util.unflatten_dict({**flat, last: 1.1 * flat[last]}))

        monkeypatch.setattr(layers, "whole_statistics", miscounted)
        assert furthest(passes(), wanted) > 1e-2  # twin


class Odd(nn.Module):
    """BatchNorms as networks of others have them: of vectors, of tokens, in parts, recomputed."""

    @nn.compact
    def __call__(self, x_BHWC):
        norm = layers.BatchNorm
        parts = jnp.concatenate(jnp.split(x_BHWC, 2, axis=1))  # twice the images
        parts = nn.silu(norm(name="parts")(parts))
        tokens = jnp.concatenate(jnp.split(parts, 2), axis=1).reshape(len(x_BHWC), -1, 4)
        tokens = nn.remat(norm)(name="again")(norm(name="tokens")(tokens))
        return norm(name="vectors")(nn.silu(tokens).sum(1))


def test_sums_are_told_of_any_network(monkeypatch):
    module, x = Odd(), np.float32(np.random.default_rng(1).normal(1, 2, (6, 4, 3, 4)))
    frozen = layers.freeze(random_variables(module, x.shape[1:], 0))

    def told(x):
        _, sown = module.apply(frozen, x, mutable=["bn_statistics"])
        return layers.whole_statistics(sown["bn_statistics"])

    wanted = told(x)
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    found = told(x)
    assert jax.tree.structure(found) == jax.tree.structure(wanted) and len(wanted) == 4
    assert furthest(found, wanted) < 1e-5


def test_a_network_that_is_not_frozen_tells_moments_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    module = TwoConvs()
    variables = random_variables(module, (9, 8, 3), 0)
    _, sown = module.apply(variables, jnp.ones((2, 9, 8, 3)), mutable=["bn_statistics"])
    assert {name for layer in sown["bn_statistics"].values() for name in layer} == {"mean", "var"}


def test_parameters_are_converted_once():
    module, x = TwoConvs(dtype=jnp.bfloat16), np.random.default_rng(1).normal(1, 2, (4, 9, 8, 3))
    variables = random_variables(module, (9, 8, 3), 0)
    plain = layers.freeze(variables)
    frozen = layers.freeze(variables, jnp.bfloat16)
    assert "converted" not in plain and "converted" not in layers.freeze(variables, jnp.float32)
    run = jit(lambda variables: module.apply(variables, x))
    np.testing.assert_array_equal(run(frozen), run(plain))
    kernels = f"{jax.make_jaxpr(lambda v: module.apply(v, x))(frozen)}"
    assert "f32[3,3,3,4]" in kernels  # the argument, which nothing reads
    assert "bf16[3,3,3,4] = convert_element_type" not in kernels
    # Twin: what was converted is what is read.
    frozen["converted"] = jax.tree.map(lambda leaf: 2 * leaf, frozen["converted"])
    assert furthest([run(frozen)], [run(plain)]) > 0.1
    # A layer that computes in another type than its network keeps its own parameters.
    frozen["converted"] = jax.tree.map(jnp.float16, frozen["converted"])
    np.testing.assert_array_equal(run(frozen), run(plain))


def test_max_pool_pads_with_minus_infinity():
    x = -jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    pooled = layers.max_pool(x, 3, 2, 1)
    np.testing.assert_array_equal(pooled[0, :, :, 0], [[-1, -2], [-4, -5]])
    reference = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    np.testing.assert_array_equal(pooled, reference)


@everywhere
def test_max_pool_gradient_goes_to_the_maximum(platform):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 7, 3)), jnp.float32)
    gradient = lambda pool: jit(jax.grad(lambda x: jnp.sum(jnp.sin(pool(x)))))(x)  # noqa: E731
    np.testing.assert_allclose(
        gradient(lambda x: layers.max_pool(x, 3, 2)),
        gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2))),
        rtol=1e-6,
    )


@everywhere
def test_max_pool_gradient_goes_to_the_first_where_maxima_tie(platform):
    """As PyTorch's does."""
    x = np.float32([[0, 2, 2], [1, 2, 0], [0, 0, 3]])[None, :, :, None]
    weights = np.float32([[6, 5], [3, 4]])[..., None]
    found = jit(jax.grad(lambda x: jnp.sum(layers.max_pool(x, 2, 1) * weights)))(x)
    # Windows, of weights 6, 5, 3, 4: {0 2 1 2}, {2 2 2 0}, {1 2 0 0}, {2 0 0 3}.
    np.testing.assert_allclose(found[0, :, :, 0], [[0, 11, 0], [0, 3, 0], [0, 0, 4]])


@pytest.mark.parametrize(
    ("size", "stride", "padding", "map_"),
    [
        (3, 2, 1, (8, 9)), (3, 2, 0, (7, 8)), (2, 2, 0, (9, 8)), (3, 1, 1, (5, 6)),
        (5, 2, 2, (11, 10)), (3, 3, 1, (8, 9)), (2, 3, 0, (8, 9)),
    ],
)  # fmt: skip
def test_gradients_of_max_pool_in_every_form_by_hand(size, stride, padding, map_):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 4, (2, *map_, 3)).astype(np.float32)  # many ties
    place = {"size": size, "stride": stride, "padding": padding}
    first = jit(functools.partial(layers._first, **place))(x)
    dy = draw.standard_normal(first.shape).astype(np.float32)
    padded = np.pad(x, [(0, 0), *[(padding, padding)] * 2, (0, 0)], constant_values=-np.inf)
    wanted = np.zeros_like(padded)
    for b, i, j, c in np.ndindex(dy.shape):
        at = (slice(i * stride, i * stride + size), slice(j * stride, j * stride + size))
        row, column = divmod(padded[b, *at, c].argmax(), size)
        wanted[b, i * stride + row, j * stride + column, c] += dy[b, i, j, c]
    wanted = wanted[:, padding : padding + map_[0], padding : padding + map_[1]]
    for form in (layers._pool_gradient_by_gather, layers._pool_gradient_by_phases):
        gradient = jit(functools.partial(form, sizes=map_, **place))
        np.testing.assert_allclose(gradient(first, dy), wanted, atol=1e-6)
        assert furthest([gradient(first, np.roll(dy, 1, 1))], [wanted]) > 0.1  # twin
        assert furthest([gradient((first + 1) % size**2, dy)], [wanted]) > 0.1  # twin


def test_a_window_whose_values_are_rounded_anew_keeps_its_gradient():
    """Twice computed, a map need not have the same last bits: then no value equals the maximum."""
    x = np.random.default_rng(0).normal(size=(2, 7, 7, 3)).astype(np.float32)
    noise = 1 + 1e-6 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    first = jit(lambda x: layers._first(x, 3, 2, 0))
    np.testing.assert_array_equal(first(x * noise), first(x))
    y = jit(lambda x: layers.max_pool(x, 3, 2))(x)
    kept = [w == y for _, w in layers._windows(x * noise, (3, 3), 2, 0, fill=-np.inf)]
    assert np.mean(np.any(kept, 0)) < 0.5  # the twin: found by equality, they lose it


def test_average_pools():
    x = jnp.arange(25.0).reshape(1, 5, 5, 1)
    np.testing.assert_allclose(layers.avg_pool(x, 2)[0, :, :, 0], [[3, 5], [13, 15]])
    # Cells of an adaptive pooling from 5 to 2 rows overlap: 0 to 2 and 2 to 4.
    np.testing.assert_allclose(layers.adaptive_avg_pool(x, 2)[0, :, :, 0], [[6, 8], [16, 18]], 1e-6)
    np.testing.assert_allclose(layers.global_avg_pool(x), [[12]])


def test_flatten_has_pytorch_s_order():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)
    np.testing.assert_array_equal(layers.flatten(x), [[0, 2, 4, 6, 1, 3, 5, 7]])


def drop(module, x, seed=0, train=True):
    return module.apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    x = jnp.ones((100, 100))
    dropped = drop(layers.Dropout(0.2), x)
    assert set(np.unique(dropped)) == {0.0, 1.25}
    assert abs(float(dropped.mean()) - 1) < 0.02
    np.testing.assert_array_equal(drop(layers.Dropout(0.2), x, train=False), x)
    with jax.enable_x64(True):  # the draw names its dtype
        np.testing.assert_array_equal(drop(layers.Dropout(0.2), x), dropped)


def test_stochastic_depth_drops_whole_images():
    dropped = np.asarray(drop(layers.Dropout(0.5, whole_images=True), jnp.ones((64, 3, 3, 2))))
    per_image = dropped.reshape(64, -1)
    assert np.all(per_image == per_image[:, :1])
    assert set(per_image[:, 0]) == {0.0, 2.0}


@pytest.mark.parametrize("whole_images", [True, False])
def test_a_pass_drops_its_own_rows_of_the_batch_s_mask(whole_images):
    module, x = layers.Dropout(0.5, whole_images=whole_images), jnp.ones((12, 5, 4))
    whole = drop(module, x)
    for first, last in ((0, 12), (0, 4), (4, 12), (7, 8)):
        with layers.part_of_batch(layers.BatchPart((last - first,), first, 12)):
            np.testing.assert_array_equal(drop(module, x[first:last]), whole[first:last])
    # Twin: a mask of the pass's own.
    assert not np.array_equal(drop(module, x[4:]), whole[4:])


def test_scaling():
    assert layers.scale_channels(116, 1.0) == 116
    assert [layers.scale_channels(64, w) for w in (0.01, 0.25, 0.5, 2)] == [8, 16, 32, 128]
    assert [layers.scale_blocks(4, d) for d in (0.01, 0.5, 1, 2)] == [1, 2, 4, 8]


@pytest.mark.parametrize(("read", "again"), [(layers.parameter, 0), (nn.Module.param, 1)])
def test_a_parameter_that_is_there_is_not_initialised_again(read, again):
    calls = []

    def init(key, shape, dtype):
        calls.append(key)
        return jax.random.normal(key, shape, dtype)

    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            return read(self, "weight", init, (3,), jnp.float32)

    value, variables = Net().init_with_output(jax.random.key(0))
    calls.clear()
    np.testing.assert_array_equal(Net().apply(variables), value)
    assert len(calls) == again


def test_a_parameter_of_another_shape():
    class Net(nn.Module):
        @nn.compact
        def __call__(self):
            return layers.parameter(self, "weight", nn.initializers.ones, (3,), jnp.float32)

    with pytest.raises(ValueError, match=r"weight has shape \(2,\); its layer needs \(3,\)"):
        Net().apply({"params": {"weight": jnp.ones(2)}})
