"""The server's arithmetic: pure functions from updates to the next parameters.

Plain FedAvg divides every parameter's sum by the examples of ALL sites, so what few sites train hardly moves. Here
weights are per parameter group and per stream:

    p[k, g] = sum over streams m that reach g of  mix[m | g] * n[k, m]^a / sum_j n[j, m]^a

with the mix renormalised over the streams present, so that the weights of a group sum to one over the sites that trained
it. ``fedavg_all`` is the naive rule kept for comparison; ``paired_only`` lets only paired sites count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedmix import config
from fedmix.batch import STREAMS, Stream
from fedmix.errors import UpdateError
from fedmix.federation.update import REACHED_BY, Tower, Update, group_of, tower_of

Weights = dict[str, float]  # site -> weight


def modality_aware(updates: Sequence[Update], tower: Tower, settings: config.Aggregation) -> Weights:
    """Weights of a tower's groups among the sites given, which all trained it; they sum to one."""
    mix = _mix(tower, settings)
    totals = {stream: sum(_power(update, stream, settings) for update in updates) for stream in STREAMS}
    present = {stream: share for stream, share in mix.items() if totals[stream] > 0}
    norm = sum(present.values())
    if norm == 0:
        raise UpdateError(f"sites sent {tower} parameters, but none of them trained on a stream that reaches them")
    return {
        update.site: sum(share / norm * _power(update, stream, settings) / totals[stream] for stream, share in present.items())
        for update in updates
    }


def fedavg_all(updates: Sequence[Update], tower: Tower, settings: config.Aggregation) -> Weights:
    """FedAvg (1602.05629): every site counts by its examples, whatever it trained."""
    total = sum(_num_examples(update) for update in updates)
    return {update.site: _num_examples(update) / total for update in updates}


def paired_only(updates: Sequence[Update], tower: Tower, settings: config.Aggregation) -> Weights:
    """FedAvg among the sites that hold pairs; the others weigh nothing."""
    total = sum(update.examples.get("paired", 0) for update in updates)
    if total == 0:
        raise UpdateError("rule paired_only got no update from a site with pairs; give the stage a paired site")
    return {update.site: update.examples.get("paired", 0) / total for update in updates}


# Rules by name. A naive rule divides by all sites, also by those that did not train the group.
RULES: dict[str, Callable[[Sequence[Update], Tower, config.Aggregation], Weights]] = {
    "modality_aware": modality_aware,
    "fedavg_all": fedavg_all,
    "paired_only": paired_only,
}


def aggregate(updates: Sequence[Update], settings: config.Aggregation) -> dict[str, Tensor]:
    """The weighted sum of the sites' deltas by parameter name; parameters that nobody trained are absent.

    Sites are added in name order in float64, so the order of arrival changes nothing, to the bit.
    """
    ordered = sorted(updates, key=lambda update: update.site)
    if len({update.site for update in ordered}) != len(ordered):
        raise UpdateError("two updates carry the same site's name")
    names = sorted({name for update in ordered for name in update.deltas})
    weights: dict[tuple[str, tuple[str, ...]], Weights] = {}
    deltas: dict[str, Tensor] = {}
    for name in names:
        contributors = [update for update in ordered if name in update.deltas]
        group = group_of(name)
        key = (group, tuple(update.site for update in contributors))
        if key not in weights:
            counted = contributors if settings.rule == "modality_aware" else ordered
            weights[key] = RULES[settings.rule](counted, tower_of(group), settings)
        # A site of weight zero is invisible, even if it sent infinities; what only such sites sent, nobody trained.
        weighing = [update for update in contributors if weights[key][update.site]]
        if weighing:
            total = torch.zeros_like(weighing[0].deltas[name], dtype=torch.float64)
            for update in weighing:
                total.add_(update.deltas[name].double(), alpha=weights[key][update.site])
            deltas[name] = total.float()
    return deltas


def outer_step(
    parameters: Mapping[str, Tensor], deltas: Mapping[str, Tensor], velocity: Mapping[str, Tensor], settings: config.Outer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The server's SGD step along the aggregated change, as new parameters and new velocity.

    Parameters without a change, and their velocity, stay as they are to the bit.
    """
    new_parameters, new_velocity = dict(parameters), dict(velocity)
    for name, delta in deltas.items():
        step = delta
        if settings.momentum > 0:
            moving = settings.momentum * velocity.get(name, torch.zeros_like(delta)) + delta
            new_velocity[name] = moving
            step = delta + settings.momentum * moving if settings.nesterov else moving
        new_parameters[name] = parameters[name] + settings.lr * step
    return new_parameters, new_velocity


def _mix(tower: Tower, settings: config.Aggregation) -> dict[Stream, float]:
    if tower == "shared":
        return {stream: getattr(settings.shared_mix, stream) for stream in STREAMS}
    return {stream: 1.0 / len(REACHED_BY[tower]) for stream in REACHED_BY[tower]}


def _power(update: Update, stream: Stream, settings: config.Aggregation) -> float:
    count = update.examples.get(stream, 0)
    return float(count) ** settings.count_exponent if count > 0 else 0.0


def _num_examples(update: Update) -> int:
    return sum(update.examples.values())
