"""What the sites' changes of a round look like beside each other: lengths, directions and weights.

Metric paths: ``norm/<group>/<site>``, ``weight/<group>/<site>``, ``cosine/<group>/<site>:<site>`` (up to MAX_COMPARED sites)
and ``cosine/<group>/<stream>:<stream>`` between the streams' weighted sums, which is where unpaired data helps pairs or works
against them. The group ``shared`` stands for the whole trunk. A site whose work mixes streams is in none of the streams' sums,
and a change of zero has no direction: its cosines are left out. Every change is read once and nothing here decides the model,
so a caller that minds the time leaves it out.

Shapes: S sites that weigh, M streams, N values of a slab.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from fedmix.batch import STREAMS
from fedmix.federation.slabs import Group, Shapes, groups_of, read, slabs, stacked
from fedmix.federation.update import Contribution

MAX_COMPARED = 8  # sites; the pairs grow with the square

Products = dict[tuple[str, str], float]  # inner products of two sites' (or streams') changes; with itself: the square


def diagnose(
    contributions: Sequence[Contribution], shapes: Shapes, weights: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Metrics by path; ``weights`` are those of ``weights_of``. A site of weight zero has its weight and nothing else."""
    values = {f"weight/{group}/{site}": weight for group, held in weights.items() for site, weight in held.items()}
    trunk_sites: Products = {}
    trunk_streams: Products = {}
    for group in groups_of(contributions).values():
        weighing = [one for one in group.senders if weights[group.label][one.site] > 0]
        shares_MS = _shares_of_streams(weighing, weights[group.label])
        of_sites, of_streams = (_few if len(weighing) <= MAX_COMPARED else _many)(group, weighing, shares_MS, shapes)
        values |= {f"norm/{group.label}/{one.site}": math.sqrt(of_sites[one.site, one.site]) for one in weighing}
        values |= _cosines(group.label, of_sites) | _cosines(group.label, of_streams)
        if group.tower == "shared":
            _add(trunk_sites, of_sites)
            _add(trunk_streams, of_streams)
    return values | _cosines("shared", trunk_sites) | _cosines("shared", trunk_streams)


def _few(group: Group, weighing: Sequence[Contribution], shares_MS: Tensor, shapes: Shapes) -> tuple[Products, Products]:
    """Between all sites; what is between streams follows from it, for the sums are linear in the changes."""
    gram_SS = torch.zeros(len(weighing), len(weighing), dtype=torch.float64)
    for name in group.parameters if weighing else ():
        for slab in slabs(shapes[name], len(weighing)):
            values_SN = stacked(weighing, name, slab).flatten(start_dim=1)
            gram_SS += values_SN @ values_SN.T
    return _named([one.site for one in weighing], gram_SS), _named(STREAMS, shares_MS @ gram_SS @ shares_MS.T)


def _many(group: Group, weighing: Sequence[Contribution], shares_MS: Tensor, shapes: Shapes) -> tuple[Products, Products]:
    """Of many sites only each one's square; streams are added up as the sites are read, one site at a time."""
    squares: Products = {(one.site, one.site): 0.0 for one in weighing}
    gram_MM = torch.zeros(len(STREAMS), len(STREAMS), dtype=torch.float64)
    for name in group.parameters:
        for slab in slabs(shapes[name], len(STREAMS)):
            sums_MN = torch.zeros(len(STREAMS), (slab.stop - slab.start) * (slab.right - slab.left), dtype=torch.float64)
            for column, one in enumerate(weighing):
                values_N = read(one, name, slab).flatten().double()
                squares[one.site, one.site] += float(values_N @ values_N)
                for stream in shares_MS[:, column].nonzero().flatten().tolist():
                    sums_MN[stream].add_(values_N, alpha=float(shares_MS[stream, column]))
            gram_MM += sums_MN @ sums_MN.T
    return squares, _named(STREAMS, gram_MM)


def _shares_of_streams(weighing: Sequence[Contribution], weights: Mapping[str, float]) -> Tensor:
    """[M, S]: a site's weight in the row of its stream, if it has but one."""
    shares_MS = torch.zeros(len(STREAMS), len(weighing), dtype=torch.float64)
    for column, one in enumerate(weighing):
        held = [row for row, stream in enumerate(STREAMS) if one.examples.get(stream)]
        if len(held) == 1:
            shares_MS[held[0], column] = weights[one.site]
    return shares_MS


def _named(names: Sequence[str], gram: Tensor) -> Products:
    rows = gram.tolist()
    return {(names[i], names[j]): rows[i][j] for i in range(len(names)) for j in range(i, len(names))}


def _add(total: Products, products: Products) -> None:
    for pair, product in products.items():
        total[pair] = total.get(pair, 0.0) + product


def _cosines(group: str, products: Products) -> dict[str, float]:
    names = [one for one, other in products if one == other and products[one, other] > 0]
    return {
        f"cosine/{group}/{one}:{other}": products[one, other] / math.sqrt(products[one, one] * products[other, other])
        for one, other in combinations(names, 2)
        if (one, other) in products
    }
