"""Image regeneration: patches are hidden by fixed seeded masks, and predicted from the rest, with and without the report.

PSNR counts hidden pixels only; SSIM is of the composed picture (truth where visible, prediction where hidden). Both are
means over images. Predictions are clamped to 0..1; no statistic of a hidden patch is used to draw it.

Baselines see what the model sees, visible pixels and a public mean image: the mean image; the mean image with the
gain and offset that fit the visible pixels best; smoothing of the visible pixels into the gaps; and the fitted mean
image with its visible error smoothed into the gaps. The width of the smoothing is the one with the best PSNR on this
very test, a choice in the baseline's favour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from fedmix.evaluation import metrics
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    Findings,
    NotEvaluableError,
    Report,
    device_of,
    evaluating,
    padded,
    pixels,
    random_for,
)

SMOOTHING_WIDTHS = (0.375, 0.625, 1.0)  # in patches: 3, 5 and 8 pixels for the trial's patches of 8
Images = NDArray[np.float32]  # [N, S, S] in 0..1


@dataclass(frozen=True)
class Quality:
    """PSNR in dB on hidden pixels and SSIM of the composed picture, of each image: [N] both."""

    psnr_db: NDArray[np.float64]
    ssim: NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """Pictures [n, S, S] in 0..1 for the report; hidden pixels are 0 in ``masked``."""

    original: Images
    masked: Images
    regenerated: Images
    regenerated_with_report: Images | None


def hidden_patches(num_images: int, num_patches: int, *, mask_ratio: float, seed: int) -> NDArray[np.bool_]:
    """Bool [N, P], True where hidden: the same number in every row, at least one hidden and one visible."""
    num_hidden = int(np.clip(round(mask_ratio * num_patches), 1, num_patches - 1))
    ranks = random_for(seed, "hidden patches").random((num_images, num_patches)).argsort(axis=1).argsort(axis=1)
    return ranks < num_hidden


def hidden_pixels(hidden_NP: NDArray[np.bool_], patch_size: int) -> NDArray[np.bool_]:
    """Bool [N, S, S] of the patches [N, P], which are numbered row by row."""
    side = round(hidden_NP.shape[1] ** 0.5)
    grid = hidden_NP.reshape(-1, side, side)
    return grid.repeat(patch_size, axis=1).repeat(patch_size, axis=2)


@dataclass(frozen=True)
class MaskedImages:
    """Images uint8 [N, S, S] and which of their patches are hidden, bool [N, P]."""

    images: NDArray[np.uint8]
    hidden_NP: NDArray[np.bool_]
    patch_size: int

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def truth(self) -> Images:
        """The images in 0..1."""
        return self.images.astype(np.float32) / np.float32(255)

    @cached_property
    def hidden(self) -> NDArray[np.bool_]:
        """Bool [N, S, S], True for hidden pixels."""
        return hidden_pixels(self.hidden_NP, self.patch_size)

    def take(self, rows: NDArray[np.int64]) -> MaskedImages:
        """Only these images."""
        return MaskedImages(self.images[rows], self.hidden_NP[rows], self.patch_size)


def regenerate(
    encoder: Encoder, masked: MaskedImages, words: Sequence[NDArray[np.int64]] | None = None, *, batch_size: int = 256
) -> Images:
    """The composed pictures: truth where visible, the encoder's clamped prediction where hidden. Any masks will do."""
    device = device_of(encoder)
    predicted = np.empty(masked.images.shape, np.float32)
    with evaluating(encoder):
        for rows in _alike(masked.hidden_NP, batch_size):
            hidden_BP = torch.from_numpy(masked.hidden_NP[rows]).to(device)
            words_BL = None if words is None else padded([words[row] for row in rows], device)
            drawn = encoder.regenerate(pixels(masked.images[rows], device), hidden_BP, words_BL)
            predicted[rows] = drawn.float().cpu().numpy()
    if not np.isfinite(predicted).all():
        raise NotEvaluableError("the regenerated images are not finite; training has probably diverged")
    return compose(masked.truth, predicted, masked.hidden)


def _alike(hidden_NP: NDArray[np.bool_], batch_size: int) -> list[NDArray[np.int64]]:
    """Rows in batches that hide equally many patches each: visible patches only enter a model as one array."""
    num_hidden = hidden_NP.sum(axis=1)
    groups = [np.flatnonzero(num_hidden == number) for number in np.unique(num_hidden)]
    return [rows[start : start + batch_size] for rows in groups for start in range(0, len(rows), batch_size)]


