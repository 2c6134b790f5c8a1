"""Which studies a step sees. A step's batch is a pure function of (seed, step): nothing to save, nothing to lose on resume.

Reports alone are drawn in batches of similar length, so little is computed on padding (twice the speed);
pairs are drawn evenly, because a batch of equally long reports would make contrast an easier, other task.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch, Study
from fedmix.data.augmentation import augmented
from fedmix.data.known_findings import FindingsReader
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

POOL_BATCHES = 16  # batches sorted by length together; more saves little padding and makes neighbours less random

Indices = NDArray[np.int64]


class Sampler:
    """Epochs without repetition over some studies of a shard, addressed by step number; ``augment`` changes their images.

    ``findings``: says which findings are known of each study, for an objective that compares them.
    """

    def __init__(
        self,
        shard: Shard,
        indices: Indices,
        *,
        batch_size: int,
        seed: int,
        augment: config.Augment | None = None,
        findings: FindingsReader | None = None,
    ) -> None:
        if len(indices) == 0:
            raise DataError("no study of the wanted stream and split in this shard; see `fedmix prepare --stream`")
        self._shard, self._indices, self._seed = shard, indices, seed
        self._augment, self._findings = augment or config.Augment(), findings
        self._batch_size = min(batch_size, len(indices))
        self._lengths = np.diff(shard.offsets)[indices]
        self._bucketed = not bool(shard.has_image[indices].any())
        self._epoch: tuple[int, list[Indices]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from 0."""
        epoch, position = divmod(step, len(self._indices) // self._batch_size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        rows = self._indices[self._epoch[1][position]]
        batch = collate([study(self._shard, int(row)) for row in rows])
        if self._findings is not None:
            batch = replace(batch, findings=self._findings.of(rows))
        return augmented(batch, self._augment, seed=self._seed, step=step)

    def _draw(self, epoch: int) -> list[Indices]:
        """An epoch's batches as positions among the indices; the studies left over wait for another shuffle."""
        chance = np.random.default_rng([self._seed, epoch])
        order = chance.permutation(len(self._indices))
        size = self._batch_size
        if not self._bucketed:
            return [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        batches: list[Indices] = []
        num_kept = len(order) // size * size
        for start in range(0, num_kept, size * POOL_BATCHES):
            pool = order[start : min(start + size * POOL_BATCHES, num_kept)]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[at : at + size] for at in range(0, len(pool), size)]
        return [batches[at] for at in chance.permutation(len(batches))]


def sampler_of(stage: config.Stage, shard: Shard, indices: Indices, *, seed: int, tokenizer: Tokenizer) -> Sampler:
    """The batches of a stage from some studies of a shard."""
    findings = FindingsReader(shard, tokenizer) if stage.objectives.semantic else None
    return Sampler(shard, indices, batch_size=stage.batch_size, seed=seed, augment=stage.augment, findings=findings)


class PatientSampler:
    """Patients drawn each on their own with the same chance (Poisson sampling), which differential privacy counts on.

    A patient is all studies among ``indices`` of one keyed hash. A draw takes at most ``most_studies`` of a patient's, at
    random, and gives everything that chance decides from a generator that the caller keeps secret.
    """

    def __init__(
        self, shard: Shard, indices: Indices, *, expected: int, most_studies: int, augment: config.Augment | None = None
    ) -> None:
        if len(indices) == 0:
            raise DataError("no study of the wanted stream and split in this shard; see `fedmix prepare --stream`")
        order = np.argsort(shard.patient[indices], kind="stable")
        _, starts = np.unique(shard.patient[indices][order], return_index=True)
        self._shard, self._most, self._augment = shard, most_studies, augment or config.Augment()
        self._studies = np.split(indices[order], starts[1:])
        self.expected = min(expected, len(self._studies))

    @property
    def num_patients(self) -> int:
        """How many patients there are to draw from."""
        return len(self._studies)

    @property
    def rate(self) -> float:
        """Each patient's chance of being drawn."""
        return self.expected / self.num_patients

    def draw(self, drawn: Tensor, chance: Generator) -> Batch | None:
        """Studies of the patients of these numbers as one batch, ``patient`` counted from 0; None of nobody."""
        if len(drawn) == 0:
            return None
        rows: list[int] = []
        whose: list[int] = []
        for place, number in enumerate(drawn.tolist()):
            own = self._studies[number]
            kept = torch.randperm(len(own), generator=chance)[: self._most].tolist()
            rows += own[kept].tolist()
            whose += [place] * len(kept)
        batch = replace(collate([study(self._shard, row) for row in rows]), patient=torch.tensor(whose))
        return augmented(batch, self._augment, seed=int(torch.randint(2**62, (1,), generator=chance)), step=0)


def study(shard: Shard, row: int) -> Study:
    """One study of a shard, copied out of the memory map."""
    image, words = shard.image(row), shard.words(row)
    return Study(
        image=None if image is None else torch.from_numpy(np.array(image)),
        text=None if words is None else torch.from_numpy(np.array(words, dtype=np.int64)),
        patient=_number(str(shard.patient[row])),
    )


def _number(patient: str) -> int:
    """A 63-bit number for a keyed hash, so that a tensor can hold it; alike at no two sites, whose keys differ."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") >> 1


def collate(studies: Sequence[Study]) -> Batch:
    """Studies of any streams as one batch: grey values scaled to 0..1, words padded to the longest report here."""
    images = [one.image for one in studies if one.image is not None]
    texts = [one.text for one in studies if one.text is not None]
    patients = [one.patient for one in studies if one.patient is not None]
    return Batch(
        image=torch.stack(images).float().div_(255.0) if images else None,
        text=pad(texts) if texts else None,
        has_image=torch.tensor([one.image is not None for one in studies]),
        has_text=torch.tensor([one.text is not None for one in studies]),
        patient=torch.tensor(patients) if len(patients) == len(studies) else None,
    )


def pad(texts: Sequence[Tensor]) -> Tensor:
    """Token ids of unequal length as int64 [B, L], filled up with 0."""
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=0)
