from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prism_jax import parallel
from prism_jax.core.losses import STUDENT_LOSSES, Targets, cross_entropy

RNG = np.random.default_rng(0)
STUDENT_BK = 3 * RNG.normal(size=(6, 5))
TEACHER_BK = 3 * RNG.normal(size=(6, 5))
LABELS_B = np.array([0, 4, 2, 2, 1, 3], np.int32)
PARTNERS_B = np.array([1, 3, 2, 0, 1, 4], np.int32)
WEIGHT = 0.7


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def ce64(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]).mean()


def kl64(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return (p * np.log(p / q)).sum(1).mean()


def relations(p, q):
    """1 minus the mean correlation of rows, and of columns, by NumPy."""
    return [
        1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
        for x, y in ((p, q), (p.T, q.T))
    ]


def dist64(student, teacher, temperature):
    """Huang et al. (2022), equations 8 to 10: inter-class and intra-class."""
    found = relations(softmax(student / temperature), softmax(teacher / temperature))
    return [temperature**2 * term for term in found]


def student_loss(name, student=STUDENT_BK, ce_weight=0.0, temperature=1.0, teacher=TEACHER_BK):
    targets = Targets(LABELS_B, PARTNERS_B, WEIGHT, teacher)
    return STUDENT_LOSSES[name](student, targets, ce_weight=ce_weight, temperature=temperature)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.asarray([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], jnp.float32))
    expected = -(np.log(0.5) + np.log(0.1)) / 2
    np.testing.assert_allclose(cross_entropy(logits, jnp.asarray([0, 1])), expected, rtol=1e-6)


