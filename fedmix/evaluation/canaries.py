"""Canaries: how much better a model knows planted texts and pictures than others that were drawn alike (1802.08232).

The planted ones (fedmix/data/planted.py) are ranked among many that were never planted. A masked model has no likelihood of a
text; the sum over words, each hidden in turn and told from all others, stands in (Salazar et al. 2020, 1910.14659). A picture
is ranked by how closely the model draws it from a tenth of its patches. Exposure counts all that was learnt of a canary: of a
text also that its words occur at all, where no report of the site uses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gamma

from fedmix.data.planted import NEVER_PLANTED, PLANTED, Plan
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.evaluation.features import Encoder, Report, Vocabulary
from fedmix.evaluation.language import score_words
from fedmix.evaluation.membership import AuditSettings, hidden_psnr_of

NUM_CANDIDATES = 511  # never planted; exposure reaches 9 bits
VISIBLE = 0.1  # share of a picture's patches from which the rest is drawn
CHANCE_BITS = 1 / math.log(2)  # mean exposure of what was never learnt, among many


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


def canary_report(planted: NDArray[np.floating], candidates: NDArray[np.floating], times: NDArray[np.integer]) -> Report:
    """How exposed planted canaries are, all together and by how many patients held them.

    Both are scores that are the lower the better a model knows a canary; ``times`` [planted]: patients that held it.
    """
    if not len(planted) or not len(candidates):
        raise DataError("exposure needs at least one planted canary and one that was drawn alike and never used")
    found = exposures(planted, candidates)
    return {
        "num_planted": len(planted),
        "num_candidates": len(candidates),
        "most_possible_bits": float(np.log2(1 + len(candidates))),
        "chance_bits": CHANCE_BITS,
        "all": _exposed(found),
        "by_times": {str(number): _exposed(found[times == number]) for number in np.unique(times)},
    }


def _exposed(found: NDArray[np.float64]) -> Report:
    """``p_value``: of a mean as large where nothing was learnt. A rank's share of all is uniform then, and the sum of the
    logarithms of uniform numbers has a gamma distribution.
    """
    return {
        "mean_exposure_bits": float(found.mean()),
        "exposure_bits": found.tolist(),
        "p_value": float(gamma.sf(found.sum() * math.log(2), len(found))),
    }


def planted_report(
    encoder: Encoder, plan: Plan, tokenizer: Tokenizer, *, settings: AuditSettings, num_candidates: int = NUM_CANDIDATES
) -> Report:
    """The exposure of a plan's texts and pictures, each left out where it plants none.

    Raises DataError for a plan of another tokenizer or image size than the model's.
    """
    report: Report = {}
    num = len(plan.times_of)
    if plan.num_words:
        texts = plan.texts(num, PLANTED, tokenizer) + plan.texts(num_candidates, NEVER_PLANTED, tokenizer)
        ids = [np.array(one, np.int64) for one in tokenizer.encode(texts, plan.num_words + 1)]
        bits = text_bits(encoder, ids, tokenizer, batch_size=settings.batch_size)
        report["texts"] = canary_report(bits[:num], bits[num:], plan.times_of)
    if plan.image_size:
        if plan.image_size != encoder.image_size:
            raise DataError(
                f"the planted pictures have {plan.image_size} pixels a side, the model reads {encoder.image_size}; these "
                "canaries were planted for another model"
            )
        pictures = np.concatenate([plan.pictures(num, PLANTED), plan.pictures(num_candidates, NEVER_PLANTED)])
        psnr_db = hidden_psnr_of(encoder, pictures, replace(settings, mask_ratio=1 - VISIBLE))
        report["images"] = canary_report(-psnr_db[:num], -psnr_db[num:], plan.times_of)
        report["images"] |= {"psnr_db": float(psnr_db[:num].mean()), "candidates_psnr_db": float(psnr_db[num:].mean())}
    return report
