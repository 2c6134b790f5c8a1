"""The words every room shares: a study, a batch with absent modalities really absent, and a loss as (total, weight).

Shapes: B studies, S pixels a side, L words. A batch stores images only for the studies that have one and words only
for the studies that have a report, in study order; nothing stands in for what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedmix.errors import DataError

Stream = Literal["image", "text", "paired"]
STREAMS: tuple[Stream, ...] = ("image", "text", "paired")


class Term(NamedTuple):
    """A loss before its mean is taken: add terms freely, divide once.

    ``total`` is the sum over what was counted and carries the gradient; ``weight`` is how much was counted.
    """

    total: Tensor
    weight: Tensor

    def __add__(self, other: object) -> Term:
        if not isinstance(other, Term):
            return NotImplemented
        return Term(self.total + other.total, self.weight + other.weight)

    def mean(self) -> Tensor:
        """Total over weight; exactly zero, with a zero gradient, where nothing was counted."""
        return self.total / self.weight.clamp_min(torch.finfo(self.total.dtype).tiny)


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``. To a GPU it goes through pinned memory, so that the program need not wait for its arrival."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class Study:
    """One examination as the loaders hand it out: grey values [S, S] uint8, token ids [L] int64, or None where absent.

    ``patient``: a number that the patient's studies share and no other's do; it never leaves the site. None: not known.
    """

    image: Tensor | None
    text: Tensor | None
    patient: int | None = None

    @property
    def stream(self) -> Stream:
        """Which of the three kinds of training example this study is."""
        if self.image is not None and self.text is not None:
            return "paired"
        if self.image is None and self.text is None:
            raise DataError("a study has neither an image nor a report; leave it out when preparing the shard")
        return "image" if self.image is not None else "text"


@dataclass(frozen=True)
class Batch:
    """Studies of any mix of streams.

    ``image``: float [number with image, S, S] in 0..1, or None if no study has one.
    ``text``: int64 token ids [number with text, L], padded with 0, or None if no study has one.
    ``has_image``, ``has_text``: bool [B], True where the study owns the next row of ``image`` / ``text``.
    ``patient``: int64 [B], alike where studies are of one patient, or None if that is not known.
    ``findings``: float [B, F], 1 for what is said to be there, 0.5 for what may be, 0 for the rest; a row of -1 where nothing
    is known of the study. None unless an objective asks for them.
    """

    image: Tensor | None
    text: Tensor | None
    has_image: Tensor
    has_text: Tensor
    patient: Tensor | None = None
    findings: Tensor | None = None

    def __post_init__(self) -> None:
        """Check once, where data enters, that rows and masks agree."""
        num_images = 0 if self.image is None else len(self.image)
        num_texts = 0 if self.text is None else len(self.text)
        expected = (int(self.has_image.sum()), int(self.has_text.sum()))
        if (num_images, num_texts) != expected:
            raise DataError(
                f"batch holds {num_images} images and {num_texts} texts, its masks say {expected[0]} and {expected[1]}"
            )
        if not bool((self.has_image | self.has_text).all()):
            raise DataError("a study in the batch has neither an image nor a report")
        if self.patient is not None and self.patient.shape != self.has_image.shape:
            raise DataError(
                f"batch holds {len(self.has_image)} studies and {len(self.patient)} patient numbers; give one a study"
            )

        if self.findings is not None and len(self.findings) != len(self.has_image):
            raise DataError(
                f"batch holds {len(self.has_image)} studies and findings of {len(self.findings)}; give one row a study"
            )

    def __len__(self) -> int:
        return len(self.has_image)

    @property
    def is_paired(self) -> Tensor:
        """Bool [B]: studies with both an image and a report."""
        return self.has_image & self.has_text

    def counts(self) -> dict[Stream, int]:
        """Number of studies of each stream."""
        num_paired = int(self.is_paired.sum())
        return {
            "image": int(self.has_image.sum()) - num_paired,
            "text": int(self.has_text.sum()) - num_paired,
            "paired": num_paired,
        }