def test_cross_entropy_is_the_same_where_nothing_is_picked(monkeypatch):
    def both():
        return jax.value_and_grad(lambda logits: cross_entropy(logits, LABELS_B))(STUDENT_BK)

    wanted = both()
    monkeypatch.setattr(parallel, "platform", lambda: "gpu")
    assert "gather" not in f"{jax.make_jaxpr(cross_entropy)(STUDENT_BK, LABELS_B)}"
    for found, expected in zip(both(), wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.abs(cross_entropy(STUDENT_BK, LABELS_B[::-1]) - wanted[0]) > 0.1  # twin
    assert np.isnan(cross_entropy(STUDENT_BK, LABELS_B + 1))  # a class that there is not


def test_cross_entropy_of_enormous_logits_is_finite():
    logits = jnp.asarray([[1e4, -1e4]], jnp.float32)
    assert cross_entropy(logits, jnp.asarray([0], jnp.int32)) == 0
    assert cross_entropy(logits, jnp.asarray([1], jnp.int32)) == 2e4


MSE = ((STUDENT_BK - TEACHER_BK) ** 2).mean()
EXPECTED = {
    ("mse_gt", 0.0, 20.0): MSE,
    ("mse_gt", 0.1, 20.0): MSE + 0.1 * ce64(STUDENT_BK, LABELS_B),
    ("kl", 0.0, 20.0): kl64(STUDENT_BK, TEACHER_BK, 20),
    ("kl", 0.5, 2.0): kl64(STUDENT_BK, TEACHER_BK, 2) + 0.5 * ce64(STUDENT_BK, LABELS_B),
    ("kl_t2", 0.0, 20.0): 400 * kl64(STUDENT_BK, TEACHER_BK, 20),
    ("kl_t2", 0.5, 2.0): 4 * kl64(STUDENT_BK, TEACHER_BK, 2) + 0.5 * ce64(STUDENT_BK, LABELS_B),
    ("dist", 0.0, 1.0): sum(dist64(STUDENT_BK, TEACHER_BK, 1)),
    ("dist", 0.5, 4.0): sum(dist64(STUDENT_BK, TEACHER_BK, 4)) + 0.5 * ce64(STUDENT_BK, LABELS_B),
    ("ce", 0.0, 1.0): 0.7 * ce64(STUDENT_BK, LABELS_B) + 0.3 * ce64(STUDENT_BK, PARTNERS_B),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_values_in_float64(case, x64):
    name, ce_weight, temperature = case
    value = student_loss(name, ce_weight=ce_weight, temperature=temperature)
    # DIST's epsilon of 1e-8 in the denominator is what its correlations differ by.
    np.testing.assert_allclose(value, EXPECTED[case], rtol=1e-6 if name == "dist" else 1e-12)


def test_twins_are_far_from_the_values():
    twins = {
        "mse summed over classes": (((STUDENT_BK - TEACHER_BK) ** 2).sum(1).mean(), "mse_gt", 20.0),
        "mse of tempered logits": ((((STUDENT_BK - TEACHER_BK) / 20) ** 2).mean(), "mse_gt", 20.0),
        "kl the other way round": (kl64(TEACHER_BK, STUDENT_BK, 2), "kl", 2.0),
        "kl averaged over classes": (kl64(STUDENT_BK, TEACHER_BK, 2) / 5, "kl", 2.0),
        "kl with T^2": (4 * kl64(STUDENT_BK, TEACHER_BK, 2), "kl", 2.0),
        "kl_t2 without": (kl64(STUDENT_BK, TEACHER_BK, 2), "kl_t2", 2.0),
        "dist without T^2": (sum(dist64(STUDENT_BK, TEACHER_BK, 4)) / 16, "dist", 4.0),
        "dist of rows only": (dist64(STUDENT_BK, TEACHER_BK, 4)[0], "dist", 4.0),
        "dist of columns only": (dist64(STUDENT_BK, TEACHER_BK, 4)[1], "dist", 4.0),
        "dist of logits": (sum(relations(STUDENT_BK, TEACHER_BK)) * 16, "dist", 4.0),
        "ce of the base image only": (ce64(STUDENT_BK, LABELS_B), "ce", 1.0),
        "ce with the shares swapped": (
            0.3 * ce64(STUDENT_BK, LABELS_B) + 0.7 * ce64(STUDENT_BK, PARTNERS_B), "ce", 1.0,
        ),
    }  # fmt: skip
    for what, (twin, name, temperature) in twins.items():
        assert abs(twin / float(student_loss(name, temperature=temperature)) - 1) > 0.01, what
    # The hard label inside mse_gt is the base image's, whatever the mix.
    mixed = 0.7 * ce64(STUDENT_BK, LABELS_B) + 0.3 * ce64(STUDENT_BK, PARTNERS_B)
    term = float(student_loss("mse_gt", ce_weight=1.0) - student_loss("mse_gt"))
    assert abs(mixed / term - 1) > 0.01


@pytest.mark.parametrize("name", ["mse_gt", "kl", "kl_t2", "dist"])
def test_a_weight_of_zero_means_not_computed(name):
    def primitives(ce_weight):
        trace = jax.make_jaxpr(lambda s: student_loss(name, s, ce_weight, 2.0))(STUDENT_BK)
        return str(trace)

    assert "gather" in primitives(0.1)
    assert "gather" not in primitives(0.0)


def test_hard_labels_need_no_teacher():
    assert student_loss("ce", teacher=None) == student_loss("ce")


def test_ce_with_a_share_per_image():
    shares_B = np.linspace(0.1, 1.0, 6).astype(np.float32)
    targets = Targets(LABELS_B, PARTNERS_B, shares_B)
    value = STUDENT_LOSSES["ce"](STUDENT_BK, targets, ce_weight=0.0, temperature=1.0)
    rows = zip(STUDENT_BK, LABELS_B, PARTNERS_B, shares_B, strict=True)
    each = [
        w * ce64(row[None], [label]) + (1 - w) * ce64(row[None], [partner])
        for row, label, partner, w in rows
    ]
    np.testing.assert_allclose(value, np.mean(each), rtol=1e-5)
    # Twin: the mean share for all.
    one = targets._replace(weight=shares_B.mean())
    twin = STUDENT_LOSSES["ce"](STUDENT_BK, one, ce_weight=0.0, temperature=1.0)
    assert abs(twin - np.mean(each)) > 0.05


def test_without_a_mix_ce_is_plain_cross_entropy():
    targets = Targets(LABELS_B, LABELS_B, jnp.float32(1))
    value = STUDENT_LOSSES["ce"](STUDENT_BK, targets, ce_weight=0.0, temperature=1.0)
    np.testing.assert_allclose(value, ce64(STUDENT_BK, LABELS_B), rtol=1e-6)


def test_dist_of_classes_that_nobody_names_is_finite():
    """A class whose probability is the same for every image correlates with nothing."""
    student, teacher = np.array(STUDENT_BK), np.array(TEACHER_BK)
    student[:, 1] = -1e4
    teacher[:, 2] = -1e4

    def loss(s):
        return student_loss("dist", s, temperature=1.0, teacher=jnp.asarray(teacher, jnp.float32))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(student, jnp.float32))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_each_image_may_have_its_own_mix():
    weight_B = np.array([1.0, 0.0, 0.3, 0.8, 0.5, 0.1])
    targets = Targets(LABELS_B, PARTNERS_B, jnp.asarray(weight_B, jnp.float32))
    value = STUDENT_LOSSES["ce"](STUDENT_BK, targets, ce_weight=0.0, temperature=1.0)
    rows = np.arange(6)
    p = np.log(softmax(STUDENT_BK))
    own_B, partner_B = p[rows, LABELS_B], p[rows, PARTNERS_B]
    expected = -np.mean(weight_B * own_B + (1 - weight_B) * partner_B)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # Twin: one mean weight for all images.
    mean = -np.mean(weight_B.mean() * own_B + (1 - weight_B.mean()) * partner_B)
    assert abs(mean / expected - 1) > 0.01


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_gradients_against_torch_in_float64(case, x64):
    torch = pytest.importorskip("torch", reason="compares with PyTorch, which is not installed")
    functional = torch.nn.functional
    name, ce_weight, temperature = case
    student = torch.tensor(STUDENT_BK, requires_grad=True)
    teacher, labels = torch.tensor(TEACHER_BK), torch.tensor(LABELS_B).long()
    partners = torch.tensor(PARTNERS_B).long()
    if name == "mse_gt":
        loss = functional.mse_loss(student, teacher)
    elif name == "ce":
        loss = WEIGHT * functional.cross_entropy(student, labels)
        loss = loss + (1 - WEIGHT) * functional.cross_entropy(student, partners)
    elif name == "dist":
        loss = 0.0
        p, q = (functional.softmax(x / temperature, 1) for x in (student, teacher))
        for a, b in ((p, q), (p.T, q.T)):
            pair = torch.stack([a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)])
            lengths = pair.norm(dim=2).prod(0) + 1e-8
            loss = loss + temperature**2 * (1 - (pair.prod(0).sum(1) / lengths).mean())
    else:
        loss = functional.kl_div(
            functional.log_softmax(student / temperature, 1),
            functional.softmax(teacher / temperature, 1),
            reduction="batchmean",
        ) * (temperature**2 if name == "kl_t2" else 1)
    (loss + ce_weight * functional.cross_entropy(student, labels)).backward()
    gradient = jax.grad(lambda s: student_loss(name, s, ce_weight, temperature))(
        jnp.asarray(STUDENT_BK)
    )
    np.testing.assert_allclose(gradient, student.grad.numpy(), rtol=1e-9, atol=1e-14)


