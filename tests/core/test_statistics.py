from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax.core.statistics import bn_alignment, safe_norm
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


def tree32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def align(first=("stem",), **options):
    options = {"first_multiplier": 10.0, **options}
    return float(bn_alignment(tree32(BATCH), tree32(RUNNING), first=first, **options))


def test_alignment_by_hand():
    assert align() == 10 * (5 + 2) + (7 + 5)
    assert align(first_multiplier=1.0) == 19
    assert align(variance_weight=2.0) == 10 * (5 + 4) + (7 + 10)
    assert align(variance_weight=0.0) == 10 * 5 + 7


def test_twins_of_the_formula_give_other_numbers():
    squared = 10 * (25 + 4) + (49 + 25)
    per_channel = 10 * (5 + 2) / 2 + (7 + 5) / 3
    on_another_layer = align(first=("block", "bn"))
    assert on_another_layer == (5 + 2) + 10 * (7 + 5)
    for twin in (squared, per_channel, on_another_layer):
        assert twin != align()


def test_alignment_does_not_depend_on_the_order_of_keys():
    turned = {name: RUNNING[name] for name in reversed(RUNNING)}
    value = bn_alignment(tree32(BATCH), tree32(turned), first=("stem",), first_multiplier=10.0)
    assert float(value) == align()


def test_different_layers_are_an_error_that_names_them():
    with pytest.raises(UserError, match="block/bn"):
        bn_alignment(
            tree32({"stem": BATCH["stem"]}), tree32(RUNNING), first=("stem",), first_multiplier=1.0
        )


def test_a_first_layer_that_does_not_exist_is_an_error():
    with pytest.raises(UserError, match="no BatchNorm at block/missing"):
        align(first=("block", "missing"))
    with pytest.raises(UserError, match="stem"):
        align(first=("block",))


def images_alignment(x_BHWC, running, ddof=0):
    """The alignment of two stacked layers' inputs: x itself and x squared."""
    batch = {
        name: {"mean": y.mean((0, 1, 2)), "var": y.var((0, 1, 2), ddof=ddof)}
        for name, y in (("a", x_BHWC), ("b", x_BHWC**2))
    }
    return bn_alignment(batch, running, first=("a",), first_multiplier=10.0, variance_weight=2.0)


def random_case():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 3, 4))
    running = {
        name: {"mean": rng.normal(size=4), "var": rng.uniform(0.5, 2, size=4)} for name in "ab"
    }
    return x, running


def test_value_and_gradient_against_finite_differences_in_float64():
    x, running = random_case()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(images_alignment)(jnp.asarray(x), running)
        assert value.dtype == jnp.float64

        def by_numpy(x, ddof=0):
            total = 0.0
            for name, y in (("a", x), ("b", x**2)):
                mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2), ddof=ddof)
                total += (10 if name == "a" else 1) * (
                    np.sqrt(((mean - running[name]["mean"]) ** 2).sum())
                    + 2 * np.sqrt(((var - running[name]["var"]) ** 2).sum())
                )
            return total

        direction = np.random.default_rng(1).normal(size=x.shape)
        slope = (by_numpy(x + 1e-6 * direction) - by_numpy(x - 1e-6 * direction)) / 2e-6
        np.testing.assert_allclose(value, by_numpy(x), rtol=1e-13)
        np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-7)
        # Twin: the unbiased variance.
        assert abs(float(value) / by_numpy(x, ddof=1) - 1) > 1e-3
        assert abs(float(images_alignment(x, running, ddof=1)) / by_numpy(x) - 1) > 1e-3


def test_value_and_gradient_against_torch_in_float64():
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    x, running = random_case()
    x_torch = torch.tensor(x, requires_grad=True)
    total = 0.0
    for name, y in (("a", x_torch), ("b", x_torch**2)):
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2), unbiased=False)
        term = torch.norm(torch.tensor(running[name]["mean"]) - mean, 2)
        term = term + 2 * torch.norm(torch.tensor(running[name]["var"]) - var, 2)
        total = total + (10 if name == "a" else 1) * term
    total.backward()
    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(images_alignment)(jnp.asarray(x), running)
    np.testing.assert_allclose(value, total.item(), rtol=1e-13)
    np.testing.assert_allclose(gradient, x_torch.grad.numpy(), rtol=1e-10, atol=1e-13)


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
    broken = {"stem": {"mean": x, "var": x}}
    fine = {"stem": {"mean": jnp.ones_like(x), "var": jnp.ones_like(x)}}
    assert not np.isfinite(bn_alignment(broken, fine, first=("stem",), first_multiplier=1.0))

    def hiding_norm(x):  # twin: the test for zero written the other way round
        square = jnp.sum(jnp.square(x))
        return jnp.where(square > 0, jnp.sqrt(square), 0.0)

    if np.isnan(bad):
        assert hiding_norm(x) == 0
