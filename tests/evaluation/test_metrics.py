from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import mean_squared_error, roc_auc_score

from fedmix.evaluation import metrics


def width(samples: np.ndarray) -> float:
    low, high = metrics.interval(samples)["ci95"]
    return high - low


def some_scores(num: int = 300, num_labels: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num, num_labels)).astype(np.int8)
    return labels, labels + rng.normal(size=labels.shape)


def test_auroc_of_four_by_hand():
    labels = np.array([[0], [0], [1], [1]], np.int8)
    scores = np.array([[0.1], [0.4], [0.35], [0.8]])
    assert metrics.auroc(labels, scores).macro == 0.75  # three of four pairs in order


def test_macro_auroc_is_the_mean_of_sklearns_over_the_known_rows():
    labels, scores = some_scores()
    labels[np.random.default_rng(1).random(labels.shape) < 0.2] = -1
    expected = [roc_auc_score(labels[known, k], scores[known, k]) for k, known in enumerate((labels >= 0).T)]
    result = metrics.auroc(labels, scores)
    assert result.per_label == pytest.approx(expected)
    assert result.macro == pytest.approx(np.mean(expected))


def test_a_label_without_both_classes_is_left_out_of_the_mean():
    labels, scores = some_scores()
    labels[:, 0], labels[:, 1] = 1, -1
    scores[:, 2] = np.nan  # nothing was fitted
    result = metrics.auroc(labels, scores)
    assert result.per_label[:3] == (None, None, None)
    assert result.num_scored == 1
    assert result.macro == result.per_label[3]


def test_without_any_label_to_score_the_mean_is_none():
    assert metrics.auroc(np.ones((5, 2), np.int8), np.zeros((5, 2))).macro is None


def test_auroc_ignores_the_order_of_rows_and_any_monotone_transform_of_the_scores():
    labels, scores = some_scores()
    order = np.random.default_rng(2).permutation(len(labels))
    expected = metrics.auroc(labels, scores)
    assert metrics.auroc(labels[order], scores[order]) == expected
    assert metrics.auroc(labels, np.exp(scores / 2)) == expected


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_resampled_auroc_equals_sklearns_with_sample_weights_ties_included(seed, num_levels):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1], rng.integers(-1, 2, 30)]).astype(np.int8)
    scores = rng.integers(0, num_levels, 32).astype(float)
    weights = rng.integers(0, 3, (5, 32)).astype(float)
    known = labels >= 0
    for weight, ours in zip(weights, metrics.resampled_auroc(labels, scores, weights), strict=True):
        drawn = known & (weight > 0)
        if len(np.unique(labels[drawn])) < 2:
            assert np.isnan(ours)
        else:
            expected = roc_auc_score(labels[drawn], scores[drawn], sample_weight=weight[drawn])
            assert ours == pytest.approx(expected, abs=1e-12)


def test_a_resample_of_every_row_once_is_the_point_estimate():
    labels, scores = some_scores()
    weights = np.ones((1, len(labels)))
    assert metrics.resampled_macro_auroc(labels, scores, weights)[0] == pytest.approx(metrics.auroc(labels, scores).macro)


def test_macro_auroc_of_a_resample_is_over_the_labels_it_can_score():
    labels = np.array([[0, 0], [1, 0], [1, 1]], np.int8)
    scores = np.array([[0.0, 0.0], [1.0, 0.5], [1.0, 1.0]])
    weights = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])  # without row 2, label 1 has no positive; row 1 alone scores nothing
    values = metrics.resampled_macro_auroc(labels, scores, weights)
    assert values[0] == 1.0
    assert np.isnan(values[1])


def test_weights_draw_patients_whole():
    patient = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    weights = metrics.patient_weights(patient, 50, np.random.default_rng(0))
    for name in "abcd":
        of_patient = weights[:, patient == name]
        assert (of_patient == of_patient[:, :1]).all()
    first_rows = weights[:, [0, 1, 3, 6]]
    assert (first_rows.sum(axis=1) == 4).all()


def test_repeating_rows_of_the_same_patients_does_not_narrow_the_interval():
    labels, scores = some_scores(200)
    once = np.arange(200)
    twice = np.tile(once, 2)

    def interval_width(rows: np.ndarray, patient: np.ndarray) -> float:
        weights = metrics.patient_weights(patient, 1000, np.random.default_rng(0))
        return width(metrics.resampled_macro_auroc(labels[rows], scores[rows], weights))

    plain = interval_width(once, once)
    assert interval_width(twice, twice) == pytest.approx(plain, rel=1e-9)  # the same patients drawn: the same values
    as_if_independent = interval_width(twice, np.arange(400))
    assert as_if_independent == pytest.approx(plain / np.sqrt(2), rel=0.1)