def compose(truth: Images, predicted: NDArray[np.floating], hidden: NDArray[np.bool_]) -> Images:
    """Truth where visible, the clamped prediction where hidden."""
    return np.where(hidden, np.clip(predicted, 0, 1), truth).astype(np.float32)


def hidden_psnr(truth: Images, composed: Images, hidden: NDArray[np.bool_]) -> NDArray[np.float64]:
    """PSNR in dB [N], on hidden pixels only."""
    return np.array([metrics.psnr(t[h], c[h]) for t, c, h in zip(truth, composed, hidden, strict=True)])


def quality(truth: Images, composed: Images, hidden: NDArray[np.bool_]) -> Quality:
    """Both scores of each composed picture."""
    similarity = np.array([metrics.ssim(t, c) for t, c in zip(truth, composed, strict=True)])
    return Quality(hidden_psnr(truth, composed, hidden), similarity)


def fit_mean_image(images: Images, hidden: NDArray[np.bool_], mean_image: NDArray[np.floating]) -> Images:
    """The mean image with the gain and offset, per picture, that fit the visible pixels best in least squares."""
    visible = ~hidden
    count = visible.sum(axis=(1, 2))
    of_mean = (visible * mean_image).sum(axis=(1, 2)) / count
    of_image = np.where(visible, images, 0).sum(axis=(1, 2)) / count
    mean_offset = np.where(visible, mean_image - of_mean[:, None, None], 0)
    covariance = (mean_offset * np.where(visible, images - of_image[:, None, None], 0)).sum(axis=(1, 2))
    variance = (mean_offset**2).sum(axis=(1, 2))
    # Where the visible part of the mean image is flat there is no gain to fit; it keeps its own contrast.
    gain = np.divide(covariance, variance, out=np.ones_like(variance), where=variance > 1e-8)
    fitted = of_image[:, None, None] + gain[:, None, None] * (mean_image - of_mean[:, None, None])
    return np.asarray(fitted, np.float32)


def smooth_into_gaps(values: Images, hidden: NDArray[np.bool_], width: float) -> Images:
    """Each pixel as the Gaussian-weighted mean of the visible values of its picture; ``width`` is the sigma in pixels.

    As two matrix products: a Gaussian separates into rows and columns, and dividing by the smoothed mask needs no rule
    for borders. Where float32 sees no weight at all it is the plain mean of the visible values.
    """
    place = np.arange(values.shape[-1])
    kernel = np.exp(-(((place[:, None] - place) / width) ** 2) / 2).astype(np.float32)
    visible = (~hidden).astype(np.float32)
    seen = np.where(hidden, np.float32(0), values)
    weight = kernel @ visible @ kernel
    plain = np.empty_like(seen)
    plain[:] = (seen.sum(axis=(1, 2)) / visible.sum(axis=(1, 2)))[:, None, None]
    filled: Images = np.divide(kernel @ seen @ kernel, weight, out=plain, where=weight > 1e-30)
    return filled


def baseline_pictures(masked: MaskedImages, mean_image: NDArray[np.float32]) -> dict[str, list[Images]]:
    """Composed pictures of each baseline; several candidates where a width is still to be chosen."""
    images, hidden = masked.truth, masked.hidden
    fitted = fit_mean_image(images, hidden, mean_image)
    widths = [relative * masked.patch_size for relative in SMOOTHING_WIDTHS]
    predictions = {
        "mean_image": [np.broadcast_to(mean_image, images.shape)],
        "mean_image_fitted": [fitted],
        "interpolation": [smooth_into_gaps(images, hidden, width) for width in widths],
        "mean_image_fitted_and_interpolation": [fitted + smooth_into_gaps(images - fitted, hidden, width) for width in widths],
    }
    return {name: [compose(images, candidate, hidden) for candidate in several] for name, several in predictions.items()}


def baseline_quality(masked: MaskedImages, mean_image: NDArray[np.float32]) -> dict[str, Quality]:
    """Scores of each baseline's best candidate."""

    def mean_psnr(picture: Images) -> float:
        return float(hidden_psnr(masked.truth, picture, masked.hidden).mean())

    candidates = baseline_pictures(masked, mean_image)
    return {name: quality(masked.truth, max(several, key=mean_psnr), masked.hidden) for name, several in candidates.items()}


