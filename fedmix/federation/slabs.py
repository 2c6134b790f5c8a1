"""Changes read slice by slice, so that the server never holds all sites' updates at once.

A slab is some rows of one parameter (some columns of a row too long for the bound), small enough that the float64 values of
all the sites held together stay under ``SLAB_BYTES``. Sums of squares are numpy's, which adds in one thread: torch splits a
sum over as many threads as it may use, and the last bit of a norm would follow their number.
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

Shapes = Mapping[str, Sequence[int]]


class Slab(NamedTuple):
    """Rows ``start`` .. ``stop - 1`` and columns ``left`` .. ``right - 1`` of a parameter."""

    start: int
    stop: int
    left: int
    right: int


@dataclass(frozen=True)
class Group:
    """A parameter group in one round: its parameters, the sites that trained it and all sites, each in name order."""

    name: str
    parameters: tuple[str, ...]
    senders: tuple[Contribution, ...]
    everyone: tuple[Contribution, ...]

    @property
    def tower(self) -> Tower:
        """The tower that the group belongs to."""
        return tower_of(self.name)


def groups_of(contributions: Iterable[Contribution]) -> dict[str, Group]:
    """The groups that anybody trained, in name order; raises UpdateError where a site comes twice or sent half a group."""
    everyone = tuple(sorted(contributions, key=lambda one: one.site))
    if len({one.site for one in everyone}) != len(everyone):
        raise UpdateError("two updates carry the same site's name")
    place = {name: group_of(name) for name in {name for one in everyone for name in one.names()}}
    sent: dict[str, dict[str, set[str]]] = {}  # group -> site -> parameters
    for one in everyone:
        for name in one.names():
            sent.setdefault(place[name], {}).setdefault(one.site, set()).add(name)
    for name, by_site in sent.items():
        if len({frozenset(parameters) for parameters in by_site.values()}) > 1:
            raise UpdateError(f"sites sent different parameters of {name}; a group is sent whole or not at all")
    return {
        name: Group(
            name,
            parameters=tuple(sorted(next(iter(sent[name].values())))),
            senders=tuple(one for one in everyone if one.site in sent[name]),
            everyone=everyone,
        )
        for name in sorted(sent)
    }


def slabs(shape: Sequence[int], num_held: int) -> Iterator[Slab]:
    """Slabs that cover a parameter once, each within the bound when ``num_held`` sites' values are held together."""
    rows, columns = rows_of(shape)
    cells = max(1, SLAB_BYTES // (8 * num_held))
    height, width = max(1, cells // max(1, columns)), min(cells, columns)
    for start in range(0, rows, height):
        for left in range(0, columns, max(1, width)):
            yield Slab(start, min(start + height, rows), left, min(left + width, columns))


def read(contribution: Contribution, name: str, slab: Slab) -> Tensor:
    """A slab of a site's change, float64 [rows, columns], to be changed freely."""
    rows = contribution.rows(name, slab.start, slab.stop)
    if rows.ndim != 2 or len(rows) != slab.stop - slab.start or rows.shape[1] < slab.right:
        # A row where many are expected would be broadcast by the sum without a word.
        raise UpdateError(f"{name}: rows {slab.start} to {slab.stop} of an update came as {tuple(rows.shape)}")
    return rows[:, slab.left : slab.right].to(torch.float64, copy=True)


def norm(contribution: Contribution, parameters: Iterable[str], shapes: Shapes) -> float:
    """Euclidean length of a site's change of some parameters."""
    total = 0.0
    for name in parameters:
        for slab in slabs(shapes[name], 1):
            values = read(contribution, name, slab).numpy()
            total += float(np.square(values, out=values).sum())
    return math.sqrt(total)
