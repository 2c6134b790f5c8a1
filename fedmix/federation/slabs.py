"""Changes read slice by slice, so that the server never holds all sites' updates at once.

A slab is some rows of one parameter (some columns of a row too long for the bound), small enough that the float64 values of
all the sites held together stay under ``SLAB_BYTES``, and those of one site in a processor's cache. Sums of squares are
numpy's, which adds in one thread: torch splits a sum over as many threads as it may use, and the last bit of a norm would
follow their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmix.errors import UpdateError
from fedmix.federation.update import Contribution, Tower, group_of, rows_of, tower_of

SLAB_BYTES = 32 * 2**20  # of float64 values, over all sites held at once
SITE_BYTES = 2 * 2**20  # the same of one site; larger ones go through main memory and were slower

Shapes = Mapping[str, Sequence[int]]


class Slab(NamedTuple):
    """Rows ``start`` .. ``stop - 1`` and columns ``left`` .. ``right - 1`` of a parameter."""

    start: int
    stop: int
    left: int
    right: int


@dataclass(frozen=True)
class Group:
    """A parameter group in one round: its parameters, the sites that trained it and all sites, each in name order.

    Honest sites train a group whole. Where one sent less of it, the group falls into parts that the same sites sent, for a
    bad reply must cost neither the others' work nor the round; ``label`` is the name, with a number for further parts.
    """

    label: str
    name: str
    parameters: tuple[str, ...]
    senders: tuple[Contribution, ...]
    everyone: tuple[Contribution, ...]

    @property
    def tower(self) -> Tower:
        """The tower that the group belongs to."""
        return tower_of(self.name)


def groups_of(contributions: Iterable[Contribution]) -> dict[str, Group]:
    """The groups that anybody trained by label, in name order; raises UpdateError where a site comes twice."""
    everyone = tuple(sorted(contributions, key=lambda one: one.site))
    if len({one.site for one in everyone}) != len(everyone):
        raise UpdateError("two updates carry the same site's name")
    senders: dict[str, list[Contribution]] = {}
    for one in everyone:
        for name in one.names():
            senders.setdefault(name, []).append(one)
    parts: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # group and who sent it -> parameters
    for name in sorted(senders):
        parts.setdefault((group_of(name), tuple(one.site for one in senders[name])), []).append(name)
    groups: dict[str, Group] = {}
    for name, sent_by in sorted(parts):
        number = sum(group.name == name for group in groups.values()) + 1
        parameters = tuple(parts[name, sent_by])
        label = name if number == 1 else f"{name}#{number}"
        groups[label] = Group(label, name, parameters, tuple(senders[parameters[0]]), everyone)
    return groups


def slabs(shape: Sequence[int], num_held: int) -> Iterator[Slab]:
    """Slabs that cover a parameter once, each within the bound when ``num_held`` sites' values are held together."""
    rows, columns = rows_of(shape)
    cells = max(1, min(SITE_BYTES, SLAB_BYTES // num_held) // 8)
    height, width = max(1, cells // max(1, columns)), min(cells, columns)
    for start in range(0, rows, height):
        for left in range(0, columns, max(1, width)):
            yield Slab(start, min(start + height, rows), left, min(left + width, columns))


def read(contribution: Contribution, name: str, slab: Slab) -> Tensor:
    """A slab of a site's change, float32 [rows, columns]; it may be the update's own memory, so it is not to be changed."""
    rows = contribution.rows(name, slab.start, slab.stop)
    if rows.ndim != 2 or len(rows) != slab.stop - slab.start or rows.shape[1] < slab.right:
        # A row where many are expected would be broadcast by the sum without a word.
        raise UpdateError(f"{name}: rows {slab.start} to {slab.stop} of an update came as {tuple(rows.shape)}")
    return rows[:, slab.left : slab.right]


def stacked(contributions: Sequence[Contribution], name: str, slab: Slab) -> Tensor:
    """A slab of every site's change, float64 [sites, rows, columns]."""
    values = torch.empty(len(contributions), slab.stop - slab.start, slab.right - slab.left, dtype=torch.float64)
    for place, one in zip(values, contributions, strict=True):
        place.copy_(read(one, name, slab))
    return values


def norm(contribution: Contribution, parameters: Iterable[str], shapes: Shapes) -> float:
    """Euclidean length of a site's change of some parameters."""
    total = 0.0
    for name in parameters:
        for slab in slabs(shapes[name], 1):
            total += float(np.square(read(contribution, name, slab).numpy(), dtype=np.float64).sum())
    return math.sqrt(total)
