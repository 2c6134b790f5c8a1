"""Membership inference: was this study, or this patient, in the training? One score for each kind of data.

A model that was trained on a study tends to fill its hidden words and patches better and to place its image and report closer
together. Hard studies score low wherever they come from, so a reference model that never saw them is subtracted where one is
given, a likelihood ratio (Mireshghallah et al. 2022, 2203.03929):

- ``text``: bits saved on hidden words, the mean over words and several draws of what is hidden;
- ``image``: PSNR in dB of hidden patches. For normal errors of fitted width the log likelihood is a multiple of it;
- ``pair``: cosine between the embeddings of an image and its own report;
- ``patient``: all of these of all the patient's studies as one number (Stouffer 1949), each standardised by the others.

Every score is higher where membership is likelier. NaN stands for what a study does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmix.errors import ConfigError
from fedmix.evaluation.attack import attack_report
from fedmix.evaluation.features import Encoder, Report, Vocabulary, encode_images, encode_texts, random_for
from fedmix.evaluation.language import hidden_words, score_words
from fedmix.evaluation.regeneration import MaskedImages, hidden_patches, hidden_psnr, regenerate
from fedmix.evaluation.subjects import Subjects

Scores = Mapping[str, NDArray[np.float64]]  # kind -> [N]


@dataclass(frozen=True)
class AuditSettings:
    """How hard to try; the same for the model and its reference."""

    num_draws: int = 4  # masks of each study; one draw would hide most of what a model knows of it
    mask_ratio: float = 0.75  # share of patches hidden (MAE)
    text_mask_ratio: float = 0.15  # share of words hidden (BERT)
    gallery: int = 200  # pairs that a re-linkage query chooses from
    delta: float = 1e-5  # at which the bound of epsilon is stated
    num_bootstrap: int = 400
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        if min(self.num_draws, self.gallery, self.batch_size) < 1 or not 0 <= self.delta < 1:
            raise ConfigError("an audit needs at least one draw, a gallery of one, a batch of one, and delta from 0 to below 1")
        if not (0 < self.mask_ratio < 1 and 0 < self.text_mask_ratio < 1):
            raise ConfigError("an audit hides more than none and less than all of a study; give mask ratios between 0 and 1")


def membership_scores(
    encoder: Encoder, subjects: Subjects, vocabulary: Vocabulary, settings: AuditSettings
) -> dict[str, NDArray[np.float64]]:
    """What one model says of each study, by kind; kinds that no study has are left out."""
    scores: dict[str, NDArray[np.float64]] = {}
    if subjects.has_text.any():
        scores["text"] = _word_scores(encoder, subjects, vocabulary, settings)
    if subjects.has_image.any():
        scores["image"] = _patch_scores(encoder, subjects, settings)
    if (subjects.has_image & subjects.has_text).any():
        scores["pair"] = _pair_scores(encoder, subjects, settings)
    return scores


def patient_scores(
    scores: Scores, subjects: Subjects, fitted_on: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """One score for each patient, the sum of its standard scores over the root of their number, and who is a member.

    Mean and deviation are the non-members', whom an attacker is taken to know the like of; of those patients only that are
    ``fitted_on`` (bool, one a patient in the order of their numbers), where the others are to be counted.
    """
    _, first, row_patient = np.unique(subjects.patient, return_index=True, return_inverse=True)
    is_fitted = np.ones(len(first), bool) if fitted_on is None else fitted_on
    others = ~subjects.is_member & is_fitted[row_patient]
    standard = np.stack([_standardised(values, others) for values in scores.values()], axis=1)
    is_known = np.isfinite(standard)
    sums = np.bincount(row_patient, np.where(is_known, standard, 0).sum(axis=1))
    counts = np.bincount(row_patient, is_known.sum(axis=1))
    # A patient of whom nothing is known scores as the average other.
    return sums / np.sqrt(np.maximum(counts, 1)), subjects.is_member[first]


def hidden_psnr_of(encoder: Encoder, images: NDArray[np.uint8], settings: AuditSettings) -> NDArray[np.float64]:
    """PSNR [N] of the hidden patches of images [N, S, S], a mean over draws of what is hidden."""
    num_patches = (encoder.image_size // encoder.patch_size) ** 2
    total = np.zeros(len(images))
    for draw in range(settings.num_draws):
        hidden_NP = hidden_patches(len(images), num_patches, mask_ratio=settings.mask_ratio, seed=_seed(settings, draw))
        masked = MaskedImages(images, hidden_NP, encoder.patch_size)
        drawn = regenerate(encoder, masked, batch_size=settings.batch_size)
        total += hidden_psnr(masked.truth, drawn, masked.hidden)
    return total / settings.num_draws


def membership_report(scores: Scores, subjects: Subjects, control: Scores | None, settings: AuditSettings) -> Report:
    """The attack by kind and on whole patients.

    ``control``: what a model that saw nobody says of the same studies. Where that tells members from others, the two differ
    by themselves, and what the attack finds is not all memory.
    """
    report = _attacks(scores, subjects, settings)
    if control is not None:
        for kind, found in _attacks(control, subjects, settings).items():
            report[kind]["control"] = found
    return report


def _attacks(scores: Scores, subjects: Subjects, settings: AuditSettings) -> Report:
    report = {kind: _attack(values, subjects.is_member, subjects.patient, settings) for kind, values in scores.items()}
    by_patient, is_member = patient_scores(scores, subjects)
    return report | {"patient": _attack(by_patient, is_member, np.arange(len(by_patient)), settings)}


def _attack(
    values: NDArray[np.float64], is_member: NDArray[np.bool_], patient: NDArray[np.generic], settings: AuditSettings
) -> Report:
    known = np.isfinite(values)
    return attack_report(
        is_member[known], values[known], patient[known], num_bootstrap=settings.num_bootstrap, seed=settings.seed
    )


def _standardised(values: NDArray[np.float64], is_other: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Values in deviations of these non-members; zero where they are all alike or none has a value."""
    others = values[is_other & np.isfinite(values)]
    if not len(others) or others.std() < 1e-12:
        return np.where(np.isfinite(values), 0.0, np.nan)
    standard: NDArray[np.float64] = (values - others.mean()) / others.std()
    return standard


