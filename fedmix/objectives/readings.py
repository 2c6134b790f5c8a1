"""What one pass of the trunk reads: patches, words or both, what of them is hidden, and what is asked for.

Rows of a reading do not look at each other. So a reading can be cut between any two, into micro-batches or among processes,
and what its terms will count is known before anything is computed.

Shapes: N sequences, M of them true, S pixels a side, P patches, K visible patches, L words, F findings; B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedmix.batch import Batch
from fedmix.objectives.alignment import other_patients


@dataclass(frozen=True)
class Reading:
    """Sequences, of which the first ``num_true`` are right and the others an image with a wrong report, for matching alone.

    ``image_NSS`` with ``visible_NK`` and ``read_NL`` are what is shown. ``hidden_MP`` and ``hidden_ML`` are True for what is
    to be predicted, None where nothing is; ``words_ML`` are the words before they were hidden. ``findings_NF``: as in a Batch.
    """

    num_true: int
    image_NSS: Tensor | None = None
    visible_NK: Tensor | None = None
    hidden_MP: Tensor | None = None
    read_NL: Tensor | None = None
    words_ML: Tensor | None = None
    hidden_ML: Tensor | None = None
    findings_NF: Tensor | None = None
    asks_match: bool = False
    asks_anchor: bool = False

    def __len__(self) -> int:
        shown = self.read_NL if self.image_NSS is None else self.image_NSS
        assert shown is not None
        return len(shown)

    @property
    def modality(self) -> str:
        """What an embedding of this reading is of: image or text."""
        return "text" if self.image_NSS is None else "image"

    def part(self, rows: slice) -> Reading:
        """Some of the sequences, with all that belongs to them."""
        # What there is for true rows alone comes first in every tensor, so the same slice cuts it at the same rows.
        cut: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, num_true=len(range(self.num_true)[rows]), **cut)

    def counts(self) -> dict[str, Tensor]:
        """What each true sequence's terms count, [M] by name: ``weights`` before it is added up, matching apart."""
        found: dict[str, Tensor] = {}
        if self.hidden_MP is not None:
            found["mvm"] = self.hidden_MP.sum(dim=1).float()
        if self.hidden_ML is not None:
            found["mlm"] = self.hidden_ML.sum(dim=1).float()
        if self.asks_anchor:
            found["anchor"] = torch.ones(len(self))
        return found

    def weights(self) -> dict[str, Tensor]:
        """What the reading's terms count, by name; a term that is not asked for is not there."""
        found: dict[str, Tensor] = {}
        if self.asks_match:
            found["match"] = torch.tensor(float(len(self)))
        if self.hidden_MP is not None:
            found["mvm"] = self.hidden_MP.sum().float()
        if self.hidden_ML is not None:
            found["mlm"] = self.hidden_ML.sum().float()
        if self.asks_anchor:
            found["anchor"] = torch.tensor(float(len(self)))
        return found


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch. ``patient_B``: whose they are, None if it does not matter."""

    image_BSS: Tensor
    words_BL: Tensor
    patient_B: Tensor | None

    @property
    def compared(self) -> Tensor | None:
        """Bool [B, B], True where pair j may be a negative of pair i; None: everywhere."""
        return None if self.patient_B is None else other_patients(self.patient_B)


@dataclass(frozen=True)
class Plan:
    """What a step reads before pairs are compared. Where there are pairs the last two readings are their images and reports."""

    readings: tuple[Reading, ...]
    pairs: Pairs | None


@dataclass(frozen=True)
class Rows:
    """Which of a batch's images, and which of its reports, are alone and which of a pair."""

    image_alone: Tensor
    text_alone: Tensor
    image_paired: Tensor
    text_paired: Tensor


def rows_of(batch: Batch) -> Rows:
    """The rows of a batch by what they are read as."""
    paired_image, paired_text = batch.is_paired[batch.has_image], batch.is_paired[batch.has_text]
    return Rows(
        image_alone=(~paired_image).nonzero().flatten(),
        text_alone=(~paired_text).nonzero().flatten(),
        image_paired=paired_image.nonzero().flatten(),
        text_paired=paired_text.nonzero().flatten(),
    )
