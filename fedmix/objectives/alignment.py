"""What pairs teach: which report belongs to which image. Negatives come from the same site's batch, never from elsewhere.

Shapes: B pairs, E embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.batch import Term


def contrast_term(image_BE: Tensor, text_BE: Tensor, temperature: Tensor, *, label_smoothing: float = 0.0) -> Term:
    """Symmetric InfoNCE on unit embeddings (CLIP, 2103.00020), weight: pairs. One pair alone teaches nothing: zero."""
    with torch.autocast(image_BE.device.type, enabled=False):  # bfloat16 would round similarities before they are sharpened
        logits_BB = image_BE.float() @ text_BE.float().T / temperature.float()
    target_B = torch.arange(len(logits_BB), device=logits_BB.device)
    forward = F.cross_entropy(logits_BB, target_B, reduction="sum", label_smoothing=label_smoothing)
    backward = F.cross_entropy(logits_BB.T, target_B, reduction="sum", label_smoothing=label_smoothing)
    return Term(total=0.5 * (forward + backward), weight=forward.new_tensor(float(len(logits_BB))))


def match_term(logit_B: Tensor, belongs_B: Tensor) -> Term:
    """Binary cross-entropy that image and report belong together (ALBEF, section 3.2), weight: sequences."""
    total = F.binary_cross_entropy_with_logits(logit_B.float(), belongs_B.float(), reduction="sum")
    return Term(total=total, weight=total.new_tensor(float(len(logit_B))))
