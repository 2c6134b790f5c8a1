"""What retrieval reports, by plain loops in exact fractions: slow, and nothing in it is shared with the package."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


def hit(scores: Sequence[float], right: set[int], depth: int) -> Fraction:
    """Chance that one of the ``right`` candidates is among the first ``depth``, equal scores being in random order."""
    best = max(scores[j] for j in right)
    places = depth - sum(score > best for score in scores)
    tied = [j for j, score in enumerate(scores) if score == best]
    num_right = sum(j in right for j in tied)
    missed = Fraction(1)
    for drawn in range(max(0, min(places, len(tied)))):  # no right one is drawn for any of the places left
        missed *= Fraction(max(0, len(tied) - num_right - drawn), len(tied) - drawn)
    return 1 - missed


def share(scores: Sequence[float], right: set[int], depth: int) -> Fraction:
    """Expected share of the first ``depth`` that are ``right``, equal scores being in random order."""
    depth = min(depth, len(scores))
    total, places = Fraction(0), depth
    for level in sorted(set(scores), reverse=True):
        tied = [j for j, score in enumerate(scores) if score == level]
        taken = min(places, len(tied))
        total += Fraction(taken, len(tied)) * sum(j in right for j in tied)
        places -= taken
    return total / depth


def alike(sets: NDArray[np.int64], query: int) -> set[int]:
    return {j for j, number in enumerate(sets) if number == sets[query]}
