"""What a round's updates cost and counted: seconds, bytes and studies, on the server's clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmix.batch import Stream
from server.spool import Coded


@dataclass(frozen=True)
class Taken:
    """A site's update that counts, with the facts around it. ``examples``: studies processed, before any cap."""

    update: Coded
    examples: Mapping[Stream, int]
    bytes_up: int
    train_start: float
    train_end: float


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
