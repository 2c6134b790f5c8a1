"""How far a message has come, in words."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmix.deployment.passage import PAUSE_S, SAY_S, Passage, amount


def told(steps: list[float], *, size: int = 1000) -> tuple[list[float], list[str]]:
    """When something was said, and what, of a message whose parts take these seconds each."""
    now, said, times = [0.0], list[str](), list[float]()

    def say(words: str) -> None:
        said.append(words)
        times.append(now[0])

    passage = Passage("sent", say, clock=lambda: now[0])
    for number, seconds in enumerate(steps, start=1):
        now[0] += seconds
        passage.at(number * size, number / len(steps), len(steps) * size)
    return times, said


def test_a_slow_message_is_told_of_with_its_pace_and_what_is_left() -> None:
    _, said = told([10.0] * 10, size=75_000_000)
    assert said[2] == "sent 225.0 of 750.0 MB, 30 % at 7.50 MB/s, about 70 s to go"
    assert said[-1] == "sent 750.0 of 750.0 MB, 100 % after 2 min"
    assert amount(1_500_000, 0.25) == "1.5 MB, 25 %"


def test_a_fast_message_is_not_worth_a_word() -> None:
    assert told([0.1] * 20) == ([], [])


@given(st.lists(st.floats(0.0, 20.0), min_size=1, max_size=200))
def test_words_come_at_least_as_often_as_promised_and_no_closer_than_a_pause(steps: list[float]) -> None:
    times, _ = told(steps)
    assert all(later - earlier >= PAUSE_S - 1e-9 for earlier, later in zip([0.0, *times], times, strict=False))
    gaps = zip([0.0, *times], [*times, sum(steps)], strict=True)
    assert all(later - earlier < SAY_S + 20.0 for earlier, later in gaps)
