"""What pairs teach: which report belongs to which image. Negatives come from the same site's batch, never from elsewhere.

Which pairs are compared may be told on the CPU; it is sent to where the embeddings are.

Shapes: B pairs, E embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from fedmix.batch import Term, placed

NOT_COMPARED = -1e4  # a logit that softmax makes exactly zero, and unlike -inf times a target of zero is zero
MARGIN = 0.2  # of cosines (VSE++, 1707.05612, section 4.2)


class Past(NamedTuple):
    """Embeddings of earlier pairs, and ``compared_BQ``: True where one may be a negative of a pair of the batch."""

    image_QE: Tensor
    text_QE: Tensor
    compared_BQ: Tensor


def contrast_term(
    image_BE: Tensor,
    text_BE: Tensor,
    temperature: Tensor,
    *,
    label_smoothing: float = 0.0,
    target_BB: Tensor | None = None,
    compared_BB: Tensor | None = None,
    past: Past | None = None,
) -> Term:
    """Symmetric InfoNCE on unit embeddings (CLIP, 2103.00020), weight: pairs. One pair alone teaches nothing: zero.

    ``target_BB``: what share of pair i's target pair j is (``soft_targets``); None gives a pair its own other side alone.
    ``compared_BB``: True where pair j may stand in pair i's denominator (``other_patients``); None compares all.
    ``past``: earlier pairs of this site, further negatives in the denominator.
    """
    logits_BB = similarity(image_BE, text_BE) / temperature.float()
    if compared_BB is not None:
        logits_BB = logits_BB.masked_fill(~placed(compared_BB, logits_BB.device), NOT_COMPARED)
    to_text, to_image = logits_BB, logits_BB.T
    if past is not None:
        columns = [similarity(image_BE, past.text_QE), similarity(text_BE, past.image_QE)]
        never_BQ = ~placed(past.compared_BQ, logits_BB.device)
        columns = [(one / temperature.float()).masked_fill(never_BQ, NOT_COMPARED) for one in columns]
        to_text, to_image = (torch.cat([to_text, columns[0]], dim=1), torch.cat([to_image, columns[1]], dim=1))
        target_BB = None if target_BB is None else F.pad(target_BB, (0, len(past.text_QE)))
    return choice_term(to_text, to_image, target_BB, label_smoothing=label_smoothing)


def choice_term(
    to_text_BN: Tensor, to_image_BN: Tensor, target_BN: Tensor | None = None, *, label_smoothing: float = 0.0
) -> Term:
    """Cross-entropy of choosing a report for each image and an image for each report, weight: pairs.

    Row i of either is pair i's logits over candidates, its own other side the i-th; ``target_BN`` as in ``contrast_term``.
    """
    target = torch.arange(len(to_text_BN), device=to_text_BN.device) if target_BN is None else target_BN
    forward = F.cross_entropy(to_text_BN, target, reduction="sum", label_smoothing=label_smoothing)
    backward = F.cross_entropy(to_image_BN, target, reduction="sum", label_smoothing=label_smoothing)
    return Term(total=0.5 * (forward + backward), weight=forward.new_full((), len(to_text_BN)))


def margin_contrast_term(image_BE: Tensor, text_BE: Tensor, *, compared_BB: Tensor | None = None) -> Term:
    """Multi-margin loss both ways, weight: pairs: every wrong side should be less alike than the right one by ``MARGIN``.

    ``torch.nn.functional.multi_margin_loss`` (Crammer and Singer 2001) on cosines; what is far enough away no longer pulls.
    There is no temperature. ``compared_BB``: as in ``contrast_term``.
    """
    alike_BB = similarity(image_BE, text_BE)
    counts_BB = ~torch.eye(len(alike_BB), dtype=torch.bool, device=alike_BB.device)
    if compared_BB is not None:
        counts_BB = counts_BB & placed(compared_BB, alike_BB.device)
    own_B = alike_BB.diagonal()
    missing_BB = F.relu(MARGIN - own_B[:, None] + alike_BB) + F.relu(MARGIN - own_B[None] + alike_BB)
    total = 0.5 * (missing_BB * counts_BB).sum() / len(alike_BB)
    return Term(total=total, weight=total.new_full((), len(alike_BB)))


def sigmoid_contrast_term(
    image_BE: Tensor, text_BE: Tensor, temperature: Tensor, bias: Tensor, *, compared_BB: Tensor | None = None
) -> Term:
    """One binary question for each image with each report (SigLIP, 2303.15343, section 3.2), weight: pairs.

    There is no denominator over the batch, so that a small one is no other task. ``compared_BB``: as in ``contrast_term``.
    """
    logits_BB = similarity(image_BE, text_BE) / temperature.float() + bias.float()
    sign_BB = 2.0 * torch.eye(len(logits_BB), device=logits_BB.device) - 1.0
    error_BB = -F.logsigmoid(sign_BB * logits_BB)
    if compared_BB is not None:
        error_BB = error_BB.masked_fill(~placed(compared_BB, error_BB.device), 0.0)
    return Term(total=error_BB.sum(), weight=error_BB.new_full((), len(logits_BB)))


def similarity(left_BE: Tensor, right_BE: Tensor) -> Tensor:
    """Cosines [B, B] of unit embeddings in float32: bfloat16 would round them before a temperature sharpens them."""
    with torch.autocast(left_BE.device.type, enabled=False):
        return left_BE.float() @ right_BE.float().T


def soft_targets(text_BE: Tensor, *, share: float, temperature: float, compared_BB: Tensor | None = None) -> Tensor:
    """Targets [B, B]: 1 - share for the pair itself, and ``share`` spread over the reports by how alike they are.

    "No acute disease" stands in many reports; a hard target calls all but one of them wrong (MedCLIP, 2210.10163).
    ``text_BE`` are features that this loss does not move, or reports would grow alike because they are called alike.
    """
    alike_BB = similarity(text_BE, text_BE) / temperature
    if compared_BB is not None:
        alike_BB = alike_BB.masked_fill(~placed(compared_BB, alike_BB.device), NOT_COMPARED)
    own_BB = torch.eye(len(text_BE), device=text_BE.device)
    return ((1.0 - share) * own_BB + share * alike_BB.softmax(dim=1)).detach()


def other_patients(patient_B: Tensor) -> Tensor:
    """Bool [B, B]: True for the pair itself and for pairs of other patients, whose reports really are another's."""
    return patient_B[:, None].ne(patient_B[None]) | torch.eye(len(patient_B), dtype=torch.bool, device=patient_B.device)


