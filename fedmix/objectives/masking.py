"""Which patches and words a study's learner does not see. Pure functions of a torch.Generator.

Shapes: B studies, P patches, K visible patches, L words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fedmix.data.tokenizer import Tokenizer


class HiddenPatches(NamedTuple):
    """``visible_BK``: places shown; ``hidden_BP``: True where a patch is not shown. Every row hides the same number."""

    visible_BK: Tensor
    hidden_BP: Tensor


class HiddenWords(NamedTuple):
    """``words_BL``: ids with the hidden ones replaced by the mask id; ``hidden_BL``: True where a word is to be predicted."""

    words_BL: Tensor
    hidden_BL: Tensor


def hide_patches(num_studies: int, num_patches: int, ratio: float, generator: Generator) -> HiddenPatches:
    """Hide a random share of the patches of each study; at least one stays visible and, unless the ratio is 0, one hidden."""
    if ratio == 0:
        places_BK = torch.arange(num_patches).expand(num_studies, -1)
        return HiddenPatches(places_BK, torch.zeros(num_studies, num_patches, dtype=torch.bool))
    num_visible = min(num_patches - 1, max(1, round(num_patches * (1.0 - ratio))))
    order_BP = torch.rand(num_studies, num_patches, generator=generator).argsort(dim=1)
    visible_BK = order_BP[:, :num_visible]
    hidden_BP = torch.ones(num_studies, num_patches, dtype=torch.bool).scatter_(1, visible_BK, False)
    return HiddenPatches(visible_BK, hidden_BP)


@dataclass(frozen=True)
class WordIds:
    """What objectives must know of the tokenizer: what stands for a hidden word, the ids that are never words, the full stop.

    ``stop_id``: None where the vocabulary has none.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    stop_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> WordIds:
        """The ids of a tokenizer."""
        return cls(tokenizer.mask_id, tuple(sorted(tokenizer.special_ids)), tokenizer.vocabulary.get("."))


def hide_words(words_BL: Tensor, ratio: float, ids: WordIds, generator: Generator) -> HiddenWords:
    """Hide each word with probability ``ratio``; padding and other special ids are never hidden.

    A report of which chance hid nothing has one word hidden, so that no report is without a target; a ratio of 0 hides none.
    """
    if ratio == 0:
        return HiddenWords(words_BL, torch.zeros_like(words_BL, dtype=torch.bool))
    can_hide_BL = ~torch.isin(words_BL, torch.tensor(ids.special_ids))
    draw_BL = torch.rand(words_BL.shape, generator=generator).masked_fill(~can_hide_BL, 2.0)
    hidden_BL = (draw_BL < ratio) | (draw_BL == draw_BL.amin(dim=1, keepdim=True)) & can_hide_BL
    return HiddenWords(words_BL.masked_fill(hidden_BL, ids.mask_id), hidden_BL)
