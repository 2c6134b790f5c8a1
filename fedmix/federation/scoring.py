"""What a site finds out about a model on patients that it never trained on: sums and weights, and nothing of a few patients.

Every measure is a sum over studies and what it was summed over, so whoever gets it can take a mean and no more. What is
hidden follows from a seed, so that two models are asked the same. The measures are those of the central evaluation
(fedmix/evaluation/), but that retrieval picks among GALLERY studies, so that hospitals of any size stand the same test.

Shapes: B studies, G studies of a gallery, S pixels a side, P patches, L words, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from fedmix.batch import Batch, Stream, placed
from fedmix.config.evaluating import MIN_PATIENTS
from fedmix.data.loading import Indices, collate, pad, study
from fedmix.data.shard import Shard
from fedmix.errors import DataError
from fedmix.federation.local import seed_of
from fedmix.model.encoder import MixedModel
from fedmix.model.layers import to_patches
from fedmix.objectives.masking import WordIds, hide_patches, hide_words
from fedmix.objectives.reconstruction import masked_word_term

MAX_STUDIES = 2000  # that bound the time it takes; more are drawn from
GALLERY = 32  # pairs of different patients among which a partner is looked for
HIDDEN_PATCHES, HIDDEN_WORDS = 0.75, 0.15  # shares, as in the central evaluation
MAX_PSNR_DB = 100.0
BATCH = 64

Sums = dict[str, tuple[float, float]]  # measure -> sum, and the number of images, words or queries summed over


@dataclass(frozen=True)
class Held:
    """Studies of a shard that its site does not train on, and the seed that decides what is hidden of them."""

    shard: Shard
    rows: Indices
    word_ids: WordIds
    seed: int

    @property
    def num_patients(self) -> int:
        """How many patients the studies are of."""
        return len(np.unique(self.shard.patient[self.rows]))

    def chance(self, purpose: str) -> Generator:
        """A generator for one purpose."""
        return torch.Generator().manual_seed(seed_of(self.seed, purpose))

    def batches(self) -> Iterator[Batch]:
        """All studies, in order."""
        for start in range(0, len(self.rows), BATCH):
            yield self.batch(self.rows[start : start + BATCH])

    def batch(self, rows: Indices) -> Batch:
        """Some studies."""
        return collate([study(self.shard, int(row)) for row in rows])


@dataclass(frozen=True)
class Measure:
    """``learnt``: objectives, one of which a model must have learnt; ``streams``: sites that can measure it.

    No mean of it is above ``most`` or below zero.
    """

    learnt: tuple[str, ...]
    streams: tuple[Stream, ...]
    most: float
    sums: Callable[[MixedModel, Held], tuple[float, float]]


def held_out(shard: Shard, stream: Stream, seed: int) -> Indices:
    """The studies of a stream that no training touches: validation and test split, at most MAX_STUDIES drawn of them."""
    rows = np.concatenate([shard.select("val", stream), shard.select("test", stream)])
    chance = np.random.default_rng(seed_of(seed, "studies to score"))
    return np.sort(chance.permutation(rows)[:MAX_STUDIES])


def measures_of(stream: Stream, learnt: Collection[str]) -> tuple[str, ...]:
    """The measures of a model that learnt some objectives, at a site of a stream."""
    return tuple(name for name, one in MEASURES.items() if stream in one.streams and set(one.learnt) & set(learnt))


def score(model: MixedModel, held: Held, names: Collection[str], *, min_patients: int = MIN_PATIENTS) -> Sums:
    """The measures of these names, none where the studies are of fewer than ``min_patients`` patients.

    Raises DataError for a model that gives no finite numbers.
    """
    if held.num_patients < min_patients:
        return {}
    model.eval()
    model.skips_padding = True
    with torch.no_grad():
        found = {name: MEASURES[name].sums(model, held) for name in names}
    if not all(math.isfinite(total) for total, _ in found.values()):
        raise DataError("the model's scores at this site are not finite; training has probably diverged")
    return {name: (total, weight) for name, (total, weight) in found.items() if weight > 0}


def _psnr(model: MixedModel, held: Held) -> tuple[float, float]:
    """Decibels of each image's hidden patches, drawn from the visible ones."""
    chance, total = held.chance("hidden patches"), 0.0
    for batch in held.batches():
        assert batch.image is not None
        hidden_BP = hide_patches(len(batch), model.num_patches, HIDDEN_PATCHES, chance).hidden_BP
        drawn_BSS = model.regenerate(batch.image, hidden_BP).clamp(0.0, 1.0)
        error_BP = to_patches((drawn_BSS - placed(batch.image, model.device)).square(), model.patch_size).mean(dim=-1)
        hidden_BP = placed(hidden_BP, model.device)
        mean_B = (error_BP * hidden_BP).sum(dim=1).double() / hidden_BP.sum(dim=1)
        total += float((-10.0 * mean_B.clamp_min(10.0 ** (-MAX_PSNR_DB / 10.0)).log10()).sum())
    return total, float(len(held.rows))


def _bits(model: MixedModel, held: Held) -> tuple[float, float]:
    """Bits of each hidden word, read without the image."""
    chance, nats, num_words = held.chance("hidden words"), 0.0, 0.0
    for batch in held.batches():
        words, shown, hidden = _hidden_words(batch, held.word_ids, chance)
        encoded = model.encode(words_BL=shown)
        term = masked_word_term(model.word_head(encoded.tokens["text"][placed(hidden, model.device)]), words[hidden])
        nats, num_words = nats + float(term.total), num_words + float(term.weight)
    return nats / math.log(2.0), num_words


def _hidden_words(batch: Batch, ids: WordIds, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Words, what is shown of them, and True where one is hidden, each [B, L]; drawn report by report, whatever the padding."""
    assert batch.text is not None
    reports = [words_L[words_L != 0] for words_L in batch.text]
    drawn = [hide_words(words_L[None], HIDDEN_WORDS, ids, chance) for words_L in reports]
    return batch.text, pad([one.words_BL[0] for one in drawn]), pad([one.hidden_BL[0] for one in drawn]).bool()


def _first_ranks(model: MixedModel, held: Held) -> tuple[float, float]:
    """Queries of both directions whose own partner is the first of a gallery; studies that fill no gallery are left out."""
    _, firsts = np.unique(held.shard.patient[held.rows], return_index=True)
    pairs = held.rows[firsts][torch.randperm(len(firsts), generator=held.chance("galleries")).numpy()]
    num_right, num_queries = 0, 0
    for start in range(0, len(pairs) - GALLERY + 1, GALLERY):
        batch = held.batch(pairs[start : start + GALLERY])
        assert batch.image is not None
        assert batch.text is not None
        likeness_GG = model.encode_image(batch.image) @ model.encode_text(batch.text).T
        own_G = torch.arange(GALLERY, device=likeness_GG.device)
        num_right += sum(int((likeness_GG.argmax(dim=side) == own_G).sum()) for side in (0, 1))
        num_queries += 2 * GALLERY
    return float(num_right), float(num_queries)


MEASURES: dict[str, Measure] = {
    "score/psnr_db": Measure(("mvm",), ("image", "paired"), MAX_PSNR_DB, _psnr),
    "score/bits_per_token": Measure(("mlm",), ("text", "paired"), 1000.0, _bits),
    "score/r1_of_32": Measure(("contrast", "semantic", "local"), ("paired",), 1.0, _first_ranks),
}
