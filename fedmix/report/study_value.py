"""What each hospital of a study got: the federation's model less its own on its own patients, over seeds.

Differences are taken within a seed, where both models had the same hospital's patients, before their mean and interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmix.report import quantities
from fedmix.report.site_value import KINDS, Kind
from fedmix.report.study import Estimate, Study, estimate, estimate_json
from fedmix.report.summary import Site

HEAD = ("hospital", "measure", "alone", "federation", "got", "interval")
ABOUT = (
    "Means over seeds on each hospital's own held-out patients; got is the mean of the differences within a seed, and its 95 % "
    "interval (Student's t), above zero where the federation is better."
)


@dataclass(frozen=True)
class Row:
    """One measure of one hospital over the seeds that have it; ``got`` is positive where the federation is better."""

    site: str
    name: str
    alone: Estimate | None
    federation: Estimate
    got: Estimate | None

    @property
    def texts(self) -> tuple[str, ...]:
        """In the order of HEAD."""
        kind = KINDS[self.name]
        alone = quantities.DASH if self.alone is None else kind.show(self.alone.mean)
        if self.got is None:
            return self.site, kind.title, alone, kind.show(self.federation.mean), quantities.DASH, ""
        span = "" if self.got.interval is None else " to ".join(_signed(kind, end) for end in self.got.interval)
        got = f"{_signed(kind, self.got.mean)} {kind.unit}"
        return self.site, kind.title, alone, kind.show(self.federation.mean), got, span


def rows(study: Study, regime: str) -> tuple[Row, ...]:
    """Every hospital's measures, in the order of the sites; nothing where no cell's hospitals were asked."""
    by_seed = {cell.seed: cell.sites for cell in study.cells if cell.regime == regime}
    names = dict.fromkeys((site.name, name) for sites in by_seed.values() for site in sites for name in site.scores)
    found = [_row(site, name, by_seed) for site, name in names if name in KINDS]
    return tuple(row for row in found if row is not None)


def as_json(study: Study, regime: str) -> dict[str, Any]:
    """The same for study.json: site -> measure -> alone, federation and got, each null where no seed has it."""
    found: dict[str, Any] = {}
    for row in rows(study, regime):
        parts = {"alone": row.alone, "federation": row.federation, "got": row.got}
        told = {part: None if one is None else estimate_json(one) for part, one in parts.items()}
        found.setdefault(row.site, {})[row.name] = told
    return found


def _row(site: str, name: str, by_seed: dict[int, tuple[Site, ...]]) -> Row | None:
    scores = {
        seed: one.scores[name] for seed, sites in by_seed.items() for one in sites if one.name == site and name in one.scores
    }
    alone = {seed: score.alone for seed, score in scores.items() if score.alone is not None}
    federation = estimate({seed: score.value for seed, score in scores.items()})
    got = {seed: KINDS[name].sign * (scores[seed].value - value) for seed, value in alone.items()}
    return None if federation is None else Row(site, name, estimate(alone), federation, estimate(got))


def _signed(kind: Kind, value: float) -> str:
    return ("\N{MINUS SIGN}" if value < 0 else "+") + kind.amount(value)
