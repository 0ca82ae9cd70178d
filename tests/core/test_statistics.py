from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import FAST

from prism_jax.core import statistics
from prism_jax.core.statistics import alignment, by_layer, safe_norm
from prism_jax.errors import UserError

RUNNING = {
    "stem": {"mean": np.array([1.0, 2.0]), "var": np.array([1.0, 1.0])},
    "block": {"bn": {"mean": np.array([0.0, 0.0, 0.0]), "var": np.array([4.0, 4.0, 4.0])}},
}
BATCH = {
    "stem": {"mean": np.array([4.0, 6.0]), "var": np.array([1.0, 3.0])},
    "block": {"bn": {"mean": np.array([2.0, 3.0, 6.0]), "var": np.array([4.0, 1.0, 0.0])}},
}
# By hand: stem ||(3, 4)|| = 5 and ||(0, 2)|| = 2; block ||(2, 3, 6)|| = 7 and ||(0, 3, 4)|| = 5.


def layers32(tree):
    return by_layer(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))


def align(first=("stem",), **options):
    options = {"first_multiplier": 10.0, **options}
    return float(alignment(layers32(BATCH), layers32(RUNNING), first=first, **options))


def test_alignment_by_hand():
    assert align() == 10 * (5 + 2) + (7 + 5)
    assert align(first_multiplier=1.0) == 19
    assert align(variance_weight=2.0) == 10 * (5 + 4) + (7 + 10)
    assert align(variance_weight=0.0) == 10 * 5 + 7
    assert align(keep={("block", "bn"): jnp.asarray(False)}) == 10 * (5 + 2)
    assert align(keep={("block", "bn"): jnp.asarray(True)}) == align()


def test_distances_are_the_same_one_by_one_and_together():
    draw = np.random.default_rng(0)
    with jax.enable_x64(True):
        pairs = [tuple(jnp.asarray(draw.standard_normal((2, n)))) for n in (3, 7, 1, 7)]
        pairs.append((pairs[0][0], pairs[0][0]))  # the gradient of a distance of zero is zero

        def both(distances):
            weigh = lambda pairs: sum(i * d for i, d in enumerate(distances(pairs), 1))  # noqa: E731
            return [*distances(pairs), *jax.tree.leaves(jax.grad(weigh)(pairs))]

        together, one_by_one = both(statistics._together), both(statistics.distances)
        by_numpy = [np.linalg.norm(a - b) for a, b in pairs]
        np.testing.assert_allclose(together[: len(pairs)], by_numpy, rtol=1e-12)
        for this, that in zip(together, one_by_one, strict=True):
            np.testing.assert_allclose(this, that, rtol=1e-12)
        twin = both(lambda pairs: statistics._together([(b, 2 * a) for a, b in pairs]))
        assert not np.allclose(twin[0], together[0])


def test_twins_of_the_formula_give_other_numbers():
    squared = 10 * (25 + 4) + (49 + 25)
    per_channel = 10 * (5 + 2) / 2 + (7 + 5) / 3
    on_another_layer = align(first=("block", "bn"))
    assert on_another_layer == (5 + 2) + 10 * (7 + 5)
    for twin in (squared, per_channel, on_another_layer):
        assert twin != align()


def test_alignment_does_not_depend_on_the_order_of_keys():
    turned = layers32({name: RUNNING[name] for name in reversed(RUNNING)})
    value = alignment(layers32(BATCH), turned, first=("stem",), first_multiplier=10.0)
    assert float(value) == align()


def test_different_layers_are_an_error_that_names_them():
    only_stem = layers32({"stem": BATCH["stem"]})
    with pytest.raises(UserError, match="of block/bn in the batch"):
        alignment(only_stem, layers32(RUNNING), first=("stem",), first_multiplier=1.0)
    with pytest.raises(UserError, match="missing: var of stem in the batch"):
        no_var = {("stem",): {"mean": only_stem["stem",]["mean"]}}
        alignment(no_var, only_stem, first=("stem",), first_multiplier=1.0)


def test_a_first_layer_that_does_not_exist_is_an_error():
    with pytest.raises(UserError, match="no layer with statistics at block/missing"):
        align(first=("block", "missing"))
    with pytest.raises(UserError, match="stem"):
        align(first=("block",))


def test_scales_by_hand():
    options = {"first": ("stem",), "first_multiplier": 10.0}
    target = layers32(RUNNING)
    assert float(statistics.SCALES["layers"](target, **options)) == 11
    stem, block = np.sqrt(5) + np.sqrt(2), np.sqrt(48)
    found = statistics.SCALES["targets"](target, **options, variance_weight=1.0)
    np.testing.assert_allclose(found, 10 * stem + block, rtol=1e-6)


