from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_toys import ConstantEncoder, OracleEncoder, ToyVocabulary, codes, draw, held_out
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity
from torch import Tensor

from fedmix.evaluation import metrics
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings
from fedmix.evaluation.regeneration import (
    MaskedImages,
    baseline_pictures,
    compose,
    evaluate_regeneration,
    fit_mean_image,
    hidden_patches,
    hidden_pixels,
    mean_psnr_db,
    quality,
    regenerate,
    smooth_into_gaps,
)


def masked_images(num: int = 6, seed: int = 0) -> MaskedImages:
    images = np.random.default_rng(seed).integers(20, 230, (num, 24, 24)).astype(np.uint8)
    return MaskedImages(images, hidden_patches(num, 9, mask_ratio=0.6, seed=seed), 8)


def context(encoder, settings: dict | None = None, **changes) -> EvaluationContext:
    values = {"num_bootstrap": 20, "mask_ratio": 0.6} | (settings or {})
    return EvaluationContext(encoder, held_out(**changes), ToyVocabulary(), {}, EvaluationSettings(**values))


@pytest.mark.parametrize(("ratio", "num_hidden"), [(0.75, 27), (0.001, 1), (0.999, 35)])
def test_every_row_hides_the_same_number_of_patches(ratio, num_hidden):
    hidden_NP = hidden_patches(200, 36, mask_ratio=ratio, seed=0)
    assert (hidden_NP.sum(axis=1) == num_hidden).all()


def test_masks_differ_between_images_and_are_fixed_by_the_seed():
    hidden_NP = hidden_patches(200, 36, mask_ratio=0.75, seed=0)
    np.testing.assert_array_equal(hidden_NP, hidden_patches(200, 36, mask_ratio=0.75, seed=0))
    assert len(np.unique(hidden_NP, axis=0)) == 200
    assert hidden_NP.mean(axis=0) == pytest.approx(np.full(36, 0.75), abs=0.12)


def test_patches_are_numbered_row_by_row():
    hidden_NP = np.zeros((1, 9), bool)
    hidden_NP[0, [1, 6]] = True  # first row, second patch; third row, first patch
    expected = np.zeros((24, 24), bool)
    expected[:8, 8:16] = True
    expected[16:, :8] = True
    np.testing.assert_array_equal(hidden_pixels(hidden_NP, 8)[0], expected)


def test_what_is_predicted_for_visible_patches_has_no_effect():
    masked = masked_images()
    rng = np.random.default_rng(1)
    prediction = rng.random(masked.truth.shape).astype(np.float32)
    elsewhere = np.where(masked.hidden, prediction, rng.random(masked.truth.shape)).astype(np.float32)
    composed = [compose(masked.truth, drawn, masked.hidden) for drawn in (prediction, elsewhere)]
    one, other = (quality(masked.truth, picture, masked.hidden) for picture in composed)
    np.testing.assert_array_equal(one.psnr_db, other.psnr_db)
    np.testing.assert_array_equal(one.ssim, other.ssim)


def test_psnr_is_that_of_hidden_pixels_alone_and_ssim_that_of_the_picture():
    masked = masked_images()
    composed = compose(masked.truth, np.zeros_like(masked.truth), masked.hidden)
    scores = quality(masked.truth, composed, masked.hidden)
    for i in range(len(masked)):
        error = (masked.truth[i][masked.hidden[i]] ** 2).mean()
        assert scores.psnr_db[i] == pytest.approx(-10 * np.log10(error), rel=1e-5)
        assert scores.ssim[i] == pytest.approx(structural_similarity(masked.truth[i], composed[i], data_range=1.0))


def test_predictions_are_clamped_to_the_range_of_pixels():
    masked = masked_images()
    composed = compose(masked.truth, np.full(masked.truth.shape, 7.0), masked.hidden)
    assert composed[masked.hidden].max() == 1.0


