"""The leakage audit of one trained model: membership inference, re-linkage, and what they prove about epsilon.

An attack that fails proves nothing: a better one may succeed. What is found here bounds the leak from below, as the epsilon
of an accountant bounds it from above (science: Jagielski et al. 2020, 2006.07709).

A site's update is seen by whoever receives it without a secure sum, and tells more than the model that comes of many. Canaries
have a file of their own (canaries.py): they need to be planted first.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedmix.errors import DataError
from fedmix.evaluation import metrics
from fedmix.evaluation.attack import MIN_PATIENTS, choosing_half, epsilon_report
from fedmix.evaluation.features import Encoder, Report, Vocabulary, encode_images, encode_texts, random_for
from fedmix.evaluation.membership import AuditSettings, membership_report, membership_scores, patient_scores
from fedmix.evaluation.retrieval import expected_hits, score_blocks, split_galleries
from fedmix.evaluation.subjects import Subjects
from fedmix.evaluation.word_recovery import recovery_report
from fedmix.model.encoder import MixedModel

SCHEMA = 1


def audit(
    encoder: Encoder,
    subjects: Subjects,
    vocabulary: Vocabulary,
    *,
    reference: Encoder | None = None,
    settings: AuditSettings | None = None,
) -> Report:
    """The content of leakage.json; ``reference`` is a model of the same vocabulary and image size that saw none of them."""
    settings = settings or AuditSettings()
    ratios, membership = _membership(encoder, reference, subjects, vocabulary, settings)
    _, is_member = patient_scores(ratios, subjects)
    by_patient, _ = patient_scores(ratios, subjects, choosing_half(is_member, settings.seed))
    report: Report = {
        "schema": SCHEMA,
        "has_reference": reference is not None,
        "subjects": subjects.counts(),
        "membership": membership,
        "relinkage": relinkage_report(encoder, subjects, settings),
        "epsilon": epsilon_report(is_member, by_patient, delta=settings.delta, seed=settings.seed),
        "settings": {name: getattr(settings, name) for name in ("num_draws", "mask_ratio", "text_mask_ratio", "seed")},
    }
    if reference is not None:
        report["relinkage"]["control"] = relinkage_report(reference, subjects, settings)
    return report


def update_report(
    update: tuple[MixedModel, MixedModel],
    subjects: Subjects,
    vocabulary: Vocabulary,
    seen: NDArray[np.integer],
    *,
    settings: AuditSettings | None = None,
) -> Report:
    """What one site's update gives away: who was trained on, and which words its reports hold.

    ``update``: the model as the site got it and as it sent it back. ``seen``: word ids of the site's training
    reports, in any order. Raises DataError for models of different sizes.
    """
    base, moved = (model.embed_text.word.weight.detach().cpu().numpy() for model in update)
    if base.shape != moved.shape:
        raise DataError("the models before and after the update have other vocabularies or widths; name two of one run")
    _, membership = _membership(update[1], update[0], subjects, vocabulary, settings or AuditSettings())
    report: Report = {"membership": membership}
    if len(np.setdiff1d(seen, sorted(vocabulary.special_ids))):
        report["words"] = recovery_report(moved - base, base, seen, vocabulary.special_ids)
    return report


def _membership(
    encoder: Encoder, reference: Encoder | None, subjects: Subjects, vocabulary: Vocabulary, settings: AuditSettings
) -> tuple[Mapping[str, NDArray[np.float64]], Report]:
    """Scores of each study, in relation to a reference's where there is one, and how well they tell members from others."""
    scores = membership_scores(encoder, subjects, vocabulary, settings)
    if reference is None:
        return scores, membership_report(scores, subjects, None, settings)
    compared = membership_scores(reference, subjects, vocabulary, settings)
    ratios = {kind: values - compared[kind] for kind, values in scores.items()}
    return ratios, membership_report(ratios, subjects, compared, settings)


def relinkage_report(encoder: Encoder, subjects: Subjects, settings: AuditSettings) -> Report:
    """How often an image's own report is ranked first, among members and among others, in galleries of one size.

    Whoever holds the model can put names to images with it; what it does better for members than for others it has learnt by
    heart (2606.02276). Each gallery holds at most one pair of a patient.
    """
    sides = [_one_pair_a_patient(subjects, side, settings.seed) for side in (subjects.is_member, ~subjects.is_member)]
    size = min(settings.gallery, *(len(studies) for studies in sides))
    if size < MIN_PATIENTS:
        reason = f"not enough data: {min(map(len, sides))} patients with a pair on the smaller side, at least {MIN_PATIENTS}"
        return {"difference_r@1": None, "difference_r@1_ci95": None, "reason": f"{reason} are needed"}
    hits = [_hits(encoder, subjects, studies, size, settings) for studies in sides]
    rng = random_for(settings.seed, "relinkage bootstrap")
    resampled = [
        metrics.resampled_mean(found, metrics.patient_weights(np.arange(len(found)), settings.num_bootstrap, rng))
        for found in hits
    ]
    report: Report = {"difference_r@1": float(hits[0].mean() - hits[1].mean())}
    report |= metrics.interval(resampled[0] - resampled[1], "difference_r@1_ci95")
    for name, found, samples in zip(("members", "non_members"), hits, resampled, strict=True):
        report |= {f"{name}_r@1": float(found.mean()), f"num_{name}": len(found)}
        report |= metrics.interval(samples, f"{name}_r@1_ci95")
    return report | {"gallery": size, "chance": 1 / size}


def _one_pair_a_patient(subjects: Subjects, side: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """A pair of each patient of a side, drawn by the seed."""
    pairs = np.flatnonzero(side & subjects.has_image & subjects.has_text)
    pairs = random_for(seed, "pair of each patient").permutation(pairs)
    _, first = np.unique(subjects.patient[pairs], return_index=True)
    return np.sort(pairs[first]).astype(np.int64)


def _hits(
    encoder: Encoder, subjects: Subjects, studies: NDArray[np.int64], size: int, settings: AuditSettings
) -> NDArray[np.float64]:
    """Chance that each query finds its report first, over galleries of ``size`` pairs."""
    image = encode_images(encoder, subjects.images_of(studies), batch_size=settings.batch_size)
    text = encode_texts(encoder, subjects.words_of(studies), batch_size=settings.batch_size)
    galleries = split_galleries(len(studies), size, settings.seed)
    return np.concatenate(
        [expected_hits(scores, 1, own) for rows in galleries for own, scores in score_blocks(image[rows], text[rows])]
    )
