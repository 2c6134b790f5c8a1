"""What is needed to let the tiny model learn studies by heart, and to ask it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import tiny

from fedmix.batch import Batch


class TinyVocabulary:
    vocab_size, mask_id = tiny.VOCABULARY, tiny.MASK
    special_ids = frozenset(range(tiny.FIRST_WORD))

    def encode(self, texts: list[str], max_words: int) -> list[list[int]]:
        raise AssertionError("an audit encodes no text")


@dataclass(frozen=True)
class Same:
    """The same pairs at every step: the surest way to learn them by heart."""

    pairs: Batch

    def batch(self, step: int) -> Batch:
        return self.pairs