def test_baselines_never_look_at_hidden_pixels():
    masked = masked_images()
    changed = np.where(masked.hidden, 255 - masked.images, masked.images).astype(np.uint8)
    mean_image = np.random.default_rng(2).random((24, 24)).astype(np.float32)
    before = baseline_pictures(masked, mean_image)
    after = baseline_pictures(MaskedImages(changed, masked.hidden_NP, 8), mean_image)
    assert set(before) == {"mean_image", "mean_image_fitted", "interpolation", "mean_image_fitted_and_interpolation"}
    for name, pictures in before.items():
        for one, other in zip(pictures, after[name], strict=True):
            np.testing.assert_array_equal(one[masked.hidden], other[masked.hidden])


def test_baselines_do_look_at_visible_pixels():
    masked = masked_images()
    changed = np.where(masked.hidden, masked.images, 255 - masked.images).astype(np.uint8)
    mean_image = np.random.default_rng(2).random((24, 24)).astype(np.float32)
    before = baseline_pictures(masked, mean_image)
    after = baseline_pictures(MaskedImages(changed, masked.hidden_NP, 8), mean_image)
    for name in ("mean_image_fitted", "interpolation", "mean_image_fitted_and_interpolation"):
        assert not np.array_equal(before[name][0][masked.hidden], after[name][0][masked.hidden])


def test_smoothing_equals_a_loop_over_visible_pixels():
    masked = masked_images(1)
    filled = smooth_into_gaps(masked.truth, masked.hidden, 3.0)[0]
    rows, columns = np.nonzero(~masked.hidden[0])
    for y, x in ((0, 0), (12, 12), (23, 5)):
        weight = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 18)
        assert filled[y, x] == pytest.approx((weight * masked.truth[0, rows, columns]).sum() / weight.sum(), rel=1e-4)


def test_smoothing_of_one_grey_value_is_that_value_however_far_the_next_visible_pixel():
    hidden = np.ones((1, 200, 200), bool)
    hidden[0, 0, 0] = False
    filled = smooth_into_gaps(np.full((1, 200, 200), 0.3, np.float32), hidden, 1.0)
    np.testing.assert_allclose(filled, 0.3, rtol=1e-4)


def test_the_fitted_mean_image_is_numpys_straight_line_through_visible_pixels():
    masked = masked_images()
    mean_image = np.random.default_rng(2).random((24, 24)).astype(np.float32)
    fitted = fit_mean_image(masked.truth, masked.hidden, mean_image)
    for i in range(len(masked)):
        visible = ~masked.hidden[i]
        line = np.polyfit(mean_image[visible], masked.truth[i][visible], 1)
        np.testing.assert_allclose(fitted[i], np.polyval(line, mean_image), atol=1e-4)


def test_a_flat_mean_image_is_fitted_by_its_offset():
    masked = masked_images()
    fitted = fit_mean_image(masked.truth, masked.hidden, np.full((24, 24), 0.5, np.float32))
    for i in range(len(masked)):
        np.testing.assert_allclose(fitted[i], masked.truth[i][~masked.hidden[i]].mean(), rtol=1e-4)


def test_a_perfect_encoder_reaches_the_highest_score_and_a_grey_one_is_below_the_mean_image():
    perfect = evaluate_regeneration(context(OracleEncoder())).values
    assert perfect["psnr_db"] == pytest.approx(metrics.MAX_PSNR_DB)
    assert perfect["ssim"] == pytest.approx(1.0)
    grey = evaluate_regeneration(context(ConstantEncoder())).values
    assert grey["psnr_db"] < grey["baselines"]["mean_image"]["psnr_db"]
    assert grey["gain_over_best_baseline_db"] == pytest.approx(
        grey["psnr_db"] - grey["baselines"][grey["best_baseline"]]["psnr_db"]
    )


def test_the_gain_through_the_report_is_measured_on_the_same_images_and_masks():
    class Reader(ConstantEncoder):
        """With a report it draws the truth, without one grey."""

        def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
            return torch.full_like(image_BSS, 0.5) if words_BL is None else image_BSS

    words = held_out().words
    some_words = [ids if i % 4 else None for i, ids in enumerate(words)]
    findings = evaluate_regeneration(context(Reader(), words=some_words))
    told = findings.values["with_report"]
    assert findings.values["num_images"] == 80
    assert told["num_images"] == 60
    assert told["psnr_db"] == pytest.approx(metrics.MAX_PSNR_DB)
    everyone = evaluate_regeneration(context(ConstantEncoder(), words=some_words))
    same_rows_grey = everyone.values["with_report"]["psnr_db"]
    assert told["gain_psnr_db"] == pytest.approx(metrics.MAX_PSNR_DB - same_rows_grey)
    assert everyone.values["with_report"]["gain_psnr_db"] == 0.0


