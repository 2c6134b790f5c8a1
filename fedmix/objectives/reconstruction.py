"""Masked vision and masked language modelling: errors on what was hidden, never on what was shown.

What is predicted and what is hidden may lie on the CPU; they are sent to where the predictions are.

Shapes: B studies, P patches, V values of a patch or vocabulary, N hidden words.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.batch import Term, placed
from fedmix.model import pyramid


def masked_patch_term(predicted_BPV: Tensor, patches_BPC: Tensor, hidden_BP: Tensor, *, kind: str) -> Term:
    """Squared error on hidden patches (MAE, section 3), weight: hidden patches.

    For the pyramid each scale's mean counts alike, lambda = 1/1/1, so coarse grey and fine edges both
    matter although the fine scale has sixteen times the values.
    """
    hidden_BP = placed(hidden_BP, predicted_BPV.device)
    error_BP = patch_errors(predicted_BPV, patches_BPC, kind=kind)
    return Term(total=(error_BP * hidden_BP).sum(), weight=hidden_BP.sum().float())


def patch_errors(predicted_BPV: Tensor, patches_BPC: Tensor, *, kind: str) -> Tensor:
    """Squared error of every patch [B, P]: the mean over its values or, for the pyramid, the sum of its scales' means."""
    patches_BPC = placed(patches_BPC, predicted_BPV.device)
    error_BPV = (predicted_BPV.float() - pyramid.split(kind, patches_BPC)).square()
    if kind != "multi_scale":
        return error_BPV.mean(dim=-1)
    sizes = pyramid.level_sizes(round(patches_BPC.shape[-1] ** 0.5))
    return torch.stack([level.mean(dim=-1) for level in error_BPV.split(sizes, dim=-1)]).sum(dim=0)


def masked_word_term(logits_NV: Tensor, words_N: Tensor) -> Term:
    """Cross-entropy in nats over hidden words (BERT), weight: hidden words. Zero hidden words give zero."""
    total = F.cross_entropy(logits_NV.float(), placed(words_N, logits_NV.device), reduction="sum")
    return Term(total=total, weight=total.new_full((), len(words_N)))
