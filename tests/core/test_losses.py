from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    ("ce", 0.0, 1.0): 0.7 * ce64(STUDENT_BK, LABELS_B) + 0.3 * ce64(STUDENT_BK, PARTNERS_B),
}  # fmt: skip


@pytest.mark.parametrize("case", EXPECTED, ids=str)
def test_values_in_float64(case, x64):
    name, ce_weight, temperature = case
    value = student_loss(name, ce_weight=ce_weight, temperature=temperature)
    np.testing.assert_allclose(value, EXPECTED[case], rtol=1e-12)


def test_twins_are_far_from_the_values():
    twins = {
        "mse summed over classes": (((STUDENT_BK - TEACHER_BK) ** 2).sum(1).mean(), "mse_gt", 20.0),
        "mse of tempered logits": ((((STUDENT_BK - TEACHER_BK) / 20) ** 2).mean(), "mse_gt", 20.0),
        "kl the other way round": (kl64(TEACHER_BK, STUDENT_BK, 2), "kl", 2.0),
        "kl averaged over classes": (kl64(STUDENT_BK, TEACHER_BK, 2) / 5, "kl", 2.0),
        "kl with T^2": (4 * kl64(STUDENT_BK, TEACHER_BK, 2), "kl", 2.0),
        "kl_t2 without": (kl64(STUDENT_BK, TEACHER_BK, 2), "kl_t2", 2.0),
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


@pytest.mark.parametrize("name", ["mse_gt", "kl", "kl_t2"])
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
