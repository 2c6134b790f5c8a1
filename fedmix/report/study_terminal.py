"""A study in the terminal: tables that fit the screen, with every interval in the line below its value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.text import Text

from fedmix.report import study_value
from fedmix.report.attacked import Marked
from fedmix.report.comparison import COSTS, Comparison, CostRow, gap_sentence
from fedmix.report.measures import Cell, Grid, Measure
from fedmix.report.terminal import Folded, printable

COST_SHORT = dict(zip(COSTS, ("steps", "images", "reports", "pairs", "core s", "sent"), strict=True))


def study_tables(one: Comparison) -> Iterator[RenderableType]:
    """A study for a terminal: per regime means, differences and costs; a value's interval is in the line below it."""
    yield Text.assemble((printable(one.name), "bold"), f"  {one.standing}")
    if one.judged_on:
        yield Text(one.judged_on, style="dim")
    yield from (Text(printable(failure), style="red") for failure in one.failures)
    if one.attacks:
        yield from (Text(printable(lie), style="dim") for lie in one.lies)
    for attack in one.attacks:
        yield Text.assemble("\n", (attack.title, "bold"), (f"  {attack.about}", "dim"))
        yield _table(attack.grid, "")
    for regime in one.regimes:
        yield Text.assemble("\n", (printable(regime.name), "bold"), (f"  {regime.num_seeds}", "dim"))
        yield Text(regime.basis, style="dim")
        if regime.winners:
            yield Text(regime.winners, style="dim")
        yield _table(regime.means, "mean")
        if regime.differences.rows:
            yield Text(f"fedmix less each. {regime.about_differences}", style="dim")
            yield _table(regime.differences, "fedmix less")
        if regime.costs:
            yield _cost_table(regime.costs)
        yield from (Text(note, style="dim") for note in regime.cost_notes)
        yield from (Text(gap_sentence(gap), style="dim") for gap in regime.gaps)
        if regime.values:
            yield _value_table(regime.values)
    yield Text("\n" + " ".join(one.notes), style="dim")


def _table(grid: Grid, first_column: str) -> Folded:
    rows = [
        (
            Text(printable(row.name), style="bold cyan" if row.kind == "main" else ""),
            tuple(map(_lines, grid.measures, row.cells)),
        )
        for row in grid.rows
    ]
    return Folded(first_column, tuple(measure.short for measure in grid.measures), tuple(rows))


def _lines(measure: Measure, cell: Cell | None) -> Text:
    """A value, below it how far its interval reaches to either side and, where that is not all of them, how many seeds."""
    if cell is None:
        return Text()
    text = Text(cell.text.removesuffix(" %"), style=_emphasis(cell))
    if cell.score.interval is not None:
        half = (cell.score.interval[1] - cell.score.interval[0]) / 2
        text.append(f"\n±{measure.show(half).removesuffix(' %')}", style="dim not bold")
    if cell.setting:
        text.append("\n" + cell.setting.replace(" seed", "\nseed"), style="dim not bold")
    return text


def _emphasis(cell: Cell) -> str:
    return "" if not cell.is_best else "bold red" if isinstance(cell, Marked) and cell.is_worse else "bold"


def _value_table(rows: Sequence[study_value.Row]) -> Folded:
    """What each hospital got; an interval is in the line below its value."""
    found = []
    for row in rows:
        site, measure, *texts, got, interval = row.texts
        cell = Text(got, style="bold" if row.got is not None and row.got.is_clear else "")
        cell.append(f"\n{interval}", style="dim not bold")
        found.append((Text(printable(f"{site}: {measure}")), (*(Text(printable(text)) for text in texts), cell)))
    return Folded("hospital: measure", study_value.HEAD[2:-1], tuple(found))


def _cost_table(rows: Sequence[CostRow]) -> Folded:
    named = [Text(printable(row.name), style="bold cyan" if row.kind == "main" else "") for row in rows]
    values = [tuple(map(Text, row.texts)) for row in rows]
    return Folded("took", tuple(COST_SHORT[title] for title in COSTS), tuple(zip(named, values, strict=True)))
