"""Canaries: random texts and pictures of nobody, given to made-up patients of a site, so that one can ask afterwards whether a
model knows them.

Each is in the studies of 1, 2, 4 or 8 patients, one study each: what repetition does is seen, and differential privacy, whose
unit is the patient, protects the first kind as it protects everybody (Carlini et al. 2019, 1802.08232). All of them follow
from a plan, a few numbers in a file, and so do any number of others that were drawn alike and never planted.

Shapes: N canaries, S pixels a side.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

SCHEMA = 1
PLANTED, NEVER_PLANTED = "planted", "never planted"
CELLS = 6  # random grey values a side of a picture
MIN_VOCABULARY = 100  # words; of fewer, canaries would share too many


class Plan(BaseModel):
    """What canaries.json says: ``each`` canaries for each of ``times``, with ``num_words`` words and a picture, or 0 for none.

    ``tokenizer``: the fingerprint of the one whose words they are made of.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_number: Annotated[int, Field(alias="schema", ge=SCHEMA, le=SCHEMA)] = SCHEMA
    seed: NonNegativeInt
    tokenizer: str
    num_words: NonNegativeInt
    image_size: NonNegativeInt
    each: PositiveInt
    times: tuple[PositiveInt, ...] = (1, 2, 4, 8)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises DataError for a file that is no plan of canaries."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise DataError(
                f"{path} is no plan of canaries ({type(error).__name__}); name the canaries.json that `fedmix canaries` wrote"
            ) from None

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")

    @property
    def times_of(self) -> NDArray[np.int64]:
        """How many patients hold each planted canary [N]."""
        return np.repeat(np.array(self.times, np.int64), self.each)

    def texts(self, num: int, kind: str, tokenizer: Tokenizer) -> list[str]:
        """``num`` texts of ``num_words`` random words; raises DataError for another tokenizer than the plan's."""
        if tokenizer.fingerprint != self.tokenizer:
            raise DataError("the canaries are made of another tokenizer's words; plant them with the model's tokenizer")
        words = whole_words(tokenizer)
        chosen = self._random("texts", kind).integers(len(words), size=(num, self.num_words))
        return [" ".join(words[number] for number in row) for row in chosen]

    def pictures(self, num: int, kind: str) -> NDArray[np.uint8]:
        """``num`` pictures [N, S, S] of smooth random grey, with the mean and spread that prepared radiographs have."""
        cells = self._random("pictures", kind).random((num, CELLS, CELLS), np.float32)
        size = (self.image_size, self.image_size)
        smooth = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in cells])
        mean, spread = (getattr(smooth, of)(axis=(1, 2), keepdims=True) for of in ("mean", "std"))
        return np.asarray((0.5 + 0.2 * (smooth - mean) / spread).clip(0, 1) * 255).round().astype(np.uint8)

    def plant(self, path: Path, *, tokenizer: Tokenizer, key: bytes, max_words: int) -> None:
        """Write the shard of the patients that hold the canaries, all of them in its training split."""
        if self.num_words >= max_words:
            raise DataError(f"a canary of {self.num_words} words does not fit into max_words {max_words}; make it shorter")
        num = len(self.times_of)
        texts = self.texts(num, PLANTED, tokenizer) if self.num_words else None
        pictures = self.pictures(num, PLANTED) if self.image_size else None
        with ShardWriter(path, image_size=self.image_size, tokenizer=tokenizer, key=key, max_words=max_words) as writer:
            for number, times in enumerate(self.times_of):
                for holder in range(times):
                    writer.add(
                        patient=f"canary {self.seed} {number} {holder}",
                        study="0",
                        image=None if pictures is None else pictures[number],
                        text=None if texts is None else texts[number],
                        split="train",
                    )

    def _random(self, what: str, kind: str) -> np.random.Generator:
        seed = hashlib.sha256(f"canaries/{self.seed}/{what}/{kind}".encode()).digest()
        return np.random.default_rng(int.from_bytes(seed, "big"))


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Entries of the vocabulary that stand for themselves wherever they are written: words of at least three letters."""
    ids = sorted(set(tokenizer.vocabulary.values()) - tokenizer.special_ids)
    texts = [tokenizer.decode([number]).strip() for number in ids]
    read = tokenizer.encode(texts, 3)
    words = [
        text
        for number, text, found in zip(ids, texts, read, strict=True)
        if found == [tokenizer.summary_id, number] and text.isalpha() and len(text) > 2
    ]
    if len(words) < MIN_VOCABULARY:
        raise DataError(f"the tokenizer has {len(words)} whole words, canaries need {MIN_VOCABULARY}; use a larger vocabulary")
    return words