# --- images that count differently ------------------------------------------------------------

COUNTS = np.array([2, 0, 1, 1, 2, 0])


@pytest.mark.parametrize("name", ["mse_gt", "kl", "kl_t2", "ce"])
def test_an_image_of_weight_two_counts_as_two(name, x64):
    """Weights that are counts, 1 on average, against a batch in which images stand so often."""
    repeated = np.repeat(np.arange(6), COUNTS)
    numbers = {"ce_weight": 0.3, "temperature": 2.0}
    weighted = Targets(
        LABELS_B, PARTNERS_B, WEIGHT, TEACHER_BK, jnp.asarray(COUNTS, jnp.float64)
    )  # fmt: skip
    stated = Targets(LABELS_B[repeated], PARTNERS_B[repeated], WEIGHT, TEACHER_BK[repeated])
    found = STUDENT_LOSSES[name](STUDENT_BK, weighted, **numbers)
    wanted = STUDENT_LOSSES[name](STUDENT_BK[repeated], stated, **numbers)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    alike = STUDENT_LOSSES[name](STUDENT_BK, weighted._replace(importance_B=None), **numbers)
    assert abs(alike - wanted) > 1e-3


@pytest.mark.parametrize("name", ["mse_gt", "kl", "kl_t2", "ce"])
def test_equal_weights_change_no_bit(name):
    targets = Targets(LABELS_B, PARTNERS_B, WEIGHT, jnp.asarray(TEACHER_BK, jnp.float32))
    student = jnp.asarray(STUDENT_BK, jnp.float32)
    ones = targets._replace(importance_B=jnp.ones(6, jnp.float32))
    losses = [
        STUDENT_LOSSES[name](student, t, ce_weight=0.3, temperature=2.0) for t in (targets, ones)
    ]
    assert losses[0] == losses[1]
