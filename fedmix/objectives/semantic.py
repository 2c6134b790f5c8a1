"""Images and reports of whoever they are, aligned by the findings that are known of them (MedCLIP, 2210.10163).

Pairs are not needed: any image of known findings is compared with any report, so images and reports alone count too. At a
site that holds one kind only there is nothing to compare.

Shapes: N studies of one kind, of which findings are known; B studies; E embedding, F findings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.batch import Term, placed
from fedmix.objectives.alignment import similarity


class Known(NamedTuple):
    """Unit-norm embeddings of images or of reports, and what is found in each: 0 to 1, on the same device."""

    embedded_NE: Tensor
    findings_NF: Tensor


def known(embedded_BE: Tensor, findings_BF: Tensor) -> Known:
    """Those of some studies of which findings are known (``Batch.findings``)."""
    rows_N = (findings_BF >= 0).all(dim=1).nonzero().flatten()  # told on the CPU, where findings are
    return Known(embedded_BE[placed(rows_N, embedded_BE.device)], placed(findings_BF[rows_N], embedded_BE.device))


def joined(sides: Sequence[Known]) -> Known | None:
    """Several as one; None where nothing is known of anybody."""
    parts = [one for one in sides if len(one.findings_NF)]
    return Known(*(torch.cat(both) for both in zip(*parts, strict=True))) if parts else None


def semantic_term(images: Known, texts: Known, temperature: Tensor, *, likeness_temperature: float) -> Term:
    """Cross-entropy of choosing reports for each image and images for each report, weight: images and reports.

    The targets are the likeness of their findings, sharpened by a temperature and softmaxed: reports that say the same share
    an image's target (MedCLIP, section 3.3, which has no such temperature).
    """
    logits = similarity(images.embedded_NE, texts.embedded_NE) / temperature.float()
    sharp = likeness(images.findings_NF, texts.findings_NF) / likeness_temperature
    forward = F.cross_entropy(logits, sharp.softmax(dim=1), reduction="sum")
    backward = F.cross_entropy(logits.T, sharp.T.softmax(dim=1), reduction="sum")
    return Term(total=forward + backward, weight=forward.new_full((), sum(logits.shape)))


def likeness(image_NF: Tensor, text_MF: Tensor) -> Tensor:
    """Cosines [N, M] of findings, each 0 to 1. Nothing found is a finding too, or normal studies would resemble nothing."""
    image_NG, text_MG = (torch.cat([one, 1.0 - one.amax(dim=1, keepdim=True)], dim=1) for one in (image_NF, text_MF))
    return similarity(F.normalize(image_NG, dim=1), F.normalize(text_MG, dim=1))
