"""Seconds that count once, and clocks that are wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from server.accounts import Taken, covered, on_our_clock


@pytest.mark.parametrize(
    ("intervals", "seconds"),
    [
        ([], 0.0),
        ([(1.0, 3.0)], 2.0),
        ([(1.0, 3.0), (2.0, 5.0)], 4.0),  # they overlap by one
        ([(2.0, 5.0), (1.0, 3.0)], 4.0),  # in any order
        ([(1.0, 2.0), (4.0, 6.0)], 3.0),  # a gap does not count
        ([(1.0, 9.0), (2.0, 3.0), (4.0, 5.0)], 8.0),  # two inside one
        ([(1.0, 2.0), (2.0, 3.0)], 2.0),  # they touch
        ([(1.0, 2.0), (1.0, 2.0)], 1.0),  # the same twice
        ([(3.0, 3.0)], 0.0),
    ],
)
def test_covered_counts_seconds_in_which_somebody_trains_once(intervals: list[tuple[float, float]], seconds: float) -> None:
    assert covered(intervals) == seconds


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (11.0, 19.0, (11.0, 19.0)),  # both clocks agree
        (1011.0, 1019.0, (12.0, 20.0)),  # the site's is ahead
        (-500.0, -495.0, (15.0, 20.0)),  # or behind
        (19.0, 11.0, (20.0, 20.0)),  # or was set back meanwhile
        (0.0, 1e12, (10.0, 20.0)),  # nobody trains longer than we waited
    ],
)
def test_a_wrong_clock_at_a_site_does_not_distort_the_time_it_trained(
    start: float, end: float, expected: tuple[float, float]
) -> None:
    taken = Taken(update=None, examples={}, bytes_up=0, train_start=start, train_end=end)  # type: ignore[arg-type]
    ours = on_our_clock(taken, sent=10.0, came=20.0)
    assert (ours.train_start, ours.train_end) == expected
    assert replace(ours, train_start=start, train_end=end) == taken
