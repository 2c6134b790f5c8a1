"""A run in the terminal: a live view while it trains, one plain line a round where there is no terminal, a table at the end.

Everything that comes from data (site, stage and metric names) is put into Text, never parsed as markup, and stripped of
control characters: a site cannot colour, move or rewrite the coordinator's screen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
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

GAP = 2  # columns between one value and the next
MAX_SITE_ROWS = 16  # a taller table would push the progress bar off the screen
NARROW = 84  # columns below which the table drops what the report will tell anyway
LOSS_WIDTH = {False: 22, True: 52}  # columns for the losses of a site, narrow and wide
STREAM_COLOURS = {"image": "blue", "text": "yellow", "paired": "magenta"}
STATE_COLOURS = {"sent": "green", "missed": "red"}
READINGS: dict[str, tuple[str, Callable[[float], str]]] = {  # of an evaluation while a run trains
    "zero_shot/macro_auroc": ("zero-shot AUROC", quantities.decimal),
    "linear_probe/macro_auroc": ("linear probe AUROC", quantities.decimal),
    "retrieval/r@10": ("R@10", quantities.percent),
    "regeneration/psnr_db": ("PSNR", lambda value: f"{value:.2f} dB"),
    "language/bits_per_token": ("bits a token", lambda value: quantities.decimal(value, 2)),
    "time/evaluate_s": ("took", quantities.duration),
}


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
    return "  ".join(" ".join(reading(name, value)) for name, value in values.items())


def reading(name: str, value: float) -> tuple[str, str]:
    """A number of a metric row under the name and in the form that people know it by."""
    title, show = READINGS.get(name, (name, "{:.3g}".format))
    return title, show(value)


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


def final_table(report: Report) -> Folded:
    """The headline results for the end of a run; intervals are in the report."""
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


def value_table(found: Sequence[site_value.Line]) -> Folded:
    """What each hospital got; what it gave is in the sentences above."""
    rows = [
        (Text(printable(f"{line.texts[0]}: {line.texts[1]}")), tuple(Text(printable(text)) for text in line.texts[2:]))
        for line in found
    ]
    return Folded("hospital: measure", site_value.HEAD[2:], tuple(rows), (site_value.verdict(found),))


@dataclass(frozen=True)
class Folded:
    """Rows of numbers as one table or, where a screen is too narrow, as several under each other; no number is cut.

    ``rows``: the name of each and its values, one for each of ``titles``.
    """

    first: str
    titles: tuple[str, ...]
    rows: tuple[tuple[Text, tuple[Text, ...]], ...]
    notes: tuple[str, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """The tables for the screen's width."""
        columns = list(zip(*(values for _, values in self.rows), strict=True))
        widths = [GAP + broadest(title, *cells) for title, cells in zip(self.titles, columns, strict=False)]
        whole = GAP + broadest(self.first, *(name for name, _ in self.rows))
        least = GAP + max(longest_word(name.plain) for name in [Text(self.first), *(name for name, _ in self.rows)])
        names = whole if whole + sum(widths) <= options.max_width else min(whole, max(least, options.max_width // 3))
        for chosen in fitting(widths, options.max_width - names):
            yield self._table(chosen, names - GAP)
        yield from (Text(printable(note), style="dim") for note in self.notes)

    def _table(self, chosen: slice, width: int) -> Table:
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
        table.add_column(self.first, overflow="fold", width=width)
        for title in self.titles[chosen]:
            table.add_column(Text(title, justify="right"), justify="right", no_wrap=True)
        for name, values in self.rows:
            table.add_row(name, *values[chosen])
        return table


def broadest(*texts: str | Text) -> int:
    """How many columns the longest line of texts takes."""
    return max(cell_len(line) for text in texts for line in str(text).split("\n"))


def longest_word(text: str) -> int:
    """How many columns the longest word takes: a narrower column would break it."""
    return max(map(cell_len, text.split()), default=0)


def fitting(widths: Sequence[int], room: int) -> Iterator[slice]:
    """Columns of such widths in tables that fit into so much room, one column at the least."""
    start, used = 0, 0
    for column, width in enumerate(widths):
        if used + width > room and column > start:
            yield slice(start, column)
            start, used = column, 0
        used += width
    yield slice(start, len(widths))


def grid_table(grid: Grid, first_column: str) -> Folded:
    """A headline or comparison grid as tables of point values, the best of each column in bold."""
    styles = {"main": "bold cyan", "reference": "dim", "baseline": ""}
    rows = tuple((Text(printable(row.name), style=styles[row.kind]), tuple(map(_cell_text, row.cells))) for row in grid.rows)
    notes = tuple(f"[{number}] {note}" for number, note in enumerate(grid.notes, 1))
    return Folded(first_column, tuple(measure.short for measure in grid.measures), rows, notes)


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
    title, text = reading(name, value)
    return Text.assemble((f"{printable(title)} ", "dim"), text)


def _evaluation(progress: Progress) -> Text:
    text = Text.assemble((f"evaluated after round {progress.evaluation_round}  ", "dim"))
    return text.append_text(Text("  ").join([_named(name, value) for name, value in progress.evaluation.items()]))
