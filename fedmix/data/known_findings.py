"""Which findings are known of a shard's studies: what a report says by rule, and for an image alone the shard's labels.

Reports are read as training reads them, decoded from their ids and cut where the shard cuts them, each once when a batch
first holds it. A pair's image counts as its report says, as in MedCLIP (2210.10163), and not as labels say that the report
may not hold.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmix.data.reports import labeller
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer


class FindingsReader:
    """Findings of a shard's studies, in the order of ``labeller.FINDINGS`` (F)."""

    def __init__(self, shard: Shard, tokenizer: Tokenizer) -> None:
        self._shard, self._tokenizer = shard, tokenizer
        self._columns = columns_of(shard.label_names)
        self._read: dict[int, list[float]] = {}

    def of(self, rows: NDArray[np.int64]) -> Tensor:
        """Float [len(rows), F]: 1 said, 0.5 doubted, 0 neither; a row of -1 for an image whose labels say nothing."""
        return torch.tensor([self._of(int(row)) for row in rows], dtype=torch.float32)

    def _of(self, row: int) -> list[float]:
        if row not in self._read:
            words = self._shard.words(row)
            said = None if words is None else labeller.read(self._tokenizer.decode(words.tolist()))
            self._read[row] = said or _from_labels(self._shard.labels[row], self._columns)
        return self._read[row]


def columns_of(label_names: tuple[str, ...]) -> list[list[int]]:
    """For each finding the columns of the labels that mean it: ``effusion_left`` as well as ``Pleural Effusion``."""
    means = [labeller.read(name.replace("_", " ")) for name in label_names]
    return [[column for column, said in enumerate(means) if said[place]] for place in range(len(labeller.FINDINGS))]


def _from_labels(labels: NDArray[np.int8], columns: list[list[int]]) -> list[float]:
    """1 where some label of a finding is 1; all -1 where no label is known. Else not known is not there, as in a report."""
    if not any((labels[own] >= 0).any() for own in columns):
        return [-1.0] * len(columns)
    return [float((labels[own] == 1).any()) for own in columns]
