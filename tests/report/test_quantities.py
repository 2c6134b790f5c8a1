from __future__ import annotations

import pytest

from fedmix.report import quantities


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_999, "1 MB"), (109_800_000, "110 MB"), (None, "–")],  # noqa: RUF001
)
def test_size_has_three_figures_and_never_reads_1000_of_a_unit(num_bytes: float | None, text: str) -> None:
    assert quantities.size(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (19_230, "5 h 20 min")],
)
def test_duration_carries_over_into_the_next_unit(seconds: float, text: str) -> None:
    assert quantities.duration(seconds) == text


def test_moment_reads_unix_seconds_and_iso_text_alike() -> None:
    assert quantities.moment(0.0) == quantities.moment("1970-01-01T00:00:00+00:00") == "1 Jan 1970, 00:00 UTC"
    assert quantities.moment("yesterday") == "yesterday"


def test_span_writes_a_shared_percent_sign_once() -> None:
    assert quantities.span("42.2 %", "46.2 %") == f"42.2{quantities.DASH}46.2 %"
    assert quantities.span("0.7", "0.8") == f"0.7{quantities.DASH}0.8"


def test_span_keeps_a_dash_away_from_a_minus_sign() -> None:
    assert quantities.span("-0.5 %", "12.3 %") == "\N{MINUS SIGN}0.5 to 12.3 %"
    assert quantities.span("-3", "-1") == "\N{MINUS SIGN}3 to \N{MINUS SIGN}1"


def test_listing_reads_as_a_sentence_does() -> None:
    assert [quantities.listing(parts) for parts in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]


def test_a_difference_that_rounds_to_nothing_has_no_sign() -> None:
    assert [quantities.signed(value, 2) for value in (-0.004, 0.004, -0.006, 1.2)] == [
        "0.00",
        "0.00",
        "\N{MINUS SIGN}0.01",
        "+1.20",
    ]
