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
    cosine_B = F.cosine_similarity(now_BD.float(), start_BD.detach().float(), dim=-1)
    return Term(total=(1.0 - cosine_B).sum(), weight=cosine_B.new_full((), len(cosine_B)))
