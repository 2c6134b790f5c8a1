"""How numbers read: bytes, durations, counts, fractions, moments; one way everywhere, on paper and in the terminal.

Units are decimal (1 MB is 1,000,000 bytes), as network links are sold; what is absent reads as a dash.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

DASH = "\N{EN DASH}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A plain number with a fixed number of digits."""
    return DASH if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """A difference with its sign; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction from 0 to 1 as a percentage."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def span(low: str, high: str) -> str:
    """From one value to another; a percent sign that both have is written once, a dash never stands beside a minus sign."""
    between = " to " if low.startswith("-") or high.startswith("-") else DASH
    return f"{low.removesuffix(' %')}{between}{high}".replace("-", "\N{MINUS SIGN}")


def count(value: float | None) -> str:
    """A whole number with thousands set apart."""
    return DASH if value is None else f"{value:,.0f}"


def size(num_bytes: float | None) -> str:
    """A number of bytes at three significant figures: 950 B, 41.2 MB."""
    if num_bytes is None:
        return DASH
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def duration(seconds: float | None) -> str:
    """A time span in its two largest units: 0.8 s, 42 s, 12 min 3 s, 5 h 20 min."""
    if seconds is None:
        return DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def moment(value: float | str | None) -> str:
    """A moment, given as unix seconds or ISO 8601, in UTC to the minute; text that is neither is shown as it is."""
    if value is None:
        return DASH
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value).astimezone(UTC)
        except ValueError:
            return value
    else:
        when = datetime.fromtimestamp(value, tz=UTC)
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def iso(unix_seconds: float) -> str:
    """A moment in ISO 8601, UTC, to the second."""
    return datetime.fromtimestamp(unix_seconds, tz=UTC).isoformat(timespec="seconds")


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """A count with its noun in the right number."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def listing(parts: Sequence[str]) -> str:
    """Words joined as a sentence joins them: a, b and c."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"
