"""How far a large message has come over a line that may be slow, in words for whoever waits at one of its ends.

Sizes and times only: neither end is told more about a message than it knows already.
"""

from __future__ import annotations

import time
from collections.abc import Callable

SAY_S = 30.0  # from one word about a message to the next at most, as long as any of it passes
STEPS = 10  # of a message, each of which is worth a word
PAUSE_S = 3.0  # between two words at least, and before the first, so that a fast line needs none


class Passage:
    """A message on its way; says how much of it has passed at every tenth of it, and twice a minute.

    ``what`` begins the sentence; ``clock`` gives seconds.
    """

    def __init__(self, what: str, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._say, self._clock = what, say, clock
        self._began = self._said_at = clock()
        self._said_share = 0.0

    def at(self, num_bytes: int, share: float, total_bytes: int | None = None) -> None:
        """So many bytes have passed, and this share of the message, from 0 to 1."""
        now = self._clock()
        waited, is_next = now - self._said_at, int(share * STEPS) != int(self._said_share * STEPS)
        if waited >= SAY_S or (waited >= PAUSE_S and is_next):
            self._say(f"{self._what} {amount(num_bytes, share, total_bytes)}{self._pace(num_bytes, share, now - self._began)}")
            self._said_at, self._said_share = now, share

    @staticmethod
    def _pace(num_bytes: int, share: float, took_s: float) -> str:
        if not 0.0 < share < 1.0:
            return f" after {_span(took_s)}"
        return f" at {num_bytes / took_s / 1e6:.2f} MB/s, about {_span(took_s * (1.0 - share) / share)} to go"


def amount(num_bytes: int, share: float, total_bytes: int | None = None) -> str:
    """How much has passed: ``312.0 of 750.3 MB, 42 %``."""
    of = f" of {total_bytes / 1e6:.1f}" if total_bytes is not None else ""
    return f"{num_bytes / 1e6:.1f}{of} MB, {share:.0%}".replace("%", " %")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"
