"""Embeddings of pairs seen earlier in the round, as further negatives of contrast. They stay in the site's memory.

Shapes: B pairs, Q pairs kept, E embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PastPairs:
    """The newest ``size`` pairs of a round (cross-batch memory, 1912.06798): features drift slowly, so old ones still serve.

    A round begins with none, so that its result depends on nothing that a resumed run would have lost.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def kept(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Images [Q, E], reports [Q, E] and patient numbers [Q], the newest last; None before the first step."""
        return self._kept

    def remember(self, image_BE: Tensor, text_BE: Tensor, patient_B: Tensor) -> None:
        """Add a step's pairs without their gradients, and forget the oldest beyond ``size``."""
        new = (image_BE.detach(), text_BE.detach(), patient_B)
        together = new if self._kept is None else [torch.cat(both) for both in zip(self._kept, new, strict=True)]
        image_QE, text_QE, patient_Q = (rows[-self._size :] for rows in together)
        self._kept = (image_QE, text_QE, patient_Q)