def test_the_interval_of_a_mean_has_the_width_of_the_normal_approximation():
    values = np.random.default_rng(0).normal(size=400)
    weights = metrics.patient_weights(np.arange(400), 4000, np.random.default_rng(1))
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert width(metrics.resampled_mean(values, weights)) == pytest.approx(expected, rel=0.05)


def test_a_ratio_weighs_long_rows_more_and_is_undefined_where_nothing_was_counted():
    totals, counts = np.array([10.0, 1.0]), np.array([5.0, 1.0])
    weights = np.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0]])
    values = metrics.resampled_ratio(totals, counts, weights)
    assert values[:2] == pytest.approx([11 / 6, 1.0])
    assert np.isnan(values[2])


def test_one_patient_has_no_interval_and_the_report_says_why():
    weights = metrics.patient_weights(np.zeros(5), 100, np.random.default_rng(0))
    report = metrics.interval(metrics.resampled_mean(np.arange(5.0), weights))
    assert report["ci95"] is None
    assert "two patients" in report["ci95_reason"]


def test_psnr_by_hand():
    truth = np.full((4, 4), 0.5)
    assert metrics.psnr(truth, truth + 0.1) == pytest.approx(20.0)
    assert metrics.psnr(truth, truth) == metrics.MAX_PSNR_DB
    assert metrics.psnr(truth, truth + 1e-9) == metrics.MAX_PSNR_DB


@pytest.mark.parametrize("side", [6, 7, 48])
def test_ssim_of_a_picture_with_itself_is_one_also_when_it_is_small(side):
    picture = np.random.default_rng(0).random((side, side)).astype(np.float32)
    assert metrics.ssim(picture, picture) == pytest.approx(1.0)
    assert metrics.ssim(picture, 1 - picture) < 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(1e-3, 1.0))
def test_psnr_is_that_of_scikit_learns_squared_error_and_scikit_images_in_any_shape(seed, num, noise):
    rng = np.random.default_rng(seed)
    truth = rng.random((num, 3))
    drawn = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1)
    assert metrics.psnr(truth, drawn) == pytest.approx(-10 * np.log10(mean_squared_error(truth, drawn)))
    assert metrics.psnr(truth.ravel(), drawn.ravel()) == pytest.approx(peak_signal_noise_ratio(truth, drawn, data_range=1.0))


def ssim_by_loop(truth: np.ndarray, drawn: np.ndarray, side: int) -> float:
    """The mean over whole windows (Wang et al. 2004, equation 13), each with the covariance of a sample."""
    found = []
    for row in range(truth.shape[0] - side + 1):
        for column in range(truth.shape[1] - side + 1):
            one, other = (picture[row : row + side, column : column + side].ravel() for picture in (truth, drawn))
            (one_var, both), (_, other_var) = np.cov(one, other)
            light = (2 * one.mean() * other.mean() + 0.01**2) / (one.mean() ** 2 + other.mean() ** 2 + 0.01**2)
            found.append(light * (2 * both + 0.03**2) / (one_var + other_var + 0.03**2))
    return float(np.mean(found))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 14), st.floats(0.0, 1.0))
def test_ssim_is_a_loops_over_windows_and_scikit_images(seed, side, noise):
    rng = np.random.default_rng(seed)
    truth = rng.random((side, side))
    drawn = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1)
    window = min(7, side - (side + 1) % 2)
    assert metrics.ssim(truth, drawn) == pytest.approx(ssim_by_loop(truth, drawn, window), abs=1e-9)
    assert metrics.ssim(truth, drawn) == pytest.approx(structural_similarity(truth, drawn, win_size=window, data_range=1.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_a_resampled_mean_and_ratio_are_numpys_of_the_rows_repeated_as_often_as_they_were_drawn(seed, num):
    rng = np.random.default_rng(seed)
    totals, counts = rng.normal(size=num), rng.integers(1, 9, num).astype(float)
    weights = metrics.patient_weights(rng.integers(0, num, num), 5, rng)
    means, ratios = metrics.resampled_mean(totals, weights), metrics.resampled_ratio(totals, counts, weights)
    for weight, mean, ratio in zip(weights, means, ratios, strict=True):
        rows = np.repeat(np.arange(num), weight.astype(int))
        assert (mean, ratio) == pytest.approx((totals[rows].mean(), totals[rows].sum() / counts[rows].sum()))
