"""metrics.jsonl as curves: what each site's losses, and the central evaluation, did from round to round.

Rounds are counted from 1 through all stages. A resumed run repeats the rounds after its last checkpoint; the later row is
the one that counts. A run that was killed may leave half a last line, which is dropped; half a line elsewhere is an error.
events.jsonl has the same rows as they come, before their round is committed, and why sites were dropped and rounds failed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard, TypeVar

from fedmix.errors import RunError

EVENTS = "events.jsonl"  # in a run folder: rows as they come, with the sites dropped and rounds failed, for whoever watches
OBJECTIVES = ("mvm", "mlm", "contrast", "match")  # the order in which panels appear; others follow
EXAMPLES = ("data/image", "data/text", "data/paired")


Parsed = TypeVar("Parsed")


class Point(NamedTuple):
    """One round of a curve."""

    round: int
    value: float


@dataclass(frozen=True)
class Entry:
    """One line of metrics.jsonl; values that are not finite numbers are left out."""

    event: str
    stage: str
    round: int
    site: str | None
    values: Mapping[str, float]
    time: float | None = None


@dataclass(frozen=True)
class StageSpan:
    """The rounds that a stage has run, both ends included."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class History:
    """Every line that counts, in the order written."""

    entries: tuple[Entry, ...] = ()
    stages: tuple[StageSpan, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Find the stages once."""
        rounds: dict[str, list[int]] = defaultdict(list)
        for entry in self.entries:
            if entry.event != "evaluation":  # an evaluation before the first round belongs to no stage's rounds
                rounds[entry.stage].append(entry.round)
        object.__setattr__(self, "stages", tuple(StageSpan(name, min(seen), max(seen)) for name, seen in rounds.items()))

    def of(self, event: str) -> list[Entry]:
        """The lines of one event."""
        return [entry for entry in self.entries if entry.event == event]

    def objectives(self) -> list[str]:
        """Names of the training losses that occur, the known ones first."""
        seen = {name.split("/")[1] for entry in self.of("site") for name in entry.values if is_loss(name)}
        return [name for name in OBJECTIVES if name in seen] + sorted(seen - set(OBJECTIVES))

    def site_curves(self, metric: str) -> dict[str, list[Point]]:
        """For each site that has it, a metric round by round."""
        curves: dict[str, list[Point]] = defaultdict(list)
        for entry in self.of("site"):
            if entry.site is not None and metric in entry.values:
                curves[entry.site].append(Point(entry.round, entry.values[metric]))
        return {site: sorted(points) for site, points in curves.items()}

    def stream_curves(self, metric: str, stream_of: Mapping[str, str]) -> dict[str, list[Point]]:
        """For each stream the mean over its sites, each weighted by the examples it trained on in that round."""
        sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for entry in self.of("site"):
            if metric in entry.values and entry.site is not None:
                weight = sum(entry.values.get(name, 0.0) for name in EXAMPLES) or 1.0
                running = sums[stream_of.get(entry.site, "other"), entry.round]
                running[0] += weight * entry.values[metric]
                running[1] += weight
        curves: dict[str, list[Point]] = defaultdict(list)
        for (stream, number), (total, weight) in sorted(sums.items()):
            curves[stream].append(Point(number, total / weight))
        return dict(curves)

    def streams(self) -> dict[str, str]:
        """What each site trained on, read from its counts; several streams are joined by a plus sign."""
        seen: dict[str, dict[str, None]] = defaultdict(dict)
        for entry in self.of("site"):
            if entry.site is not None:
                seen[entry.site] |= {name.removeprefix("data/"): None for name in EXAMPLES if entry.values.get(name, 0) > 0}
        return {site: "+".join(names) for site, names in seen.items()}

    def central_curves(self) -> dict[str, list[Point]]:
        """Every metric of the central evaluation that was measured more than once; its own time is no metric of a model."""
        curves: dict[str, list[Point]] = defaultdict(list)
        for entry in self.of("evaluation"):
            for name, value in entry.values.items():
                if not name.startswith("time/"):
                    curves[name].append(Point(entry.round, value))
        return {name: sorted(points) for name, points in curves.items() if len(points) > 1}

    def total(self, event: str, name: str) -> float:
        """A value added up over all lines of an event."""
        return sum(entry.values.get(name, 0.0) for entry in self.of(event))

    def absences(self) -> dict[str, int]:
        """For each site, the rounds of the stages it took part in without which it stayed."""
        present: dict[str, set[int]] = defaultdict(set)
        for entry in self.of("site"):
            if entry.site is not None:
                present[entry.site].add(entry.round)
        closed = {entry.round for entry in self.of("round")}
        missing = {}
        for site, rounds in present.items():
            spans = [span for span in self.stages if any(span.first <= number <= span.last for number in rounds)]
            missing[site] = sum(span.first <= number <= span.last for span in spans for number in closed - rounds)
        return missing


def is_loss(name: str) -> bool:
    """Whether a metric is a training loss: train/OBJECTIVE/loss."""
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == "train" and parts[2] == "loss"


@dataclass(frozen=True)
class Trouble:
    """What went wrong in a round: with a site, or with the round itself."""

    round: int
    site: str | None
    why: str


def read_history(path: Path) -> History:
    """The history in a metrics.jsonl, empty where there is no file; raises RunError that names the line."""
    latest: dict[tuple[str, str, int, str | None], Entry] = {}
    for entry in _read_lines(path, parse_entry):
        latest[entry.event, entry.stage, entry.round, entry.site] = entry
    return History(tuple(latest.values()))


def read_so_far(run_dir: Path) -> tuple[History, tuple[Trouble, ...]]:
    """What a run folder tells up to now: the committed rounds, the one that is going on, and what went wrong, oldest first.

    Raises RunError that names the file and line.
    """
    latest = {(one.event, one.stage, one.round, one.site): one for one in read_history(run_dir / "metrics.jsonl").entries}
    troubles = []
    for found in _read_lines(run_dir / EVENTS, _parse_event):
        if isinstance(found, Trouble):
            troubles.append(found)
        else:
            latest[found.event, found.stage, found.round, found.site] = found
    return History(tuple(latest.values())), tuple(troubles)


def _read_lines(path: Path, parse: Callable[[Any], Parsed]) -> list[Parsed]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path.name}: {type(error).__name__}; expected lines of JSON in UTF-8") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(parse(json.loads(line)))
        except (ValueError, RunError) as error:
            if number == len(lines):
                break  # the run was killed, or is at it, while it wrote this line
            raise RunError(f"{path.name} line {number}: {error}; remove the line or restore the file") from None
    return found


def _parse_event(row: Any) -> Entry | Trouble:
    """One row of events.jsonl: those of dropped sites and failed rounds have a reason in place of values."""
    if not isinstance(row, Mapping) or row.get("event") not in ("dropped", "failed"):
        return parse_entry(row)
    site = row.get("site")
    if not isinstance(row.get("round"), int):
        raise RunError("expected an object with event, stage, round, site and why")
    return Trouble(row["round"], None if site is None else str(site), str(row.get("why")))


def parse_entry(row: Any) -> Entry:
    """One row of metrics.jsonl; raises RunError if it is not one."""
    if not isinstance(row, Mapping) or not isinstance(row.get("values"), Mapping) or not isinstance(row.get("round"), int):
        raise RunError("expected an object with event, stage, round, site and values")
    site, moment = row.get("site"), row.get("time")
    return Entry(
        event=str(row.get("event")),
        stage=str(row.get("stage") or ""),
        round=row["round"],
        site=None if site is None else str(site),
        values={str(name): float(value) for name, value in row["values"].items() if _is_finite(value)},
        time=float(moment) if _is_finite(moment) else None,
    )


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most ``limit`` points: means over equal runs of rounds where there are more."""
    if len(points) <= limit:
        return list(points)
    edges = [len(points) * part // limit for part in range(limit + 1)]
    groups = [points[start:stop] for start, stop in pairwise(edges)]
    return [Point(group[-1].round, sum(point.value for point in group) / len(group)) for group in groups]


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
