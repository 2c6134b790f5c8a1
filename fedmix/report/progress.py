"""How far a run has come, as its rows tell it one by one; knows nothing of screens and pages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from fedmix.report.history import EXAMPLES, Entry, is_loss

PACE_ROUNDS = 5  # rounds that the time left is told from


@dataclass
class SiteState:
    """What is known of one site: its last round, and the bytes and seconds of all its rounds."""

    stream: str
    state: str = "waiting"
    round: int | None = None
    losses: dict[str, float] = field(default_factory=dict)
    examples_per_s: float | None = None
    bytes_up: float = 0.0
    bytes_down: float = 0.0
    train_s: float = 0.0


@dataclass
class Progress:
    """A run as its metric rows tell it; knows nothing of screens."""

    total_rounds: int = 0
    sites: dict[str, SiteState] = field(default_factory=dict)
    stage: str = ""
    round: int = 0
    num_failed: int = 0
    evaluation: Mapping[str, float] = field(default_factory=dict)
    evaluation_round: int = 0
    reported: set[str] = field(default_factory=set)
    round_ends: list[float] = field(default_factory=list)
    round_seconds: float | None = None
    is_open: bool = False  # some site has reported in a round that has not ended

    def add(self, entry: Entry) -> None:
        """Take in one row."""
        self.stage = entry.stage or self.stage
        if entry.event == "site" and entry.site is not None:
            self._add_site(entry.site, entry.round, entry.values)
        elif entry.event == "round":
            self._end_round(entry)
        elif entry.event == "evaluation":
            self.evaluation, self.evaluation_round = dict(entry.values), entry.round

    def seconds_left(self) -> float | None:
        """Time left at the pace of the last rounds, what lies between them included; None before the first round ends."""
        recent = self.round_ends[-PACE_ROUNDS - 1 :]
        gaps = [later - earlier for earlier, later in pairwise(recent)]
        pace = statistics.mean(gaps) if gaps else self.round_seconds
        return None if pace is None else max(self.total_rounds - self.round, 0) * pace

    def mean_losses(self) -> dict[str, float]:
        """Each training loss as the plain mean over the sites that this round has heard of; for the eye, not for the record."""
        heard = [self.sites[name].losses for name in sorted(self.reported)]
        names = dict.fromkeys(name for losses in heard for name in losses)
        return {name: statistics.mean(losses[name] for losses in heard if name in losses) for name in names}

    def bytes_up(self) -> float:
        """Bytes that all sites have sent."""
        return sum(site.bytes_up for site in self.sites.values())

    def _add_site(self, name: str, number: int, values: Mapping[str, float]) -> None:
        if not self.is_open:
            self.is_open, self.reported = True, set()
            for other in self.sites.values():
                other.state = "waiting"
        site = self.sites.setdefault(name, SiteState(stream=""))
        self.reported.add(name)
        site.state, site.round = "sent", number
        site.losses = {metric.split("/")[1]: value for metric, value in values.items() if is_loss(metric)}
        seconds = values.get("time/train_s", 0.0)
        examples = sum(values.get(metric, 0.0) for metric in EXAMPLES)
        site.examples_per_s = examples / seconds if seconds > 0 else None
        site.bytes_up += values.get("comm/bytes_up", 0.0)
        site.bytes_down += values.get("comm/bytes_down", 0.0)
        site.train_s += seconds

    def _end_round(self, entry: Entry) -> None:
        self.is_open = False
        self.round = entry.round
        self.round_seconds = entry.values.get("time/round_s")
        self.num_failed += int(entry.values.get("num_failed", 0))
        if entry.time is not None:
            self.round_ends.append(entry.time)
        for name, site in self.sites.items():
            if name not in self.reported:
                site.state = "missed" if entry.values.get("num_failed") and site.state == "waiting" else "idle"
