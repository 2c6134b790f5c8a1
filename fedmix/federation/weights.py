"""Whose update weighs how much in a parameter group: the rules by name, and steps made comparable.

Plain FedAvg divides every parameter's sum by the examples of ALL sites, so what few sites train hardly moves.
``modality_aware`` weighs per parameter group and per stream instead:

    p[k, g] = sum over streams m that reach g of  mix[m | g] * n[k, m]^a / sum_j n[j, m]^a

with the mix renormalised over the streams present, so that the weights of a group sum to one over the sites that trained
it. The other rules are there for comparison. Two of them, ``modality_exact`` and ``fedcola``, come from systems that keep
one model for each kind of site; here there is ONE model for all, and each rule says what becomes of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedmix import config
from fedmix.batch import STREAMS, Stream
from fedmix.errors import UpdateError
from fedmix.federation.slabs import Group, groups_of
from fedmix.federation.update import REACHED_BY, Contribution, Tower

Weights = dict[str, float]  # site -> weight

# alpha of 2109.04833: how many times a pair counts. 100 is what a public re-implementation uses; the paper was not at hand.
MULTIMODAL_WEIGHT = 100.0
STEPS_ALIKE = 1.2  # most over fewest; AdamW's steps are not proportional to gradients, so small differences are left alone


def modality_aware(group: Group, settings: config.Aggregation) -> Weights:
    """The rule above; weights sum to one."""
    mix = _mix(group.tower, settings)
    totals = {stream: sum(_power(one, stream, settings) for one in group.senders) for stream in STREAMS}
    present = {stream: share for stream, share in mix.items() if totals[stream] > 0}
    scale = sum(present.values())
    if scale == 0:
        raise UpdateError(f"sites sent {group.tower} parameters, but none of them trained on a stream that reaches them")
    return {
        one.site: sum(share / scale * _power(one, stream, settings) / totals[stream] for stream, share in present.items())
        for one in group.senders
    }


def fedavg_all(group: Group, settings: config.Aggregation) -> Weights:
    """FedAvg (1602.05629): every site counts by its examples, and one that did not train the group counts as unchanged."""
    return _shares(group.senders, STREAMS, among=group.everyone)


def paired_only(group: Group, settings: config.Aggregation) -> Weights:
    """FedAvg among the sites that hold pairs; the others weigh nothing."""
    if not any(one.examples.get("paired") for one in group.everyone):
        raise UpdateError("rule paired_only got no update from a site with pairs; give the stage a paired site")
    return _shares(group.senders, ("paired",), among=group.everyone)


def modality_exact(group: Group, settings: config.Aggregation) -> Weights:
    """FedIoT (2109.04833): a modality's part is averaged over the sites that hold the modality, a pair counting alpha times.

    FedIoT has an encoder for each modality and no trunk in common. Our one trunk is the mean of what either modality would
    have made of it: half averaged over the sites with images and half over those with reports. Weights sum to one.
    """
    modalities: tuple[Tower, ...] = ("image", "text") if group.tower == "shared" else (group.tower,)
    held = [found for tower in modalities if (found := _shares(group.senders, REACHED_BY[tower], pair=MULTIMODAL_WEIGHT))]
    if not held:
        raise UpdateError(f"sites sent {group.tower} parameters, but none of them trained on a stream that reaches them")
    return {one.site: sum(shares[one.site] for shares in held) / len(held) for one in group.senders}


def fedcola(group: Group, settings: config.Aggregation) -> Weights:
    """FedCola (2404.12467): attention is shared by all sites; the rest inside one kind of site, and with a smaller step.

    FedCola keeps a model for each kind of site and is judged by the multimodal one, so our one model is that one: outside
    attention it follows the paired sites, and in a round without any the unpaired ones. Its "compensation" divides by the
    examples of all sites that hold the modality, whose attention is shared: weights sum to at most one.
    """
    streams = REACHED_BY[group.tower]
    if group.name.endswith(".attention"):
        return _shares(group.senders, streams)
    paired = [one for one in group.senders if one.examples.get("paired")]
    shares = _shares(paired or group.senders, streams, among=group.senders)
    return {one.site: shares.get(one.site, 0.0) for one in group.senders}


RULES: dict[str, Callable[[Group, config.Aggregation], Weights]] = {
    "modality_aware": modality_aware,
    "fedavg_all": fedavg_all,
    "paired_only": paired_only,
    "modality_exact": modality_exact,
    "fedcola": fedcola,
}


def rule_weights(group: Group, settings: config.Aggregation) -> Weights:
    """The rule's weights of the sites that trained the group."""
    return RULES[settings.rule](group, settings)


def step_factors(group: Group, weights: Mapping[str, float], settings: config.Aggregation) -> dict[str, float]:
    """By what each site's change is multiplied so that sites with more steps do not count more (FedNova, 2007.07481).

    Mean steps over own steps, the mean taken with the weights; 1 where steps differ by a fifth or less. Sites of weight zero
    have no say in it.
    """
    steps = {one.site: one.steps for one in group.senders if weights[one.site] > 0}
    if not settings.normalise_steps or not steps or max(steps.values()) <= STEPS_ALIKE * min(steps.values()):
        return {one.site: 1.0 for one in group.senders}
    mean = sum(weights[site] * taken for site, taken in steps.items()) / sum(weights[site] for site in steps)
    return {one.site: mean / one.steps if one.site in steps else 1.0 for one in group.senders}


def weights_of(contributions: Sequence[Contribution], settings: config.Aggregation) -> dict[str, Weights]:
    """Effective weights by group and site: what a change is multiplied with in the mean, before any clipping."""
    found = {}
    for name, group in groups_of(contributions).items():
        weights = rule_weights(group, settings)
        factors = step_factors(group, weights, settings)
        found[name] = {site: weight * factors[site] for site, weight in weights.items()}
    return found


def _shares(
    sites: Iterable[Contribution],
    streams: Sequence[Stream],
    *,
    among: Iterable[Contribution] | None = None,
    pair: float = 1.0,
) -> Weights:
    """Each site's share of the examples of some streams that the sites ``among`` hold; empty where these hold none."""
    sites = list(sites)
    total = sum(_examples(one, streams, pair) for one in (sites if among is None else among))
    return {one.site: _examples(one, streams, pair) / total for one in sites} if total else {}


def _examples(one: Contribution, streams: Sequence[Stream], pair: float) -> float:
    return sum(one.examples.get(stream, 0) * (pair if stream == "paired" else 1.0) for stream in streams)


def _mix(tower: Tower, settings: config.Aggregation) -> dict[Stream, float]:
    if tower == "shared":
        return {stream: getattr(settings.shared_mix, stream) for stream in STREAMS}
    return {stream: 1.0 / len(REACHED_BY[tower]) for stream in REACHED_BY[tower]}


def _power(one: Contribution, stream: Stream, settings: config.Aggregation) -> float:
    count = one.examples.get(stream, 0)
    return float(count) ** settings.count_exponent if count > 0 else 0.0
