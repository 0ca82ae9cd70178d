"""Membership scores, against closed forms, numbers by hand and an independent auditor."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from prism_jax.analysis import membership
from prism_jax.errors import UserError

RUNS, CANARIES = 16, 400


def drawn(seed: int, shift: float, *, spread: float = 3.0):
    """Values of canaries of their own levels, a shift higher where they are members; and who is."""
    draw = np.random.default_rng(seed)
    member = np.zeros((RUNS, CANARIES), bool)
    for pair in range(RUNS // 2):
        member[2 * pair, draw.permutation(CANARIES)[: CANARIES // 2]] = True
        member[2 * pair + 1] = ~member[2 * pair]
    level = spread * draw.standard_normal(CANARIES)
    return level + draw.standard_normal(member.shape) + shift * member, member


def test_the_area_of_shifted_normals_is_the_closed_form():
    values, member = drawn(0, 1.0, spread=0.0)
    # P(N(d, 1) > N(0, 1)) = Phi(d / sqrt 2)
    assert membership.area(values, member) == pytest.approx(stats.norm.cdf(0.5**0.5), abs=0.012)
    assert membership.area(values, member) == pytest.approx(
        roc_auc_score(member.ravel(), values.ravel()), abs=1e-12
    )
    rate = membership.rate(values, member, 0.01)
    assert rate.true == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - 1.0), abs=0.02)
    assert rate.low < stats.norm.sf(stats.norm.isf(0.01) - 1.0) < rate.high


def test_likelihood_ratios_find_what_levels_hide():
    values, member = drawn(1, 1.0)
    plain = membership.area(values, member)
    scores = membership.likelihood_ratios(values, member)
    # Seven runs of either kind tell each mean up to 1/7 of the variance.
    assert plain < 0.6 < 0.7 < membership.area(scores, member)
    # With means and variances known the ratio of N(l + 1, 1) and N(l, 1) is x - l - 1/2.
    values, member = drawn(1, 4.0, spread=0.0)
    scores = membership.likelihood_ratios(values, member)
    assert membership.area(scores, member) == pytest.approx(stats.norm.cdf(8**0.5), abs=0.004)


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_say_nothing_give_half_and_members_that_leak_give_one(seed):
    values, member = drawn(seed, 0.0)
    verdict = membership.judge(membership.likelihood_ratios(values, member), member, resamples=50)
    assert verdict.auroc == pytest.approx(0.5, abs=0.02)
    assert verdict.low < 0.5 < verdict.high + 0.01
    assert all(rate.true < 5 * rate.false for rate in verdict.rates)
    values, member = drawn(seed, 50.0)
    leaked = membership.judge(membership.likelihood_ratios(values, member), member, resamples=50)
    assert leaked.auroc == 1.0 and [rate.true for rate in leaked.rates] == [1.0, 1.0]
    # Twin: the same values under other members' labels.
    other = drawn(seed + 100, 0.0)[1]
    blind = membership.likelihood_ratios(values, other)
    assert membership.area(blind, other) == pytest.approx(0.5, abs=0.03)


def test_a_pair_is_left_out_of_its_own_scores():
    """Twin: an attacker who keeps the run in question finds members where there are none."""
    values, member = drawn(5, 0.0)
    fair = membership.area(membership.likelihood_ratios(values, member), member)
    known = [
        membership._normal(values, chosen)[0] for chosen in (member, ~member)
    ]  # of all runs, the one in question too
    unfair = (values - known[1]) ** 2 - (values - known[0]) ** 2
    assert fair == pytest.approx(0.5, abs=0.015)
    assert membership.area(unfair, member) > 0.55


def test_a_roc_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.4, 0.4, 0.2, 0.1])
    member = np.array([1, 1, 0, 1, 1, 0, 0, 0], bool)
    # Pairs won: 4 + 4 + 3 + (2 and a tie) of 16.
    assert membership.area(scores, member) == 13.5 / 16
    no_false, one_false = (membership.rate(scores, member, f) for f in (0.0, 0.25))
    assert (no_false.allowed, no_false.true) == (0, 2 / 4)
    # Above 0.4, at which a member and another are tied.
    assert (one_false.allowed, one_false.true) == (1, 3 / 4)
    # Clopper-Pearson of 2 of 4 (beta quantiles).
    low, high = stats.beta.ppf(0.025, 2, 3), stats.beta.ppf(0.975, 3, 2)
    assert (no_false.low, no_false.high) == pytest.approx((low, high))
    assert low == pytest.approx(0.0676, abs=1e-4)
    false, true = membership.roc(scores, member)
    assert true[false == 0.0].max() == 2 / 4 and true[false == 0.25].max() == 3 / 4


def test_confidence_is_the_logit_of_the_probability():
    logits = np.random.default_rng(0).normal(size=(5, 3))
    labels = np.array([0, 1, 2, 0, 1])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p[np.arange(5), labels]
    assert membership.confidence(logits, labels) == pytest.approx(np.log(p / (1 - p)))
    # It stays finite where the probability rounds to one.
    sure = membership.confidence(np.array([[800.0, 0.0, 0.0]]), np.array([0]))
    assert sure == pytest.approx(800 - np.log(2))


def test_a_copy_is_the_likest():
    likeness = membership.likeness(np.array([0.0, 0.5, 10.0]))
    assert likeness[0] == pytest.approx(np.log(2)) and (np.diff(likeness) < 0).all()


@pytest.mark.parametrize("runs", [4, 7])
def test_too_few_runs_are_refused(runs):
    with pytest.raises(UserError, match="even number of at least 6"):
        membership.likelihood_ratios(np.zeros((runs, 2)), np.zeros((runs, 2), bool))


def test_jax_privacy_agrees_on_what_both_measure():
    auditing = pytest.importorskip("jax_privacy.auditing")
    values, member = drawn(2, 2.0, spread=0.0)
    auditor = auditing.CanaryScoreAuditor(values[member], values[~member])
    area, rate = membership.area(values, member), membership.rate(values, member, 0.01)
    # Its curve is the hull of ours.
    assert 0 <= auditor.attack_auroc() - area < 0.005
    assert 0 <= auditor.tpr_at_given_fpr(0.01) - rate.true < 0.03
