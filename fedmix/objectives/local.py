"""Sentences aligned with patches, both ways, after GLoRIA (ICCV 2021) and LoVT (2112.02889).

A sentence attends to an image's patches; how alike it is to what it found says whether image and report belong together.
Patches do the same with sentences. GLoRIA attends by words and in one direction; LoVT attends by sentences in both, and
compares within a study. Patches and sentences are embedded like whole images and reports, so there is nothing new to train.

Shapes: B pairs, P patches, M sentences, L words, E embedding; C is B again, for the report where B is the image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.batch import Term, placed
from fedmix.objectives.alignment import NOT_COMPARED, choice_term
from fedmix.objectives.masking import WordIds

ATTENTION_TEMPERATURE = 0.1  # of cosines; our choice


def sentences(words_BL: Tensor, ids: WordIds) -> Tensor:
    """Bool [B, M, L]: True where a word belongs to the m-th sentence, which a full stop ends; M is the most of any report.

    Special ids and full stops are of no sentence. A report of fewer sentences has none of the last ones.
    """
    is_stop_BL = words_BL == (-1 if ids.stop_id is None else ids.stop_id)
    is_word_BL = ~is_stop_BL & ~torch.isin(words_BL, torch.tensor(ids.special_ids))
    number_BL = is_stop_BL.cumsum(dim=1)
    num_sentences = int((number_BL * is_word_BL).max()) + 1
    return (number_BL[:, None] == torch.arange(num_sentences)[:, None]) & is_word_BL[:, None]


def local_term(
    patch_BPE: Tensor,
    sentence_CME: Tensor,
    present_CM: Tensor,
    temperature: Tensor,
    *,
    compared_BB: Tensor | None = None,
) -> Term:
    """Contrast of pairs by how well their sentences and patches find each other, weight: pairs.

    ``present_CM``: True for sentences that the report has. ``compared_BB``: as in ``alignment.contrast_term``.
    """
    with torch.autocast(patch_BPE.device.type, enabled=False):
        patch_BPE, sentence_CME = patch_BPE.float(), sentence_CME.float()
        every_BP = present_CM.new_ones(patch_BPE.shape[:2])
        by_sentence_CB = _fit(sentence_CME, present_CM, patch_BPE, every_BP)
        by_patch_BC = _fit(patch_BPE, every_BP, sentence_CME, present_CM)
        scores = [by_sentence_CB.T / temperature.float(), by_patch_BC / temperature.float()]
    if compared_BB is not None:
        never_BB = ~placed(compared_BB, patch_BPE.device)
        scores = [score_BC.masked_fill(never_BB, NOT_COMPARED) for score_BC in scores]
    one, other = (choice_term(score_BC, score_BC.T) for score_BC in scores)
    return Term(total=0.5 * (one.total + other.total), weight=one.weight)


def _fit(asking_XQE: Tensor, is_asking_XQ: Tensor, found_YKE: Tensor, is_found_YK: Tensor) -> Tensor:
    """For each X and each Y [X, Y]: the mean over X's parts of the cosine with what each attends to among Y's parts."""
    alike_XYQK = torch.einsum("xqe,yke->xyqk", asking_XQE, found_YKE)
    attention_XYQK = (alike_XYQK / ATTENTION_TEMPERATURE).masked_fill(~is_found_YK[None, :, None], NOT_COMPARED).softmax(dim=-1)
    context_XYQE = torch.einsum("xyqk,yke->xyqe", attention_XYQK, found_YKE)
    fit_XYQ = F.cosine_similarity(context_XYQE, asking_XQE[:, None], dim=-1) * is_asking_XQ[:, None]
    return fit_XYQ.sum(dim=-1) / is_asking_XQ.sum(dim=-1).clamp_min(1)[:, None]