# --- value and gradient, in float64 -----------------------------------------------------------

# Four layers' inputs made from one map of pixels: two of a BatchNorm, two of a convolution.
MAPS = {
    ("a",): lambda x: x,
    ("b",): lambda x: x**2,
    ("conv1",): lambda x: x + 0.3 * x**2,
    ("conv2",): lambda x: x[:, ::2, ::2] ** 3,
}
CONVS = [path for path in MAPS if path[0].startswith("conv")]
PATCH = 4
OPTIONS = {"first": ("a",), "first_multiplier": 10.0, "variance_weight": 2.0}


def random_case():
    """Pixels (B, 6, 5, 4), random targets for every statistic, and per-class tables."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6, 5, 4))
    target = {}
    for path, inside in MAPS.items():
        rows, columns = inside(x).shape[1:3]
        patches = -(-rows // PATCH) * -(-columns // PATCH)
        sizes = {"mean": 4, "var": 4}
        if path in CONVS:
            sizes |= {"patch_mean": patches, "patch_var": patches}
        target[path] = {
            name: rng.uniform(0.5, 2, n) if "var" in name else rng.normal(size=n)
            for name, n in sizes.items()
        }
    per_class = {
        path: {name: rng.normal(size=(5, len(value))) for name, value in stats.items()}
        for path, stats in target.items()
    }
    return x, target, per_class


def by_package(x, target, *, memory=None, keep=None, moments=statistics.channel_moments):
    inputs = {path: inside(x) for path, inside in MAPS.items()}
    batch = {path: moments(y) for path, y in inputs.items()}
    for path, stats in statistics.of_inputs(
        {path: inputs[path] for path in CONVS}, ("patch",), patch=PATCH
    ).items():
        batch[path] |= stats
    if memory is not None:
        batch, memory = statistics.smooth(batch, memory, momentum=0.8, keep=keep)
    return alignment(batch, target, keep=keep, **OPTIONS), memory


package_says = jax.jit(by_package, compiler_options=FAST)
value_and_gradient = jax.jit(jax.value_and_grad(by_package, has_aux=True), compiler_options=FAST)


def enlarge(y, size):
    """Bilinear, pixel by pixel: position (i + 1/2) * source / size - 1/2, clamped to the map."""
    for axis, out in ((1, size[0]), (2, size[1])):
        source = y.shape[axis]
        at = [min(max((i + 0.5) * source / out - 0.5, 0), source - 1) for i in range(out)]
        low = [int(np.floor(p)) for p in at]
        share = np.array(at) - low
        share = share.reshape([-1 if a == axis else 1 for a in range(4)])
        high = np.minimum(np.array(low) + 1, source - 1)
        y = (1 - share) * np.take(y, low, axis) + share * np.take(y, high, axis)
    return y


def numpy_statistics(x, *, ddof=0, swap=False):
    """Every statistic in NumPy, patch by patch."""
    found = {}
    for path, inside in MAPS.items():
        y = inside(x)
        stats = {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2), ddof=ddof)}
        if path in CONVS:
            rows, columns = (-(-n // PATCH) for n in y.shape[1:3])
            big = enlarge(y, (rows * PATCH, columns * PATCH))
            cut = [
                big[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
                for i, j in itertools.product(range(rows), range(columns))
            ]
            stats["patch_mean"] = np.array([c.mean() for c in cut])
            stats["patch_var"] = np.array([c.var() for c in cut])
            if swap:
                swapped = stats["patch_var"], stats["patch_mean"]
                stats["patch_mean"], stats["patch_var"] = swapped
        found[path] = stats
    return found


def numpy_distance(batch, target, *, first=("a",), squared=False):
    total = 0.0
    for path, stats in batch.items():
        for name, value in stats.items():
            square = ((value - target[path][name]) ** 2).sum()
            far = square if squared else np.sqrt(square)
            total += (10 if path == first else 1) * (2 if "var" in name else 1) * far
    return total


def slope(function, x, way):
    return (function(x + 1e-6 * way) - function(x - 1e-6 * way)) / 2e-6


TWINS = {
    "unbiased": lambda x, t: numpy_distance(numpy_statistics(x, ddof=1), t),
    "squared": lambda x, t: numpy_distance(numpy_statistics(x), t, squared=True),
    "first on a convolution": lambda x, t: numpy_distance(numpy_statistics(x), t, first=("conv1",)),
    "patch mean and variance swapped": lambda x, t: numpy_distance(
        numpy_statistics(x, swap=True), t
    ),
}


def test_all_statistics_against_numpy_and_finite_differences():
    x, target, _ = random_case()

    def by_numpy(x):
        return numpy_distance(numpy_statistics(x), target)

    with jax.enable_x64(True):
        (value, _), gradient = value_and_gradient(x, target)
        assert value.dtype == jnp.float64
    way = np.random.default_rng(1).normal(size=x.shape)
    np.testing.assert_allclose(value, by_numpy(x), rtol=1e-13)
    np.testing.assert_allclose((np.asarray(gradient) * way).sum(), slope(by_numpy, x, way), 1e-7)
    for twin in TWINS.values():
        assert abs(twin(x, target) / by_numpy(x) - 1) > 1e-3


def test_all_statistics_against_torch_in_float64():
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    x, target, _ = random_case()
    x_torch = torch.tensor(x, requires_grad=True)
    total = 0.0
    for path, inside in MAPS.items():
        y = inside(x_torch)
        stats = {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2), unbiased=False)}
        if path in CONVS:
            size = [-(-n // PATCH) * PATCH for n in y.shape[1:3]]
            big = torch.nn.functional.interpolate(y.permute(0, 3, 1, 2), size, mode="bilinear")
            cut = big.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(2, 3, 0, 1, 4, 5)
            cut = cut.reshape(cut.shape[0] * cut.shape[1], -1)
            stats |= {"patch_mean": cut.mean(1), "patch_var": cut.var(1, unbiased=False)}
        for name, value in stats.items():
            term = torch.norm(torch.tensor(target[path][name]) - value, 2)
            total = total + (10 if path == ("a",) else 1) * (2 if "var" in name else 1) * term
    total.backward()
    with jax.enable_x64(True):
        (value, _), gradient = value_and_gradient(x, target)
    np.testing.assert_allclose(value, total.item(), rtol=1e-13)
    np.testing.assert_allclose(gradient, x_torch.grad.numpy(), rtol=1e-10, atol=1e-13)


def test_class_targets_are_the_mean_over_the_batch_s_classes():
    _, _, per_class = random_case()
    labels = np.array([4, 1, 4], np.int32)
    with jax.enable_x64(True):
        found = statistics.of_classes(per_class, labels)
    for path, stats in per_class.items():
        for name, table in stats.items():
            expected = (2 * table[4] + table[1]) / 3
            np.testing.assert_allclose(found[path][name], expected, rtol=1e-14)
            each_class_once = (table[4] + table[1]) / 2  # twin
            assert np.abs(expected - each_class_once).max() > 1e-3


# --- moving averages --------------------------------------------------------------------------


def numpy_average(history, *, from_zero, momentum=0.8):
    """The averages after a list of batches' statistics, statistic by statistic."""
    average = None
    for batch in history:
        if average is None:
            zero = {p: {n: 0 * v for n, v in s.items()} for p, s in batch.items()}
            average = zero if from_zero else batch
            if not from_zero:
                continue
        average = {
            path: {n: momentum * average[path][n] + (1 - momentum) * v for n, v in stats.items()}
            for path, stats in batch.items()
        }
    return average


