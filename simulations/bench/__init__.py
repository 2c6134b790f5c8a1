"""Speed as ratios, measured side by side in one run; `fedmix bench` prints one JSON line a case (cases.py has them all)."""

from __future__ import annotations

Line = dict[str, str | float | None]  # bench, case, value, unit, against, ratio; ratio is null where "skipped" says why
