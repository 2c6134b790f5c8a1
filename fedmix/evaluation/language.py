"""Masked language modelling: how many bits the encoder needs for a hidden word, from the words around it and the image.

Masks are fixed by the seed: 15 % of a text's words, at least one, always replaced by the mask id (BERT's random and
kept words would only add noise to a measurement). Bits per token is a sum over all hidden words divided by their
number, so a long report weighs more than a short one. The baseline is a unigram: word frequencies of the probe-train
reports with one added to each count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from fedmix.evaluation import metrics
from fedmix.evaluation.features import (
    Encoder,
    EvaluationContext,
    Findings,
    NotEvaluableError,
    Report,
    Vocabulary,
    batches_by_length,
    device_of,
    evaluating,
    padded,
    pixels,
    random_for,
)

MAX_LOGITS = 50_000_000  # of one batch: 200 MB in float32, whatever the vocabulary


@dataclass(frozen=True)
class WordScores:
    """Of each text [N]: bits of its hidden words, how many were ranked first, and how many were hidden."""

    bits: NDArray[np.float64]
    num_right: NDArray[np.float64]
    num_hidden: NDArray[np.float64]

    def take(self, rows: NDArray[np.int64]) -> WordScores:
        """Only these texts."""
        return WordScores(self.bits[rows], self.num_right[rows], self.num_hidden[rows])


def hidden_words(
    words: Sequence[NDArray[np.int64]], special_ids: frozenset[int], *, mask_ratio: float, seed: int
) -> list[NDArray[np.bool_]]:
    """Of each text a bool [L], True where a word is hidden; all False for a text of special ids only."""
    rng = random_for(seed, "hidden words")
    special = np.array(sorted(special_ids), np.int64)
    hidden = []
    for ids in words:
        candidates = rng.permutation(np.flatnonzero(~np.isin(ids, special)))
        is_hidden = np.zeros(len(ids), bool)
        is_hidden[candidates[: max(1, round(mask_ratio * len(candidates)))]] = True
        hidden.append(is_hidden)
    return hidden


def score_words(
    encoder: Encoder,
    words: Sequence[NDArray[np.int64]],
    hidden: Sequence[NDArray[np.bool_]],
    images: NDArray[np.uint8] | None = None,
    *,
    vocabulary: Vocabulary,
    batch_size: int = 256,
) -> WordScores:
    """Bits and first ranks of the hidden words of each text, given the rest and, if handed over, its image."""
    device = device_of(encoder)
    masked = [np.where(is_hidden, vocabulary.mask_id, ids) for ids, is_hidden in zip(words, hidden, strict=True)]
    longest = max(map(len, words))
    batch_size = min(batch_size, max(1, MAX_LOGITS // (longest * vocabulary.vocab_size)))
    bits, num_right = np.zeros(len(words)), np.zeros(len(words))
    with evaluating(encoder):
        for rows in batches_by_length(words, batch_size):
            logits_BLV = encoder.word_logits(
                padded([masked[row] for row in rows], device), None if images is None else pixels(images[rows], device)
            )
            hidden_BL = padded([hidden[row].astype(np.int64) for row in rows], device).bool()
            truth = padded([words[row] for row in rows], device)[hidden_BL]
            logits = logits_BLV[hidden_BL].float()
            text = rows[hidden_BL.nonzero()[:, 0].cpu().numpy()]
            np.add.at(bits, text, F.cross_entropy(logits, truth, reduction="none").double().cpu().numpy() / np.log(2))
            np.add.at(num_right, text, (logits.argmax(dim=-1) == truth).double().cpu().numpy())
    if not np.isfinite(bits).all():
        raise NotEvaluableError("the word scores are not finite; training has probably diverged")
    return WordScores(bits, num_right, np.array([is_hidden.sum() for is_hidden in hidden], np.float64))


def unigram_scores(
    words: Sequence[NDArray[np.int64]],
    hidden: Sequence[NDArray[np.bool_]],
    known_words: Sequence[NDArray[np.int64]],
    *,
    vocabulary: Vocabulary,
) -> WordScores:
    """What the frequencies of the words of other reports achieve on the same hidden words."""
    is_word = np.ones(vocabulary.vocab_size, bool)
    is_word[sorted(vocabulary.special_ids)] = False
    counts = np.bincount(np.concatenate([*known_words, np.zeros(0, np.int64)]), minlength=vocabulary.vocab_size) + 1.0
    bits_of = -np.log2(np.where(is_word, counts, 1) / counts[is_word].sum())
    commonest = int(np.argmax(np.where(is_word, counts, 0)))
    pairs = list(zip(words, hidden, strict=True))
    return WordScores(
        bits=np.array([bits_of[ids[is_hidden]].sum() for ids, is_hidden in pairs]),
        num_right=np.array([(ids[is_hidden] == commonest).sum() for ids, is_hidden in pairs], np.float64),
        num_hidden=np.array([is_hidden.sum() for is_hidden in hidden], np.float64),
    )


def word_report(scores: WordScores, weights: NDArray[np.float64]) -> Report:
    """Bits per hidden word with their interval, and the share ranked first."""
    num_hidden = scores.num_hidden.sum()
    report: Report = {"bits_per_token": float(scores.bits.sum() / num_hidden)}
    report |= metrics.interval(metrics.resampled_ratio(scores.bits, scores.num_hidden, weights))
    report |= {"top1": float(scores.num_right.sum() / num_hidden)}
    return report | {"num_texts": len(scores.bits), "num_tokens": int(num_hidden)}


def bits_per_token(context: EvaluationContext) -> float:
    """Bits per hidden word without the image and nothing else, for learning curves."""
    _, words, hidden = _maskable(context)
    size = context.settings.batch_size
    scores = score_words(context.encoder, words, hidden, vocabulary=context.vocabulary, batch_size=size)
    return float(scores.bits.sum() / scores.num_hidden.sum())


def evaluate_language(context: EvaluationContext) -> Findings:
    """Hidden words of test reports, without and with the image for those that have one."""
    encoder, held_out, settings = context.encoder, context.held_out, context.settings
    studies, words, hidden = _maskable(context)
    alone = score_words(encoder, words, hidden, vocabulary=context.vocabulary, batch_size=settings.batch_size)
    rng = random_for(settings.seed, "language bootstrap")
    weights = metrics.patient_weights(held_out.patient[studies], settings.num_bootstrap, rng)
    known = held_out.words_of(np.flatnonzero(held_out.is_probe_train & held_out.has_text))
    unigram = unigram_scores(words, hidden, known, vocabulary=context.vocabulary)
    report = word_report(alone, weights) | {"mask_ratio": settings.text_mask_ratio}
    report["baselines"] = {"unigram": word_report(unigram, weights)}
    rows = np.flatnonzero(held_out.has_image[studies])
    if not len(rows):
        return Findings(report, skipped={"with_image": "no test study with a report has an image"})
    seen = score_words(
        encoder,
        [words[row] for row in rows],
        [hidden[row] for row in rows],
        held_out.images_of(studies[rows]),
        vocabulary=context.vocabulary,
        batch_size=settings.batch_size,
    )
    report["with_image"] = _with_image(seen, alone.take(rows), weights[:, rows])
    return Findings(report)


def _maskable(
    context: EvaluationContext,
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]], list[NDArray[np.bool_]]]:
    """The test studies whose report has a word to hide, their words, and which of them are hidden."""
    settings = context.settings
    studies = context.test_studies(text=True, most=settings.max_texts_language)
    words = context.held_out.words_of(studies)
    hidden = hidden_words(words, context.vocabulary.special_ids, mask_ratio=settings.text_mask_ratio, seed=settings.seed)
    rows = np.flatnonzero([is_hidden.any() for is_hidden in hidden])
    if not len(rows):
        raise NotEvaluableError("no test report has a word that could be hidden")
    return studies[rows], [words[row] for row in rows], [hidden[row] for row in rows]


def _with_image(seen: WordScores, alone: WordScores, weights: NDArray[np.float64]) -> Report:
    """Scores with the image, and the bits it saves on the same hidden words."""
    saved = alone.bits - seen.bits
    report = word_report(seen, weights) | {"bits_saved": float(saved.sum() / seen.num_hidden.sum())}
    return report | metrics.interval(metrics.resampled_ratio(saved, seen.num_hidden, weights), "bits_saved_ci95")