def quality_report(scores: Quality, weights: NDArray[np.float64]) -> Report:
    """Means over images with their intervals."""
    report: Report = {"psnr_db": float(scores.psnr_db.mean())}
    report |= metrics.interval(metrics.resampled_mean(scores.psnr_db, weights), "psnr_db_ci95")
    report["ssim"] = float(scores.ssim.mean())
    return report | metrics.interval(metrics.resampled_mean(scores.ssim, weights), "ssim_ci95")


def masked_test_images(context: EvaluationContext) -> tuple[NDArray[np.int64], MaskedImages]:
    """The chosen test studies with an image, and their images under the fixed masks."""
    settings, patch_size = context.settings, context.encoder.patch_size
    studies = context.test_studies(image=True, most=settings.max_images_regeneration)
    num_patches = (context.encoder.image_size // patch_size) ** 2
    hidden_NP = hidden_patches(len(studies), num_patches, mask_ratio=settings.mask_ratio, seed=settings.seed)
    return studies, MaskedImages(context.held_out.images_of(studies), hidden_NP, patch_size)


def mean_psnr_db(context: EvaluationContext) -> float:
    """PSNR without a report and nothing else, for learning curves."""
    _, masked = masked_test_images(context)
    drawn = regenerate(context.encoder, masked, batch_size=context.settings.batch_size)
    return float(hidden_psnr(masked.truth, drawn, masked.hidden).mean())


def evaluate_regeneration(context: EvaluationContext) -> Findings:
    """Regeneration of test images next to its baselines, and with the report for the studies that have one."""
    held_out, settings = context.held_out, context.settings
    studies, masked = masked_test_images(context)
    drawn = regenerate(context.encoder, masked, batch_size=settings.batch_size)
    scores = quality(masked.truth, drawn, masked.hidden)
    rng = random_for(settings.seed, "regeneration bootstrap")
    weights = metrics.patient_weights(held_out.patient[studies], settings.num_bootstrap, rng)
    report = quality_report(scores, weights)
    report |= {"mask_ratio": float(masked.hidden_NP[0].mean()), "num_images": len(masked)}
    assert held_out.mean_image is not None  # HeldOut asks for it where there are images
    baselines = baseline_quality(masked, held_out.mean_image.astype(np.float32))
    report["baselines"] = {name: quality_report(baseline, weights) for name, baseline in baselines.items()}
    report |= _gain_over_best(scores, baselines, weights)
    rows = np.flatnonzero(held_out.has_text[studies])
    if not len(rows):
        shown = np.arange(min(len(masked), settings.num_examples))
        reason = "no test study with an image has a report"
        return Findings(report, examples=_panel(masked.take(shown), drawn[shown], None), skipped={"with_report": reason})
    words = held_out.words_of(studies[rows])
    told_drawn = regenerate(context.encoder, masked.take(rows), words, batch_size=settings.batch_size)
    told = quality(masked.truth[rows], told_drawn, masked.hidden[rows])
    report["with_report"] = _with_report(told, scores.psnr_db[rows], weights[:, rows])
    shown = rows[: settings.num_examples]
    return Findings(report, examples=_panel(masked.take(shown), drawn[shown], told_drawn[: len(shown)]))


def _panel(masked: MaskedImages, drawn: Images, drawn_with_report: Images | None) -> Panel:
    dimmed = np.where(masked.hidden, np.float32(0), masked.truth)
    return Panel(original=masked.truth, masked=dimmed, regenerated=drawn, regenerated_with_report=drawn_with_report)


def _gain_over_best(scores: Quality, baselines: dict[str, Quality], weights: NDArray[np.float64]) -> Report:
    name = max(baselines, key=lambda baseline: float(baselines[baseline].psnr_db.mean()))
    gain = scores.psnr_db - baselines[name].psnr_db
    report = {"best_baseline": name, "gain_over_best_baseline_db": float(gain.mean())}
    return report | metrics.interval(metrics.resampled_mean(gain, weights), "gain_over_best_baseline_db_ci95")


def _with_report(told: Quality, untold_psnr_db: NDArray[np.float64], weights: NDArray[np.float64]) -> Report:
    """Scores with the report, and the gain over the same images and masks without it."""
    gain = told.psnr_db - untold_psnr_db
    report = quality_report(told, weights) | {"num_images": len(gain), "gain_psnr_db": float(gain.mean())}
    return report | metrics.interval(metrics.resampled_mean(gain, weights), "gain_psnr_db_ci95")
