"""The server's sum: from the sites' changes to one change for each parameter, one parameter at a time.

Sites are added in name order in float64, so the order of arrival changes no bit. A site of weight zero is invisible, even if
it sent infinities, and what only such sites sent nobody trained: it is not yielded, so the server's optimiser leaves it be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from fedmix import config
from fedmix.errors import UpdateError
from fedmix.federation.robust import clip_factors, middle, num_cut
from fedmix.federation.slabs import Group, Shapes, Slab, groups_of, norm, read, slabs, stacked
from fedmix.federation.update import Contribution, rows_of
from fedmix.federation.weights import rule_weights, step_factors


@dataclass(frozen=True)
class Summand:
    """A site in a group's sum: its weight, and what its change is multiplied with before it is weighed."""

    contribution: Contribution
    weight: float
    factor: float


def aggregate(
    contributions: Sequence[Contribution], shapes: Shapes, settings: config.Aggregation
) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 change of every parameter that a site with a weight trained, in name order.

    Holds one tensor and one slab at a time (of every site, where ``combine`` is not the mean), never an update. Clipping reads
    every change once more. Raises UpdateError before anything is yielded.
    """
    groups = groups_of(contributions)
    unknown = {name for group in groups.values() for name in group.parameters} - set(shapes)
    if unknown:
        raise UpdateError(f"{len(unknown)} tensors in the updates are not in the model")
    summands = {name: _summands(group, shapes, settings) for name, group in groups.items()}
    places = sorted((parameter, name) for name, group in groups.items() if summands[name] for parameter in group.parameters)
    return ((parameter, _total(parameter, shapes[parameter], summands[group], settings)) for parameter, group in places)


def aggregate_second_moments(contributions: Sequence[Contribution], settings: config.Aggregation) -> dict[str, float]:
    """AdamW's second moment by parameter, one number each: the mean over sites (FedAdamW, 2510.27486).

    Combined, limited and weighed as the changes are, so that one site can no more stop the others by a huge number than move
    the model by a huge change; but weights are scaled to sum to one, for a mean of moments must not shrink.
    """
    found: dict[str, float] = {}
    for group in groups_of(contributions).values():
        weights = rule_weights(group, settings)
        for name in group.parameters:
            held = {one.site: one.second_moments[name] for one in group.senders if name in one.second_moments}
            held = {site: value for site, value in held.items() if weights[site] > 0}
            if held:
                factors = clip_factors(held, settings)
                found[name] = _moment(
                    [value * factors[site] for site, value in held.items()], [weights[one] for one in held], settings
                )
    return dict(sorted(found.items()))


def _moment(values: Sequence[float], weights: Sequence[float], settings: config.Aggregation) -> float:
    cut = num_cut(len(values), settings)
    return fmean(values, weights) if cut is None else fmean(sorted(values)[cut : len(values) - cut])


def _summands(group: Group, shapes: Shapes, settings: config.Aggregation) -> list[Summand]:
    """The sites that have a say in a group, in name order."""
    weights = rule_weights(group, settings)
    steps = step_factors(group, weights, settings)
    weighing = [one for one in group.senders if weights[one.site] > 0]
    lengths: dict[str, float] = {}
    if settings.clip is not None:
        for one in weighing:
            lengths[one.site] = norm(one, group.parameters, shapes) * steps[one.site]
    clips = clip_factors(lengths, settings)
    return [Summand(one, weights[one.site], steps[one.site] * clips.get(one.site, 1.0)) for one in weighing]


def _total(name: str, shape: Sequence[int], summands: Sequence[Summand], settings: config.Aggregation) -> Tensor:
    cut = num_cut(len(summands), settings)
    total = torch.empty(shape, dtype=torch.float32)
    rows = total.view(rows_of(shape))
    for slab in slabs(shape, 1 if cut is None else len(summands)):
        place = rows[slab.start : slab.stop, slab.left : slab.right]
        place.copy_(_mean(name, slab, summands) if cut is None else _middle(name, slab, summands, cut))
    return total


def _mean(name: str, slab: Slab, summands: Sequence[Summand]) -> Tensor:
    """The weighted sum; each site's slab is dropped before the next is read."""
    total = torch.zeros(slab.stop - slab.start, slab.right - slab.left, dtype=torch.float64)
    for one in summands:
        total.add_(read(one.contribution, name, slab).double(), alpha=one.weight * one.factor)
    return total


def _middle(name: str, slab: Slab, summands: Sequence[Summand], cut: int) -> Tensor:
    """The coordinate-wise rule counts sites alike. It is scaled by the sum of the weights: some rules move a group less."""
    values_SRC = stacked([one.contribution for one in summands], name, slab)
    for place, one in zip(values_SRC, summands, strict=True):
        place.mul_(one.factor)
    return middle(values_SRC, cut).mul_(sum(one.weight for one in summands))