def _seed(settings: AuditSettings, draw: int) -> int:
    return int(random_for(settings.seed, f"audit draw {draw}").integers(2**31))


def _word_scores(encoder: Encoder, subjects: Subjects, vocabulary: Vocabulary, settings: AuditSettings) -> NDArray[np.float64]:
    studies = np.flatnonzero(subjects.has_text)
    words = subjects.words_of(studies)
    bits, num_hidden = np.zeros(len(studies)), np.zeros(len(studies))
    for draw in range(settings.num_draws):
        hidden = hidden_words(words, vocabulary.special_ids, mask_ratio=settings.text_mask_ratio, seed=_seed(settings, draw))
        scored = score_words(encoder, words, hidden, vocabulary=vocabulary, batch_size=settings.batch_size)
        bits, num_hidden = bits + scored.bits, num_hidden + scored.num_hidden
    scores = np.full(len(subjects), np.nan)
    scores[studies[num_hidden > 0]] = -bits[num_hidden > 0] / num_hidden[num_hidden > 0]
    return scores


def _patch_scores(encoder: Encoder, subjects: Subjects, settings: AuditSettings) -> NDArray[np.float64]:
    studies = np.flatnonzero(subjects.has_image)
    scores = np.full(len(subjects), np.nan)
    scores[studies] = hidden_psnr_of(encoder, subjects.images_of(studies), settings)
    return scores


def _pair_scores(encoder: Encoder, subjects: Subjects, settings: AuditSettings) -> NDArray[np.float64]:
    studies = np.flatnonzero(subjects.has_image & subjects.has_text)
    image = encode_images(encoder, subjects.images_of(studies), batch_size=settings.batch_size)
    text = encode_texts(encoder, subjects.words_of(studies), batch_size=settings.batch_size)
    scores = np.full(len(subjects), np.nan)
    scores[studies] = (image.astype(np.float64) * text).sum(axis=1)
    return scores
