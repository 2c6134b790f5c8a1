from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve

from fedmix.evaluation.attack import attack_report, clopper_pearson, epsilon_report, least_epsilon, resampled_tpr


def scored(num: int, gap: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Half members, whose scores lie ``gap`` deviations above the others'."""
    rng = np.random.default_rng(seed)
    is_member = np.arange(num) < num // 2
    return is_member, rng.normal(size=num) + gap * is_member


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
def test_the_rate_is_the_best_point_of_sklearns_curve_ties_and_weights_included(seed, num_levels, max_fpr):
    rng = np.random.default_rng(seed)
    is_member = np.concatenate([[True, False], rng.random(30) < 0.5])
    scores = rng.integers(0, num_levels, 32).astype(float)
    weights = rng.integers(0, 3, (4, 32)).astype(float)
    for weight, ours in zip(weights, resampled_tpr(is_member, scores, weights, max_fpr), strict=True):
        drawn = weight > 0
        if len(np.unique(is_member[drawn])) < 2:
            assert np.isnan(ours)
        else:
            fpr, tpr, _ = roc_curve(is_member[drawn], scores[drawn], sample_weight=weight[drawn], drop_intermediate=False)
            assert ours == pytest.approx(tpr[fpr <= max_fpr + 1e-9].max(), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_the_auc_of_a_report_is_sklearns(seed):
    is_member, scores = scored(120, 0.7, seed)
    report = attack_report(is_member, scores.round(1), np.arange(120), num_bootstrap=0)
    assert report["auc"] == pytest.approx(roc_auc_score(is_member, scores.round(1)))


def test_too_few_patients_or_non_members_are_said_and_not_guessed():
    is_member, scores = scored(400, 1.0)
    few = attack_report(is_member, scores, np.arange(400) // 11)  # 400 studies, 19 patients of each kind
    assert few["auc"] is None
    assert few["reason"].startswith("not enough data: ")
    report = attack_report(is_member, scores, np.arange(400))
    assert report["tpr@fpr_0.01"] is not None
    assert report["tpr@fpr_0.001"] is None
    assert "needs 1000" in report["tpr@fpr_0.001_reason"]
    assert len(report["tpr@fpr_0.01_ci95"]) == 2


def test_intervals_of_a_score_that_knows_nothing_hold_one_half_at_their_rate():
    covered = [low <= 0.5 <= high for low, high in (report_of_noise(seed)["auc_ci95"] for seed in range(60))]
    assert 50 <= sum(covered) <= 60  # 57 expected


def report_of_noise(seed: int) -> dict:
    is_member, scores = scored(160, 0.0, seed)
    return attack_report(is_member, scores, np.arange(160), seed=seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 200))
def test_clopper_pearson_is_scipys_exact_interval(num_right, num):
    num_right = min(num_right, num)
    expected = binomtest(num_right, num).proportion_ci(0.95, method="exact")
    low, high = clopper_pearson(np.array(num_right), num)
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_bound_of_epsilon_by_hand():
    low, high = binomtest(90, 100).proportion_ci(0.95, "exact").low, binomtest(5, 100).proportion_ci(0.95, "exact").high
    expected = max(np.log((low - 1e-5) / high), np.log((1 - high - 1e-5) / (1 - low)))
    assert float(least_epsilon(np.array(90), 100, np.array(5), 100, 1e-5)) == pytest.approx(expected)
    assert float(least_epsilon(np.array(50), 100, np.array(50), 100, 0.0)) == 0.0


def test_randomised_response_is_not_accused_of_more_than_its_epsilon():
    # Each patient's bit is told truly with probability e / (1 + e), which is epsilon = 1; one bound in twenty may lie above it.
    above = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        is_member = np.arange(600) < 300
        is_true = rng.random(600) < np.e / (1 + np.e)
        above += epsilon_report(is_member, (is_member == is_true).astype(float), delta=0.0, seed=seed)["lower_bound"] > 1.0
    assert above <= 4


def test_a_faultless_attack_proves_the_largest_epsilon_and_noise_proves_none():
    is_member, scores = scored(400, 50.0)
    report = epsilon_report(is_member, scores, delta=1e-5)
    assert 3 < report["lower_bound"] <= report["largest_possible"]  # the halves' lowest members differ
    noise = epsilon_report(*scored(400, 0.0), delta=1e-5)
    assert noise["lower_bound"] < 0.3
    assert "not enough data" in epsilon_report(*scored(60, 1.0), delta=1e-5)["reason"]
