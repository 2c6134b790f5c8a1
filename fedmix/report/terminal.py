"""A run in the terminal: a live view while it trains, one plain line a round where there is no terminal, a table at the end.

Everything that comes from data (site, stage and metric names) is put into Text, never parsed as markup, and stripped of
control characters: a site cannot colour, move or rewrite the coordinator's screen.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmix.report import measures, narrative, quantities, site_value
from fedmix.report.further import by_finding, further_sets
from fedmix.report.history import parse_entry
from fedmix.report.measures import Cell, Grid
from fedmix.report.progress import Progress, SiteState
from fedmix.report.readings import other_ways
from fedmix.report.summary import Report

MAX_SITE_ROWS = 16  # a taller table would push the progress bar off the screen
NARROW = 84  # columns below which the table drops what the report will tell anyway
LOSS_WIDTH = {False: 22, True: 52}  # columns for the losses of a site, narrow and wide
STREAM_COLOURS = {"image": "blue", "text": "yellow", "paired": "magenta"}
STATE_COLOURS = {"sent": "green", "missed": "red"}


class LiveView:
    """Shows a run while it trains: ``start`` it with the plan, ``update`` it with every row of metrics.jsonl.

    Draws over itself in a terminal; elsewhere, and under CI, NO_COLOR or a dumb TERM, prints one plain line a round.
    """

    def __init__(self, console: Console | None = None, *, is_plain: bool | None = None) -> None:
        self.console = console or Console()
        self.is_plain = wants_plain(self.console) if is_plain is None else is_plain
        self.progress = Progress()
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        if not self.is_plain:
            self._live = Live(console=self.console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def start(self, total_rounds: int, sites: Mapping[str, str]) -> None:
        """Begin a run of so many rounds over sites, given as name and stream."""
        self.progress = Progress(total_rounds, {name: SiteState(stream) for name, stream in sites.items()})
        if self.is_plain:
            self._print(f"{quantities.plural(total_rounds, 'round')}, {quantities.plural(len(sites), 'site')}")
        self._draw()

    def update(self, row: Mapping[str, Any]) -> None:
        """Take in one row of metrics.jsonl and show what it changed."""
        entry = parse_entry(row)
        self.progress.add(entry)
        if self.is_plain and entry.event == "round":
            self._print(round_line(self.progress))
        elif self.is_plain and entry.event == "evaluation":
            self._print(f"round {entry.round} evaluation  {values_text(entry.values)}")
        self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(view(self.progress, self.console.width), refresh=True)

    def _print(self, line: str) -> None:
        # soft_wrap: a line of a log is one line, however narrow the terminal that reads it.
        self.console.print(Text(printable(line)), soft_wrap=True, highlight=False)


def wants_plain(console: Console) -> bool:
    """Whether drawing over the screen would leave rubbish: no terminal, a dumb one, a CI log, or NO_COLOR."""
    asked = bool(os.environ.get("NO_COLOR")) or os.environ.get("CI", "").lower() not in ("", "0", "false")
    return asked or not console.is_terminal or console.is_dumb_terminal


def printable(text: str) -> str:
    """Text with every control character, line break and unprintable sign replaced."""
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in text)


def round_line(progress: Progress) -> str:
    """A finished round in one line."""
    parts = [
        f"round {progress.round}/{progress.total_rounds}",
        progress.stage,
        quantities.plural(len(progress.reported), "site"),
        values_text(progress.mean_losses()),
        quantities.duration(progress.round_seconds),
        f"up {quantities.size(progress.bytes_up())}",
    ]
    if progress.num_failed:
        parts.append(f"failed {progress.num_failed}")
    if (left := progress.seconds_left()) is not None and progress.round < progress.total_rounds:
        parts.append(f"left {quantities.duration(left)}")
    return "  ".join(part for part in parts if part)


def values_text(values: Mapping[str, float]) -> str:
    """Names and values in a row."""
    return "  ".join(f"{name} {value:.3g}" for name, value in values.items())


def view(progress: Progress, width: int) -> RenderableType:
    """The whole live view at a width in columns."""
    parts: list[RenderableType] = [_heading(progress), _bar(progress, width)]
    if progress.sites:
        parts += [Text(), _site_table(progress, width)]
    if hidden := len(progress.sites) - MAX_SITE_ROWS:
        parts += [Text(f"and {quantities.plural(hidden, 'more site')}", style="dim")] if hidden > 0 else []
    if progress.evaluation:
        parts += [Text(), _evaluation(progress)]
    return Group(*parts)


def final_table(report: Report) -> Table:
    """The headline results for the end of a run; its values fit in 60 columns, intervals are in the report."""
    return grid_table(measures.headline(report), "method")


def remarks(report: Report) -> list[RenderableType]:
    """What the table has no column for: a sentence each, a table of each further held-out set, what each hospital got."""
    evaluation = report.evaluation
    sentences = [
        *other_ways(evaluation),
        *narrative.reranking(evaluation),
        *by_finding(evaluation),
        *site_value.contributions(report),
    ]
    parts: list[RenderableType] = [_remark(sentence) for sentence in sentences]
    for one in further_sets(report):
        title = Text(f"\non {printable(one.name)}", style="bold")
        parts += [title, grid_table(one.grid, "method"), *map(_remark, one.sentences)]
    found = site_value.lines(report)
    return [*parts, Text(), value_table(found)] if found else parts


def _remark(sentence: str) -> Text:
    return Text(printable(sentence), style="dim")


def value_table(found: Sequence[site_value.Line]) -> Table:
    """What each hospital got; what it gave is in the sentences above."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column, title in enumerate(site_value.HEAD):
        table.add_column(title, justify="right" if column > 1 else "left", overflow="fold")
    for line in found:
        table.add_row(*(Text(printable(text)) for text in line.texts))
    table.caption, table.caption_justify = Text(printable(site_value.verdict(found)), style="dim"), "left"
    return table