def test_without_reports_that_part_is_skipped_with_a_reason():
    findings = evaluate_regeneration(context(OracleEncoder(), words=None))
    assert "with_report" not in findings.values
    assert "report" in findings.skipped["with_report"]
    assert findings.examples.regenerated_with_report is None


def test_the_panel_shows_the_same_studies_in_every_row():
    panel = evaluate_regeneration(context(ConstantEncoder(), settings={"num_examples": 3})).examples
    assert panel.original.shape == panel.regenerated_with_report.shape == (3, 24, 24)
    hidden = panel.masked != panel.original
    assert (panel.masked[hidden] == 0).all()
    assert (panel.regenerated[hidden] == 0.5).all()
    np.testing.assert_array_equal(panel.regenerated[~hidden], panel.original[~hidden])


def test_the_batch_size_changes_nothing():
    images = draw(codes(20))
    masked = MaskedImages(images, hidden_patches(20, 9, mask_ratio=0.6, seed=0), 8)
    np.testing.assert_array_equal(
        regenerate(OracleEncoder(), masked, batch_size=3), regenerate(OracleEncoder(), masked, batch_size=64)
    )


def test_the_learning_curve_number_is_the_reports():
    assert mean_psnr_db(context(ConstantEncoder())) == evaluate_regeneration(context(ConstantEncoder())).values["psnr_db"]


def test_masks_of_any_number_of_patches_are_drawn_together_as_alone():
    """Rows that hide 0, 3, 8, 3 and 9 patches, with reports of their own: the oracle asserts that a batch hides alike."""

    class Marked(OracleEncoder):
        def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
            super().regenerate(image_BSS, hidden_BP)
            return image_BSS * 0.5 + hidden_BP.float().mean(dim=1)[:, None, None] / 4 + words_BL.sum(dim=1)[:, None, None] / 400

    masked = masked_images(5)
    words = [np.arange(2, 4 + row) for row in range(5)]
    hidden_NP = np.stack([np.arange(9) < number for number in (0, 3, 8, 3, 9)])
    masked = MaskedImages(masked.images, hidden_NP, 8)
    together = regenerate(Marked(), masked, words, batch_size=2)
    for row in range(5):
        alone = regenerate(Marked(), masked.take(np.array([row])), words[row : row + 1])
        np.testing.assert_array_equal(together[row], alone[0])
    np.testing.assert_array_equal(together[0], masked.truth[0])


class Halfway(OracleEncoder):
    """Every pixel half way to white, and beyond what a pixel can be."""

    def regenerate(self, image_BSS: Tensor, hidden_BP: Tensor, words_BL: Tensor | None = None) -> Tensor:
        return self.scale * (0.5 * image_BSS + 0.7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(0.05, 0.95))
def test_the_scores_of_random_images_are_a_loops_over_their_hidden_pixels(seed, num, mask_ratio):
    images = np.random.default_rng(seed).integers(0, 256, (num, 24, 24)).astype(np.uint8)
    masked = MaskedImages(images, hidden_patches(num, 9, mask_ratio=mask_ratio, seed=seed), 8)
    scores = quality(masked.truth, regenerate(Halfway(), masked, batch_size=2), masked.hidden)
    for i in range(num):
        errors, picture = [], images[i] / 255
        for row in range(24):
            for column in range(24):
                if masked.hidden_NP[i, 3 * (row // 8) + column // 8]:
                    picture[row, column] = min(1.0, 0.5 * images[i, row, column] / 255 + 0.7)
                    errors.append((picture[row, column] - images[i, row, column] / 255) ** 2)
        assert scores.psnr_db[i] == pytest.approx(-10 * np.log10(sum(errors) / len(errors)), rel=1e-5)
        assert scores.ssim[i] == pytest.approx(structural_similarity(images[i] / 255, picture, data_range=1.0), abs=1e-5)
