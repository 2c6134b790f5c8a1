"""What a site's patients have been asked to bear: epsilon by Opacus' accountants, and the ledger that it is counted from.

The ledger is a file of JSON lines on the site's own disk, one line for each round that was ever begun, and every line counts:
over rounds, stages and runs, and also where the site's key has changed, for a new key makes no new patients. A round is
written down and flushed BEFORE its first step, so a kill at any moment counts too much and never too little.

Two data sets are neighbours when one has a patient more, with all its studies. Each step is a Gaussian on a Poisson sample of
the patients (dpsgd.py), with the sample rate taken as known. Epsilon is the upper end of what numerical composition finds
(PRV, 2106.02848); moments (RDP, 1702.07476, 1908.10530), which give an upper bound on their own, check it.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy.optimize import brentq

from fedmix.errors import ConfigError, RunError

# Opacus' own orders end at 63, too soon for small epsilon.
ORDERS = [1 + tenth / 10.0 for tenth in range(1, 100)] + list(range(12, 64)) + [2**power for power in range(6, 13)]
PRV_ERROR = 0.01  # Opacus' default eps_error; its upper end is what is reported
LARGEST_NOISE = 1e4
PRECISION = 1e-3  # of a noise multiplier that is looked for


class Steps(NamedTuple):
    """Steps with the same noise and sample rate, in the order of Opacus' history."""

    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class Entry:
    """One round as the ledger holds it; ``at``: seconds since 1970, ``population``: mark of the key that hides patients."""

    at: float
    run: str
    round: int
    stage: str
    population: str
    noise_multiplier: float
    sample_rate: float
    steps: int


@dataclass(frozen=True)
class Account:
    """What a ledger adds up to: ``epsilon`` by PRV at ``delta``, ``epsilon_rdp`` beside it, over so many steps."""

    epsilon: float
    epsilon_rdp: float
    delta: float
    steps: int


def account_of(history: Sequence[Steps], delta: float) -> Account:
    """Compose steps of any noise and rate; raises RunError where the two accountants contradict each other."""
    steps = sum(one.steps for one in history)
    if not steps:
        return Account(0.0, 0.0, delta, 0)
    epsilon, bound = epsilon_by_prv(history, delta), epsilon_by_rdp(history, delta)
    if not epsilon <= bound + 2 * PRV_ERROR:
        raise RunError(
            f"the accountants disagree on what was spent ({epsilon:.4g} by PRV, at most {bound:.4g} by RDP); report it"
        )
    return Account(epsilon, bound, delta, steps)


def epsilon_by_prv(history: Sequence[Steps], delta: float) -> float:
    """Upper end of epsilon by numerical composition."""
    accountant = PRVAccountant()
    accountant.history = _together(history)
    with _quietly():
        return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))


def epsilon_by_rdp(history: Sequence[Steps], delta: float) -> float:
    """Upper bound of epsilon by moments."""
    accountant = RDPAccountant()
    accountant.history = _together(history)
    with _quietly():
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without two warnings: an order at the end of its range still gives a bound, and log 0 (a rate of 1) the right limit."""
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")
        yield


def noise_for(planned: Sequence[tuple[float, int]], *, epsilon: float, delta: float) -> float:
    """The least noise multiplier, up to ``PRECISION``, with which planned (sample rate, steps) spend at most ``epsilon``."""

    def history(noise: float) -> list[Steps]:
        return [Steps(noise, rate, steps) for rate, steps in planned]

    enough = 0.25
    while epsilon_by_rdp(history(enough), delta) > epsilon:  # PRV takes long where epsilon is far too large
        enough *= 1.25
        if enough > LARGEST_NOISE:
            raise ConfigError(f"no noise brings the planned steps down to epsilon = {epsilon:g}; raise it or plan fewer steps")

    @cache
    def excess(noise: float) -> float:
        return math.log(epsilon_by_prv(history(noise), delta) / epsilon)

    if excess(enough / 2) > 0:
        enough = brentq(excess, enough / 2, enough, xtol=PRECISION)
    noise = math.ceil(enough / PRECISION) * PRECISION
    while excess(noise) > 0:  # a root lies on either side
        noise += PRECISION
    return noise


class Ledger:
    """The file of one site's spendings."""

    def __init__(self, path: Path, *, whose: str = "this site's patients") -> None:
        """``whose`` budget it is, for the message that refuses to pass it."""
        self._path, self._whose = path, whose

    def entries(self) -> list[Entry]:
        """Every round that was begun, in order; raises RunError if a line is not one."""
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return []
        return list(_read(content))

    def account(self, delta: float) -> Account:
        """What is spent so far."""
        return account_of([_steps(entry) for entry in self.entries()], delta)

    def spend(self, entry: Entry, *, delta: float, budget: float | None) -> Account:
        """Write a round down, on the disk when this returns, and say what is spent with it.

        Raises RunError, and writes nothing, if that would be more than ``budget``.
        """
        with self._locked() as handle:
            content = b"".join(iter(lambda: os.read(handle, 2**20), b""))
            before = [_steps(one) for one in _read(content)]
            after = account_of([*before, _steps(entry)], delta)
            if budget is not None and after.epsilon > budget:
                spent = account_of(before, delta).epsilon
                raise RunError(
                    f"the privacy budget of {self._whose} would be passed: epsilon {spent:.3g} of {budget:g} is spent "
                    f"(delta {delta:g}), the next round would make it {after.epsilon:.3g}; end the run here, or agree on "
                    "another budget"
                )
            os.ftruncate(handle, content.rfind(b"\n") + 1)  # what a kill tore was never begun
            _write(handle, json.dumps(asdict(entry), allow_nan=False).encode() + b"\n")
        return after

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file open for one process at a time; two jobs of a site may not both find room in the budget."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(handle: int, line: bytes) -> None:
    """Append a line and have the disk confirm it."""
    while line:
        line = line[os.write(handle, line) :]
    os.fsync(handle)


def _read(content: bytes) -> Iterator[Entry]:
    """The entries of a ledger; a last line without its end was torn by a kill before its round began."""
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            entry = Entry(**json.loads(line))
            if not (entry.noise_multiplier > 0 and 0 < entry.sample_rate <= 1 and entry.steps >= 1):
                raise ValueError(number)
            yield entry
        except (ValueError, TypeError):
            raise RunError(
                f"line {number} of this site's privacy ledger is damaged, so what was spent is not known; restore the file "
                "before anything else is trained"
            ) from None


def _steps(entry: Entry) -> Steps:
    return Steps(entry.noise_multiplier, entry.sample_rate, entry.steps)


def _together(history: Sequence[Steps]) -> list[tuple[float, float, int]]:
    """Equal steps added: an accountant composes them at once, and order does not matter."""
    counts: Counter[tuple[float, float]] = Counter()
    for one in history:
        counts[one.noise_multiplier, one.sample_rate] += one.steps
    return [(noise, rate, steps) for (noise, rate), steps in sorted(counts.items())]
