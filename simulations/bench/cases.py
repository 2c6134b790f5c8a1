"""Every bench and its cases by name, for the command line."""

from __future__ import annotations

from collections.abc import Callable

from simulations.bench import Line, federation, prepare, privacy, step

BENCHES: dict[str, dict[str, Callable[[], Line]]] = {
    "step": step.CASES,
    "federation": federation.CASES,
    "prepare": prepare.CASES,
    "privacy": privacy.CASES,
}
