"""Where commands print: results on one stream, progress and errors on the other."""

from __future__ import annotations

from rich.console import Console

out_console = Console()
error_console = Console(stderr=True)
