"""Speed as ratios, measured side by side in one run; `fedmix bench` prints one JSON line a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from simulations.bench import federation

Line = dict[str, str | float]

BENCHES: dict[str, Callable[[], Iterator[Line]]] = {"federation": federation.cases}