def hard_negatives(logits_BB: Tensor, generator: Generator, *, compared_BB: Tensor | None = None) -> Tensor:
    """For each image the pair [B] whose report it is wrongly given, drawn by softmax of contrast's logits (ALBEF, section 3.2).

    Never its own, nor one that is not compared; -1 where that leaves none. The negatives are of the batch, hence of the site.
    They are told on the CPU, where the reports are: on a GPU this waits for the embeddings.
    """
    never_BB = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
    if compared_BB is not None:
        never_BB = never_BB | ~placed(compared_BB, logits_BB.device)
    chance_BB = torch.rand(logits_BB.shape, generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    # The largest logit after Gumbel noise is a draw from the softmax, without normalising.
    drawn_BB = logits_BB.detach().float() - placed(chance_BB.log().neg().log(), logits_BB.device)
    return drawn_BB.masked_fill(never_BB, float("-inf")).argmax(dim=1).masked_fill(never_BB.all(dim=1), -1).cpu()


def match_term(logit_B: Tensor, belongs_B: Tensor) -> Term:
    """Binary cross-entropy that image and report belong together (ALBEF, section 3.2), weight: sequences."""
    total = F.binary_cross_entropy_with_logits(logit_B.float(), placed(belongs_B.float(), logit_B.device), reduction="sum")
    return Term(total=total, weight=total.new_full((), len(logit_B)))
