"""What a round's updates cost and counted: seconds, bytes, studies and privacy, on the server's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedmix import config
from fedmix.batch import Stream
from fedmix.privacy import ACCOUNTANT, PROMISES
from server.spool import Coded


@dataclass(frozen=True)
class Taken:
    """A site's update that counts, with the facts around it.

    ``examples``: studies processed, before any cap. ``privacy``: what the site's ledger holds with this round.
    """

    update: Coded
    examples: Mapping[Stream, int]
    bytes_up: int
    train_start: float
    train_end: float
    privacy: Mapping[str, float] = field(default_factory=dict)


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds in which at least one interval runs."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def facts_of_site(taken: Taken, bytes_down: int) -> dict[str, float]:
    """What metrics.jsonl tells of a site's update."""
    values = {f"train/{name}": total / weight for name, (total, weight) in taken.update.metrics.items() if weight > 0}
    values |= {f"data/{stream}": float(count) for stream, count in taken.examples.items()}
    values |= {f"privacy/{name}": value for name, value in taken.privacy.items()}
    return values | {
        "comm/bytes_up": float(taken.bytes_up),
        "comm/bytes_down": float(bytes_down),
        "time/train_s": taken.train_end - taken.train_start,
    }


def on_our_clock(taken: Taken, sent: float, came: float) -> Taken:
    """The update with its training time inside the time we waited for it; a site's clock may be wrong."""
    if sent <= taken.train_start <= taken.train_end <= came:
        return taken
    length = min(max(taken.train_end - taken.train_start, 0.0), came - sent)
    return replace(taken, train_start=came - length, train_end=came)


def add(totals: dict[str, float], name: str, value: float) -> None:
    """Add to a sum that may not be there yet."""
    totals[name] = totals.get(name, 0.0) + value


def privacy_of(experiment: config.Experiment, totals: Mapping[str, float]) -> dict[str, Any]:
    """The privacy block of report.json. A site's epsilon is what its ledger held at its last update that counted.

    Epsilon is the largest site's: patients are those of one site; one of several bears the sum of theirs. Where the server
    adds the noise it is that of the run's own ledger, and no site tells one.
    """
    settings = experiment.privacy
    if settings.mode == "none":
        return {"mode": "none"}
    names = ("epsilon", "epsilon_rdp", "steps", "noise_multiplier", "sample_rate")
    sites = [
        {"name": site.name} | {name: totals[f"privacy/{site.name}/{name}"] for name in names}
        for site in experiment.data.sites
        if f"privacy/{site.name}/epsilon" in totals
    ]
    told: list[Mapping[str, Any]] = [*sites]
    if "privacy/epsilon" in totals:
        told.append({name: totals[f"privacy/{name}"] for name in names[:3]})
    largest = {name: max((one[name] for one in told), default=None) for name in names[:3]}
    promise = PROMISES[settings.mode]
    return {
        "mode": settings.mode,
        "delta": settings.delta,
        "unit": promise.unit,
        "relation": promise.relation,
        "accountant": ACCOUNTANT,
        "clip": settings.clip,
        "trainable": settings.trainable,
        "sites": sites,
    } | largest
