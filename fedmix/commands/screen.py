"""What shows a run at a terminal while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from fedmix.report.terminal import LiveView


class Screen:
    """A LiveView that also takes plain sentences and dropped sites."""

    def __init__(self, live: LiveView) -> None:
        self._live = live

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """Begin a run."""
        self._live.start(total_rounds, sites)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics, or say which site was dropped or which round failed, and why."""
        if row["event"] == "dropped":
            self.say(f"round {row['round']}: {row['site']} dropped, {row['why']}")
        elif row["event"] == "failed":
            self.say(f"round {row['round']} failed: {row['why']}")
        else:
            self._live.update(row)

    def say(self, sentence: str) -> None:
        """Print a sentence above the live view."""
        from fedmix.report.terminal import printable  # loaded with the LiveView; without one, --help need not wait for it

        self._live.console.print(Text(printable(sentence), style="dim"), soft_wrap=True)
