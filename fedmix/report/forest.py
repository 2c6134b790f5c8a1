"""A study's differences as one picture that stands alone (`fedmix compare RUN --out FILE.svg`): methods down, measures across.

A row shows what a method has over the main one, seed by seed, and to the right is better in every column; so a column of
"lower is better" runs backwards. Untrained models are left out: beside them all others would look alike. Unlike the pages'
charts the picture brings its own colours, for a README or a paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedmix.report import charts, quantities
from fedmix.report.comparison import UNTRAINED, signed
from fedmix.report.measures import Measure, method_name
from fedmix.report.study import MAIN, MEASURES, Estimate, Study

WIDTH = 980
NAMES = 190  # room for the methods' names
COLUMN_GAP = 14
ROW_HEIGHT, HEAD, FOOT, BLOCK_GAP = 22, 60, 34, 30


@dataclass(frozen=True)
class Mark:
    """One method on one measure; x in the picture's coordinates, ``is_cut`` where the interval leaves the column."""

    text: str
    x: float
    y: float
    interval: tuple[float, float] | None
    is_cut: tuple[bool, bool]
    verdict: str  # better, worse or open: the interval has zero inside, or there is none


@dataclass(frozen=True)
class Column:
    """One measure of a block. A mark is None for a method that has not learnt what is measured, or in no seed yet."""

    title: str
    lines: tuple[str, ...]  # the title, cut to the column's width
    start: float
    stop: float
    zero: float
    ends: tuple[str, str]
    marks: tuple[Mark | None, ...]


@dataclass(frozen=True)
class Block:
    """One regime: the names of its methods with their rows' middles, and its columns."""

    name: str
    top: float
    bottom: float
    names: tuple[tuple[str, float], ...]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Forest:
    """The whole picture."""

    title: str
    note: str
    width: float
    height: float
    blocks: tuple[Block, ...]
    description: str


def forest(study: Study) -> Forest:
    """The picture of a study; methods and measures without a difference in any seed are left out."""
    top, blocks = float(HEAD), list[Block]()
    for regime in study.regimes:
        block = _block(study, regime, top)
        if block is not None:
            blocks.append(block)
            top = block.bottom + BLOCK_GAP
    told = "; ".join(
        f"{block.name}: {name}: "
        + ", ".join(f"{column.title} {mark.text}" for column in block.columns if (mark := column.marks[row]))
        for block in blocks
        for row, (name, _) in enumerate(block.names)
    )
    return Forest(
        title=f"{study.name}: what each row has over the main method",
        note=f"Mean and 95 % interval over {quantities.plural(len(study.seeds), 'seed')}, paired by seed. To the right is "
        "better. Filled: the interval leaves zero out.",
        width=WIDTH,
        height=top - BLOCK_GAP + FOOT,
        blocks=tuple(blocks),
        description=told,
    )


def _block(study: Study, regime: str, top: float) -> Block | None:
    """One regime, its rows from ``top`` + the head of its columns on."""
    found = {
        method: {name: _over_main(study, regime, method, name) for name in MEASURES}
        for method in study.methods
        if method not in (MAIN, *UNTRAINED)
    }
    rows = {method: by_measure for method, by_measure in found.items() if any(by_measure.values())}
    names = [name for name in MEASURES if any(by_measure[name] for by_measure in rows.values())]
    if not rows:
        return None
    first = top + ROW_HEIGHT * 2.5
    middles = [first + ROW_HEIGHT * (number + 0.5) for number in range(len(rows))]
    width = (WIDTH - NAMES - COLUMN_GAP * len(names)) / len(names)
    columns = []
    for number, name in enumerate(names):
        start = NAMES + (width + COLUMN_GAP) * number
        estimates = [by_measure[name] for by_measure in rows.values()]
        columns.append(_column(MEASURES[name], estimates, middles, (start, start + width)))
    return Block(
        name=regime,
        top=top,
        bottom=first + ROW_HEIGHT * len(rows),
        names=tuple(zip(map(method_name, rows), middles, strict=True)),
        columns=tuple(columns),
    )


def _over_main(study: Study, regime: str, method: str, name: str) -> Estimate | None:
    """What a method has over the main one; studies keep it the other way round."""
    one = study.difference(regime, method, name)
    if one is None:
        return None
    interval = (-one.interval[1], -one.interval[0]) if one.interval else None
    return Estimate(-one.mean, interval, {seed: -value for seed, value in one.by_seed.items()})


def _column(
    measure: Measure, estimates: Sequence[Estimate | None], middles: Sequence[float], span: tuple[float, float]
) -> Column:
    """A measure's marks on an axis around zero that spans the means, not the intervals: one wide interval would press all."""
    reach = 1.25 * max(abs(one.mean) for one in estimates if one) or 1.0
    left, right = (-reach, reach) if measure.better == "higher" else (reach, -reach)
    across = charts.Scale(left, right, *span)
    marks = tuple(
        None if one is None else _mark(measure, one, middle, across) for one, middle in zip(estimates, middles, strict=True)
    )
    title = f"{measure.title}{f', {measure.unit}' if measure.unit else ''}"
    return Column(
        title, tuple(measure.short.split("\n")), *span, across(0.0), (signed(measure, left), signed(measure, right)), marks
    )


def _mark(measure: Measure, one: Estimate, middle: float, across: charts.Scale) -> Mark:
    sign = 1 if measure.better == "higher" else -1
    verdict = "open" if not one.is_clear else "better" if sign * one.mean > 0 else "worse"
    if one.interval is None:
        return Mark(signed(measure, one.mean), across(one.mean), middle, None, (False, False), verdict)
    low, high = sorted(map(across, one.interval))
    return Mark(
        text=signed(measure, one.mean),
        x=across(one.mean),
        y=middle,
        interval=(max(low, across.start), min(high, across.stop)),
        is_cut=(low < across.start, high > across.stop),
        verdict=verdict,
    )
