"""Planted texts: how much likelier a model finds one that it was trained on than its random sisters (1802.08232).

Plant random token sequences in synthetic patients before training, keep many more that were drawn alike and never used, and
rank the planted ones among them afterwards. A masked model has no likelihood of a text; the sum over words, each hidden in
turn and told from all others, stands in (Salazar et al. 2020, 1910.14659).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmix.errors import DataError
from fedmix.evaluation.features import Encoder, Report, Vocabulary
from fedmix.evaluation.language import score_words


def text_bits(
    encoder: Encoder, texts: Sequence[NDArray[np.int64]], vocabulary: Vocabulary, *, batch_size: int = 256
) -> NDArray[np.float64]:
    """Bits [N] of whole texts: the sum over their words, each hidden alone. Special ids count for nothing."""
    special = np.array(sorted(vocabulary.special_ids), np.int64)
    places = [(text, place) for text, ids in enumerate(texts) for place in np.flatnonzero(~np.isin(ids, special))]
    if not places:
        raise DataError("no canary holds a word that could be hidden; canaries are made of words of the model's vocabulary")
    words = [texts[text] for text, _ in places]
    hidden = [np.arange(len(ids)) == place for ids, (_, place) in zip(words, places, strict=True)]
    scores = score_words(encoder, words, hidden, vocabulary=vocabulary, batch_size=batch_size)
    bits = np.zeros(len(texts))
    np.add.at(bits, [text for text, _ in places], scores.bits)
    return bits


def exposures(planted_bits: NDArray[np.floating], candidate_bits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Exposure [planted]: log2 of the number of texts less log2 of the rank among itself and the candidates.

    Equal bits share the mean of their ranks. The most there can be is log2(1 + candidates), and chance gives some 1.44.
    """
    num_below = (candidate_bits[None] < planted_bits[:, None]).sum(axis=1)
    num_tied = (candidate_bits[None] == planted_bits[:, None]).sum(axis=1)
    exposure: NDArray[np.float64] = np.log2(1 + len(candidate_bits)) - np.log2(1 + num_below + num_tied / 2)
    return exposure


def canary_report(
    encoder: Encoder,
    planted: Sequence[NDArray[np.int64]],
    candidates: Sequence[NDArray[np.int64]],
    vocabulary: Vocabulary,
    *,
    batch_size: int = 256,
) -> Report:
    """Exposure in bits of each planted text among candidates that were drawn alike and never trained on."""
    if not planted or not candidates:
        raise DataError("exposure needs at least one planted canary and one that was drawn alike and never used")
    bits = text_bits(encoder, [*planted, *candidates], vocabulary, batch_size=batch_size)
    found = exposures(bits[: len(planted)], bits[len(planted) :])
    return {
        "exposure_bits": found.tolist(),
        "mean_exposure_bits": float(found.mean()),
        "most_possible_bits": float(np.log2(1 + len(candidates))),
        "num_planted": len(planted),
        "num_candidates": len(candidates),
    }