@pytest.mark.parametrize("from_zero", [False, True])
def test_the_average_is_matched_in_value_and_the_batch_in_gradient(from_zero):
    x, target, _ = random_case()
    rng = np.random.default_rng(5)
    batches = [x + rng.normal(size=x.shape) for _ in range(4)]
    way = rng.normal(size=x.shape)
    with jax.enable_x64(True):
        wide = jax.tree.map(jnp.asarray, target)
        memory = statistics.Memory.blank(wide, from_zero=from_zero)
        for n in range(1, 5):
            (value, memory), gradient = value_and_gradient(batches[n - 1], target, memory=memory)
            history = [numpy_statistics(b) for b in batches[:n]]
            average = numpy_average(history, from_zero=from_zero)
            np.testing.assert_allclose(value, numpy_distance(average, target), rtol=1e-12)

            def moved(y, average=average, now=history[-1]):
                """The distance where the batch's own statistics move away from the average."""
                other = numpy_statistics(y)
                shifted = {
                    p: {k: average[p][k] + other[p][k] - now[p][k] for k in s}
                    for p, s in other.items()
                }
                return numpy_distance(shifted, target)

            expected = slope(moved, batches[n - 1], way)
            np.testing.assert_allclose((np.asarray(gradient) * way).sum(), expected, rtol=1e-6)
            twin = numpy_average(history, from_zero=not from_zero)
            assert abs(numpy_distance(twin, target) / float(value) - 1) > 1e-3


