"""What else is read off the linear probe: shares of the labels, subgroups, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_toys import OracleEncoder, ToyVocabulary, held_out
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score

from fedmix.errors import DataError
from fedmix.evaluation.calibration import (
    NUM_BINS,
    brier_scores,
    calibration_errors,
    calibration_report,
    evaluate_calibration,
)
from fedmix.evaluation.classification import LabelledRows, evaluate_linear_probe
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.label_shares import evaluate_label_shares, share_report
from fedmix.evaluation.metrics import patient_weights
from fedmix.evaluation.subgroups import evaluate_subgroups, group_report


class Counting(OracleEncoder):
    """Counts the images it was asked the features of."""

    num_images = 0

    def image_features(self, image_BSS):
        self.num_images += len(image_BSS)
        return super().image_features(image_BSS) + 0.6 * image_BSS[:, 4, :8]


def context(num: int = 240, **changes: Any) -> EvaluationContext:
    wanted = EvaluationSettings(num_bootstrap=50, num_few_train=40)
    return EvaluationContext(Counting(), held_out(num, **changes), ToyVocabulary(), {}, wanted)


def rows(num: int = 200, num_labels: int = 3, seed: int = 0) -> tuple[LabelledRows, np.ndarray]:
    """Labels of studies, two of each patient, and scores that lean the right way."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num, num_labels)).astype(np.int8)
    return LabelledRows(np.zeros((num, 1), np.float32), labels, np.arange(num) // 2), labels + rng.normal(size=labels.shape)


def macro(labels: np.ndarray, scores: np.ndarray) -> float:
    return float(np.mean([roc_auc_score(labels[:, k], scores[:, k]) for k in range(labels.shape[1])]))


# ---- shares of the labels


def test_the_whole_share_is_the_linear_probe_and_costs_no_second_pass() -> None:
    asked = context()
    whole = evaluate_linear_probe(asked).values
    shares = evaluate_label_shares(asked).values
    assert shares["100_percent"]["macro_auroc"] == pytest.approx(whole["macro_auroc"])
    assert shares["100_percent"]["ci95"] == pytest.approx(whole["ci95"])
    assert asked.encoder.num_images == 240


def test_a_share_is_drawn_several_times_and_too_few_labels_are_not_enough_data() -> None:
    shares = evaluate_label_shares(context()).values
    assert shares["10_percent"]["num_train"] == 12
    assert len(set(shares["10_percent"]["draws"])) == 3
    assert shares["10_percent"]["macro_auroc"] == pytest.approx(np.mean(shares["10_percent"]["draws"]))
    assert shares["1_percent"]["macro_auroc"] is None
    assert shares["1_percent"]["reason"].startswith("not enough data: 1 labelled studies")
    assert shares == evaluate_label_shares(context()).values


def test_a_label_that_a_draw_knows_nothing_of_counts_as_guessed() -> None:
    test, scores = rows()
    blind = scores.copy()
    blind[:, 1] = np.nan
    report = share_report([scores, blind], test, patient_weights(test.patient, 20, np.random.default_rng(0)))
    filled = np.where(np.isnan(blind), 0, blind)
    assert report["draws"] == pytest.approx([macro(test.labels, scores), macro(test.labels, filled)])
    assert roc_auc_score(test.labels[:, 1], filled[:, 1]) == 0.5
    assert report["mean_labels_guessed"] == 0.5


def test_without_a_label_to_score_a_share_has_a_reason_and_no_draws() -> None:
    test, scores = rows()
    test.labels[:] = 1
    report = share_report([scores], test, patient_weights(test.patient, 20, np.random.default_rng(0)))
    assert report["macro_auroc"] is None
    assert "both classes" in report["reason"]
    assert "draws" not in report


# ---- subgroups


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_a_subgroup_is_scored_as_sklearn_scores_its_rows_and_compared_with_the_rest(seed):
    test, scores = rows(seed=seed)
    inside = np.random.default_rng(seed).random(100).repeat(2) < 0.6
    report = group_report(test, scores, inside, patient_weights(test.patient, 20, np.random.default_rng(0)))
    assert report["macro_auroc"] == pytest.approx(macro(test.labels[inside], scores[inside]))
    rest = macro(test.labels[~inside], scores[~inside])
    assert report["difference"] == pytest.approx(report["macro_auroc"] - rest)
    assert report["num_test"] == inside.sum()


def test_the_difference_is_over_the_labels_that_both_sides_can_be_scored_on() -> None:
    test, scores = rows()
    inside = np.arange(200) < 100
    test.labels[100:, 0] = 0
    report = group_report(test, scores, inside, patient_weights(test.patient, 20, np.random.default_rng(0)))
    assert (report["num_labels_scored"], report["num_labels_compared"]) == (3, 2)
    both = [macro(test.labels[side][:, 1:], scores[side][:, 1:]) for side in (inside, ~inside)]
    assert report["difference"] == pytest.approx(both[0] - both[1])


def test_few_patients_and_rare_findings_are_not_enough_data() -> None:
    test, scores = rows()
    weights = patient_weights(test.patient, 20, np.random.default_rng(0))
    assert "not enough data: 10 patients" in group_report(test, scores, np.arange(200) < 20, weights)["reason"]
    test.labels[:96] = 0
    assert "no finding has 5" in group_report(test, scores, np.arange(200) < 100, weights)["reason"]
    everyone = group_report(test, scores, np.ones(200, bool), weights)
    assert everyone["macro_auroc"] is not None
    assert "not enough data" in everyone["difference_reason"]


def test_intervals_of_a_difference_that_is_not_there_hold_zero_at_their_rate() -> None:
    covered = 0
    for seed in range(40):
        test, scores = rows(seed=seed)
        weights = patient_weights(test.patient, 200, np.random.default_rng(seed))
        low, high = group_report(test, scores, np.arange(200) < 100, weights)["difference_ci95"]
        covered += low <= 0 <= high
    assert covered >= 34  # 38 expected


def test_groups_are_those_the_held_out_set_knows_and_none_is_a_reason() -> None:
    view = np.where(np.arange(240) % 2 == 0, "AP", "unknown")
    found = evaluate_subgroups(context(groups={"view": view})).values
    assert set(found) == {"view"}
    assert set(found["view"]) == {"AP"}
    assert found["view"]["AP"]["num_test"] == 60
    with pytest.raises(NotEvaluableError, match="does not say which view"):
        evaluate_subgroups(context(groups={}))
    with pytest.raises(DataError, match="groups by view has 3 rows"):
        context(groups={"view": view[:3]})


def test_sex_and_age_band_are_scored_as_views_are_and_one_that_no_study_says_has_a_reason() -> None:
    sex, band = np.array(["F", "M"] * 120), np.where(np.arange(240) < 200, "40-59", "80+")
    parts = {"sex": sex, "age_band": band, "site": np.full(240, "unknown")}
    found = evaluate_subgroups(context(groups=parts))
    assert {kind: set(groups) for kind, groups in found.values.items()} == {"sex": {"F", "M"}, "age_band": {"40-59", "80+"}}
    same = evaluate_subgroups(context(groups={"view": np.where(sex == "F", "AP", "PA")})).values["view"]
    assert found.values["sex"] == {"F": same["AP"], "M": same["PA"]}
    low, high = found.values["sex"]["F"]["difference_ci95"]
    assert low <= found.values["sex"]["F"]["difference"] <= high
    assert found.skipped == {"site": "the held-out set says the site of no test study"}


# ---- calibration


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_calibration_errors_are_a_loop_over_bins_and_brier_scores_are_sklearns(seed, num):
    rng = np.random.default_rng(seed)
    labels, said = rng.integers(0, 2, num), rng.choice([0.0, 0.1, 0.25, 0.5, 1.0, rng.random()], num)
    total = 0.0
    for number in range(NUM_BINS):
        inside = [i for i in range(num) if min(int(said[i] * NUM_BINS), NUM_BINS - 1) == number]
        total += abs(sum(said[i] - labels[i] for i in inside)) / num
    assert calibration_errors(labels[None], said)[0] == pytest.approx(total)
    assert brier_scores(labels.astype(np.int8), said, np.ones((1, num)))[0] == pytest.approx(brier_score_loss(labels, said))


def test_probabilities_that_are_meant_lie_in_the_range_and_overconfident_ones_beyond_it() -> None:
    inside = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        said = rng.random((300, 2))
        test = LabelledRows(np.zeros((300, 1), np.float32), (rng.random((300, 2)) < said).astype(np.int8), np.arange(300))
        report = calibration_report(test, said, np.array([0.5, 0.5]), seed=seed)
        low, high = report["ece_if_calibrated"]
        inside += low <= report["ece"] <= high
    assert inside >= 25  # 28.5 expected
    extreme = calibration_report(test, np.round(said), np.array([0.5, 0.5]))
    assert extreme["ece"] > extreme["ece_if_calibrated"][1]
    assert report["brier"] < report["brier_of_prevalence"] < extreme["brier"]
    assert sum(one["count"] for one in report["bins"]) == 600


def test_unknown_labels_and_findings_that_were_not_fitted_take_no_part() -> None:
    rng = np.random.default_rng(0)
    said, labels = rng.random((80, 2)), rng.integers(0, 2, (80, 2)).astype(np.int8)
    labels[40:] = -1
    said[:, 1] = np.nan
    unfitted = LabelledRows(np.zeros((80, 1), np.float32), labels, np.arange(80))
    report = calibration_report(unfitted, said, np.full(2, 0.5))
    assert report["num_labels_scored"] == 1
    assert report["ece"] == pytest.approx(calibration_errors(labels[None, :40, 0], said[:40, 0])[0])
    with pytest.raises(NotEvaluableError):
        calibration_report(unfitted, np.full((80, 2), np.nan), np.full(2, 0.5))


def test_a_probe_that_is_held_back_is_right_and_too_modest() -> None:
    report = evaluate_calibration(context()).values  # no label is ever mistaken, so the strongest penalty is chosen
    assert report["brier_ci95"][0] <= report["brier"] < report["brier_of_prevalence"]
    assert report["ece"] > report["ece_if_calibrated"][1]