def grid_table(grid: Grid, first_column: str) -> Table:
    """A headline or comparison grid as a table of point values, the best of each column in bold."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first_column, vertical="bottom", overflow="fold", min_width=8, ratio=None)
    for measure in grid.measures:
        table.add_column(Text(measure.short, justify="right"), justify="right", no_wrap=True)
    for row in grid.rows:
        style = "bold cyan" if row.kind == "main" else "dim" if row.kind == "reference" else ""
        table.add_row(Text(printable(row.name), style=style), *map(_cell_text, row.cells))
    if grid.notes:
        table.caption = Text(
            "\n".join(printable(f"[{number}] {note}") for number, note in enumerate(grid.notes, 1)), style="dim"
        )
        table.caption_justify = "left"
    return table


def _cell_text(cell: Cell | None) -> Text:
    if cell is None:
        return Text()
    note = f" [{cell.note}]" if cell.note else ""
    return Text(cell.text.removesuffix(" %") + note, style="bold" if cell.is_best else "")


def _heading(progress: Progress) -> Text:
    text = Text(printable(progress.stage) or "starting", style="bold")
    text.append(f"  round {progress.round} of {progress.total_rounds}", style="dim")
    if (left := progress.seconds_left()) is not None and progress.round < progress.total_rounds:
        text.append(f"  about {quantities.duration(left)} left", style="dim")
    if progress.num_failed:
        text.append(f"  {quantities.plural(progress.num_failed, 'reply', 'replies')} failed", style="red")
    return text


def _bar(progress: Progress, width: int) -> ProgressBar:
    return ProgressBar(
        total=max(progress.total_rounds, 1), completed=progress.round, width=min(width, 100), complete_style="cyan"
    )


def _site_table(progress: Progress, width: int) -> Table:
    is_wide = width >= NARROW
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("site", no_wrap=True, overflow="ellipsis", max_width=24 if is_wide else 14)
    table.add_column("stream", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    if is_wide:
        table.add_column("examples/s", justify="right", no_wrap=True)
    table.add_column("sent", justify="right", no_wrap=True)
    for name, site in list(progress.sites.items())[:MAX_SITE_ROWS]:
        speed = [Text(quantities.count(site.examples_per_s))] if is_wide else []
        table.add_row(
            Text(printable(name)),
            Text(printable(site.stream), style=STREAM_COLOURS.get(site.stream, "")),
            Text(site.state, style=STATE_COLOURS.get(site.state, "dim")),
            _loss_text(site.losses, LOSS_WIDTH[is_wide]),
            *speed,
            Text(quantities.size(site.bytes_up)),
        )
    return table


def _loss_text(losses: Mapping[str, float], width: int) -> Text:
    """Losses in lines of ``width``, broken between losses only: rich would also break between a name and its value."""
    lines: list[Text] = []
    for item in (_named(name, value) for name, value in losses.items()):
        if lines and len(lines[-1]) + 2 + len(item) <= width:
            lines[-1].append("  ").append_text(item)
        else:
            lines.append(item)
    return Text("\n").join(lines)


def _named(name: str, value: float) -> Text:
    return Text.assemble((f"{printable(name)} ", "dim"), f"{value:.3g}")


def _evaluation(progress: Progress) -> Text:
    text = Text.assemble((f"evaluated after round {progress.evaluation_round}  ", "dim"))
    return text.append_text(Text("  ").join([_named(name, value) for name, value in progress.evaluation.items()]))