def test_a_dropped_layer_counts_nothing_and_is_not_remembered():
    x, target, _ = random_case()
    with jax.enable_x64(True):
        target = jax.tree.map(jnp.asarray, target)
        blank = statistics.Memory.blank(target, from_zero=False)
        keep = {path: jnp.asarray(path == ("conv1",)) for path in CONVS}
        without_it, memory = package_says(x, target, memory=blank, keep=keep)
        assert not memory.seen["conv2",] and memory.seen["conv1",] and memory.seen["a",]
        # Seen for the first time later, it starts honestly.
        _, later = package_says(x + 1, target, memory=memory)
        now = numpy_statistics(x + 1)["conv2",]
        for name, value in now.items():
            np.testing.assert_allclose(later.average["conv2",][name], value, rtol=1e-12)

        without = {path: inside for path, inside in MAPS.items() if path != ("conv2",)}
        stats = numpy_statistics(x)
        expected = numpy_distance({p: stats[p] for p in without}, target)
        np.testing.assert_allclose(without_it, expected, rtol=1e-12)


def test_layers_are_dropped_with_their_probability_each_by_itself():
    paths = [("b",), ("a",), ("c",)]
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), 4000)
    draw = jax.jit(jax.vmap(lambda k: statistics.sample_keep(k, paths, drop=0.4)))
    keep = np.stack([np.asarray(draw(keys)[path]) for path in paths])
    np.testing.assert_allclose(keep.mean(1), 0.6, atol=0.03)
    assert abs(np.corrcoef(keep)[np.triu_indices(3, 1)]).max() < 0.06
    never = statistics.sample_keep(keys[0], paths, drop=0.0)
    assert all(bool(x) for x in never.values())


# --- the norm ---------------------------------------------------------------------------------


def test_norm_at_zero_has_gradient_zero_and_the_plain_norm_has_not():
    zeros = jnp.zeros((3,), jnp.float32)
    assert safe_norm(zeros) == 0
    np.testing.assert_array_equal(jax.grad(safe_norm)(zeros), 0)
    assert np.isnan(jax.grad(lambda x: jnp.sqrt(jnp.sum(x**2)))(zeros)).all()


def test_norm_elsewhere():
    x = jnp.asarray([3.0, -4.0], jnp.float32)
    assert safe_norm(x) == 5
    np.testing.assert_allclose(jax.grad(safe_norm)(x), [0.6, -0.8], rtol=1e-6)
    for size in (1e-15, 1e15):
        np.testing.assert_allclose(safe_norm(x * jnp.float32(size)), 5 * size, rtol=1e-6)
        np.testing.assert_allclose(
            jax.grad(safe_norm)(x * jnp.float32(size)), [0.6, -0.8], rtol=1e-6
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_never_hidden(bad):
    x = jnp.asarray([bad, 1.0], jnp.float32)
    assert not np.isfinite(safe_norm(x))
    broken = {("stem",): {"mean": x, "var": x}}
    fine = {("stem",): {"mean": jnp.ones_like(x), "var": jnp.ones_like(x)}}
    assert not np.isfinite(alignment(broken, fine, first=("stem",), first_multiplier=1.0))

    def hiding_norm(x):  # twin: the test for zero written the other way round
        square = jnp.sum(jnp.square(x))
        return jnp.where(square > 0, jnp.sqrt(square), 0.0)

    if np.isnan(bad):
        assert hiding_norm(x) == 0


# --- how far one image is from the running statistics -----------------------------------------


def test_deviation_by_hand():
    # stem: ||(3, 4)|| = 5, ||log (1, 3)|| = log 3, over sqrt 2; block: ||(2, 3, 6)|| = 7,
    # ||log (4/4, 1/4, 0.5/4)|| = log 2 ||(0, 2, 3)||, over sqrt 3. The mean of both layers.
    image = jax.tree.map(np.copy, BATCH)
    image["block"]["bn"]["var"][2] = 0.5
    found = float(statistics.deviation(layers32(image), layers32(RUNNING)))
    stem = (5 + np.log(3)) / 2**0.5
    block = (7 + np.log(2) * 13**0.5) / 3**0.5
    assert found == pytest.approx((stem + block) / 2, rel=1e-5)
    assert found != pytest.approx((5 + np.log(3) + 7 + np.log(2) * 13**0.5) / 2, rel=0.1)  # twin
    # A variance of zero is far, and finite.
    image["block"]["bn"]["var"][2] = 0.0
    assert found < float(statistics.deviation(layers32(image), layers32(RUNNING))) < np.inf
