"""What holds a site near the round's start: features, not parameters, may not drift far between two averages.

Shapes: B studies, D width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fedmix.batch import Term


def anchor_term(now_BD: Tensor, start_BD: Tensor) -> Term:
    """Cosine distance between features of the model now and at the round's start, weight: studies.

    After FedDRA (2404.03854), which holds local alignment near the global representation. 0: no drift; 2: turned round.
    """
    drift_B = drift(now_BD, start_BD)
    return Term(total=drift_B.sum(), weight=drift_B.new_full((), len(drift_B)))


def drift(now_BD: Tensor, start_BD: Tensor) -> Tensor:
    """Cosine distance [B] of each study's features."""
    return 1.0 - F.cosine_similarity(now_BD.float(), start_BD.detach().float(), dim=-1)
