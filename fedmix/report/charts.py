"""Charts as geometry: what goes where in a small panel; templates/chart.svg.j2 turns it into inline SVG.

Drawn by template and not by a plotting library, so that one picture serves light and dark (colours are CSS classes),
text is text, ids cannot collide on a page with many charts, and a panel of thirty curves weighs a few kilobytes. Panels
are small and of one width: three stand side by side on a desk, one below the other on a phone.
Coordinates are SVG's: x to the right, y down, in units that are CSS pixels when a panel is drawn at its own width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fedmix.report import quantities
from fedmix.report.history import Point, StageSpan, thin
from fedmix.report.measures import Cell, Grid, Measure, Row

WIDTH = 360
LINE_HEIGHT = 216
LEFT, RIGHT, TOP, BOTTOM = 40, 46, 20, 26  # room for y labels, end values, stage names, x labels
MAX_POINTS = 160  # finer than the pixels of a panel
MAX_SITE_CURVES = 60  # beyond it thin lines are a blot and the file grows
MIN_LABEL_GAP = 12.0
CHARACTER = 6.0  # width of a small letter; stage names are cut to their band
NARROW, WIDE = frozenset("fijlrtI.,;:'|()[] -"), frozenset("mwMW%@…")  # letters far from that width

ROW_HEIGHT = 22
UNDER_HEIGHT = 14  # more for a row with small print
BAR_LEFT, BAR_RIGHT = 142, 44
INTERVAL_RIGHT = 56  # room for a mean with its unit
STRIP_HEIGHT, STRIP_MARGIN = 22, 3.0  # a strip is as wide as its tile: x in percent of that
END_GAP = 6.0  # from a curve's end to the value beside it
MIN_SPAN = 0.05  # of the largest value: what changes less is drawn as flat as it is
CHANCE = 0.5  # AUROC of guessing: bars start there


@dataclass(frozen=True)
class Curve:
    """One line of a chart: what it is called, its CSS class, its points, and whether it is the thick kind."""

    name: str
    style: str
    points: Sequence[Point]
    is_thick: bool = True


@dataclass(frozen=True)
class Stroke:
    """A curve in SVG: path data, and its last point where a single dot stands for a curve of one round."""

    name: str
    style: str
    is_thick: bool
    path: str
    end: tuple[float, float]
    is_dot: bool


@dataclass(frozen=True)
class Mark:
    """A text at a place: ``at`` runs along a tick's axis, or down the panel for the value at a curve's end."""

    at: float
    text: str
    style: str = ""
    x: float = 0.0
    anchor: str = "start"


@dataclass(frozen=True)
class Band:
    """A stage's rounds as a strip; ``has_edge`` asks for the line that parts it from the stage before."""

    x: float
    width: float
    text: str
    is_shaded: bool
    has_edge: bool


@dataclass(frozen=True)
class LinePanel:
    """One metric over the rounds."""

    title: str
    description: str
    strokes: tuple[Stroke, ...]
    x_ticks: tuple[Mark, ...]
    y_ticks: tuple[Mark, ...]
    ends: tuple[Mark, ...]
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Bar:
    """One row of a bar panel; x and width are those of the bar, ``y`` is the middle of the row."""

    name: str
    size: str
    text: str
    x: float
    width: float
    y: float
    is_below: bool


@dataclass(frozen=True)
class BarPanel:
    """AUROC of each finding as bars that start at chance, with the macro average across."""

    title: str
    description: str
    height: float
    bars: tuple[Bar, ...]
    ticks: tuple[Mark, ...]
    chance: float
    macro: Mark | None


@dataclass(frozen=True)
class IntervalRow:
    """One method of an interval panel: its mean, the interval around it, and the values that they come from.

    ``under``: small print below its name.
    """

    name: str
    kind: str
    mean: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]
    under: str = ""


@dataclass(frozen=True)
class Whisker:
    """One row as drawn; ``is_cut`` says at which ends the interval goes on beyond the axis."""

    name: str
    kind: str
    text: str
    y: float
    x: float
    interval: tuple[float, float] | None
    is_cut: tuple[bool, bool]
    dots: tuple[float, ...]
    under: str = ""


@dataclass(frozen=True)
class IntervalPanel:
    """Means with intervals, methods down, one measure across; a line marks the first row's mean."""

    title: str
    description: str
    height: float
    whiskers: tuple[Whisker, ...]
    ticks: tuple[Mark, ...]
    line: float


@dataclass(frozen=True)
class Dot:
    """One method on a strip; x is in percent of the strip's width."""

    name: str
    text: str
    kind: str
    x: float


@dataclass(frozen=True)
class Strip:
    """One measure of every method on one line, the better end to the right; ``interval`` is this run's, as start and end."""

    title: str
    unit: str
    text: str
    interval_text: str
    setting: str
    description: str
    dots: tuple[Dot, ...]
    interval: tuple[float, float] | None
    ends: tuple[str, str]


@dataclass(frozen=True)
class Scale:
    """A linear map from values to coordinates."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The coordinate of a value; the middle where the range is empty."""
        if self.high == self.low:
            return (self.start + self.stop) / 2
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round values that enclose ``low``..``high`` in at most ``most`` steps of 1, 2, 2.5 or 5 times a power of ten."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def line_panel(title: str, curves: Sequence[Curve], stages: Sequence[StageSpan], rounds: tuple[int, int]) -> LinePanel:
    """A chart of curves that each have at least one point; ``rounds`` are the first and last of the whole run."""
    thinned = [(curve, thin(curve.points, MAX_POINTS)) for curve in curves]
    values = [point.value for _, points in thinned for point in points]
    levels = ticks(*_wide_enough(min(values), max(values)))
    across = Scale(rounds[0], rounds[1], LEFT, WIDTH - RIGHT)
    up = Scale(levels[0], levels[-1], LINE_HEIGHT - BOTTOM, TOP)
    strokes = tuple(_stroke(curve, points, across, up) for curve, points in thinned)
    finals = [(points[-1], curve) for curve, points in thinned if curve.is_thick]
    return LinePanel(
        title=title,
        description=f"{title} by round. " + "; ".join(_told(curve) for curve in curves if curve.is_thick),
        strokes=strokes,
        x_ticks=tuple(Mark(across(number), f"{number:g}") for number in _round_ticks(*rounds)),
        y_ticks=tuple(Mark(up(level), _level_text(level, levels)) for level in levels),
        ends=_ends([(last, curve.style) for last, curve in finals], strokes, across, up),
        bands=_bands(stages, across),
    )


def strips(grid: Grid) -> tuple[Strip, ...]:
    """A strip for each measure that the grid's first row has."""
    columns = zip(grid.measures, grid.settings, zip(*(row.cells for row in grid.rows), strict=True), strict=True)
    found = (
        _strip(measure, setting, [(row, cell) for row, cell in zip(grid.rows, cells, strict=True) if cell and not cell.note])
        for measure, setting, cells in columns
        if cells[0] and not cells[0].note
    )
    return tuple(found)


def bar_panel(
    title: str, values: Mapping[str, float], macro: float | None, positives: Mapping[str, int] | None = None
) -> BarPanel:
    """Bars in the order given, with the number of ``positives`` beside a name; names are cut to their room."""
    sizes = {name: f" ({number:,})" for name, number in (positives or {}).items()}
    low = min([CHANCE, *values.values()])
    levels = ticks(math.floor(low * 10) / 10, 1.0, 5)
    across = Scale(levels[0], 1.0, BAR_LEFT, WIDTH - BAR_RIGHT)
    bars = tuple(
        _bar((name, sizes.get(name, "")), value, TOP + ROW_HEIGHT * (row + 0.5), across)
        for row, (name, value) in enumerate(values.items())
    )
    told = "; ".join(f"{bar.name}{bar.size} {bar.text}" for bar in bars)
    return BarPanel(
        title=title,
        description=f"{title} of each finding: {told}. Chance is {CHANCE}.",
        height=TOP + ROW_HEIGHT * len(bars) + BOTTOM,
        bars=bars,
        ticks=tuple(Mark(across(level), f"{level:.1f}") for level in levels if level <= 1),
        chance=across(CHANCE),
        macro=None if macro is None else Mark(across(macro), quantities.decimal(macro)),
    )


def interval_panel(title: str, rows: Sequence[IntervalRow], levels: Sequence[float], measure: Measure) -> IntervalPanel:
    """A row for each method on the axis of ``levels``, which all panels of a measure share.

    The axis spans the values and not the intervals: with three seeds one wide interval would press all means together.
    """
    across = Scale(levels[0], levels[-1], BAR_LEFT, WIDTH - INTERVAL_RIGHT)
    each = ROW_HEIGHT + (UNDER_HEIGHT if any(row.under for row in rows) else 0)
    whiskers = tuple(_whisker(row, TOP + each * number + ROW_HEIGHT / 2, across, measure) for number, row in enumerate(rows))
    told = "; ".join(f"{one.name} {one.text}" for one in whiskers)
    return IntervalPanel(
        title=title,
        description=f"{measure.title}, {title}, mean over seeds, {measure.better} is better: {told}",
        height=TOP + each * len(rows) + BOTTOM,
        whiskers=whiskers,
        ticks=tuple(Mark(across(level), measure.show(level).removesuffix(" %")) for level in levels),
        line=across(rows[0].mean),
    )


def fitted(name: str, room: float, size: str = "") -> str:
    """A name cut to so many pixels, with ``size`` behind it, which is never cut."""
    room -= _width(size)
    if _width(name) > room:
        while name and _width(name + "…") > room:
            name = name[:-1]
        name = name.rstrip() + "…"
    return name + size


def _width(text: str) -> float:
    """About as many pixels as a text takes in the panels' letters; fonts differ, so it is a little too wide."""
    factors = (0.65 if letter in NARROW else 1.65 if letter in WIDE else 1.25 if letter.isupper() else 1.1 for letter in text)
    return CHARACTER * sum(factors)


def readable(label: str) -> str:
    """A finding's name with spaces."""
    return label.replace("_", " ")


def _strip(measure: Measure, setting: str, cells: Sequence[tuple[Row, Cell]]) -> Strip:
    ours = cells[0][1]
    values = [cell.score.value or 0.0 for _, cell in cells]
    low, high = min([*values, *(ours.score.interval or ())]), max([*values, *(ours.score.interval or ())])
    worst, best = (low, high) if measure.better == "higher" else (high, low)
    across = Scale(worst, best, STRIP_MARGIN, 100 - STRIP_MARGIN)
    dots = [Dot(row.name, cell.text, row.kind, across(value)) for (row, cell), value in zip(cells, values, strict=True)]
    told = "; ".join(f"{row.name} {cell.text}" for row, cell in cells)
    return Strip(
        title=measure.title,
        unit=measure.unit,
        text=ours.text,
        interval_text=ours.interval,
        setting=setting,
        description=f"{measure.title}, {measure.better} is better: {told}",
        dots=tuple(reversed(dots)),  # this run is drawn last, on top
        interval=(across(ours.score.interval[0]), across(ours.score.interval[1])) if ours.score.interval else None,
        ends=(measure.show(worst), measure.show(best)),
    )


def _whisker(row: IntervalRow, middle: float, across: Scale, measure: Measure) -> Whisker:
    low, high = row.interval or (row.mean, row.mean)
    ends = (max(across(low), across.start), min(across(high), across.stop))
    return Whisker(
        name=row.name,
        kind=row.kind,
        text=measure.show(row.mean),
        y=middle,
        x=across(row.mean),
        interval=ends if row.interval else None,
        is_cut=(low < across.low, high > across.high),
        dots=tuple(across(value) for value in row.values) if len(row.values) > 1 else (),
        under=row.under,
    )


def _stroke(curve: Curve, points: Sequence[Point], across: Scale, up: Scale) -> Stroke:
    places = [(across(point.round), up(point.value)) for point in points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return Stroke(curve.name, curve.style, curve.is_thick, path, places[-1], is_dot=len(places) == 1)


def _told(curve: Curve) -> str:
    first, last = curve.points[0], curve.points[-1]
    values = f"from {_value_text(first.value)} to {_value_text(last.value)}"
    return f"{curve.name}, rounds {first.round} to {last.round}, {values}"


def _round_ticks(first: int, last: int) -> list[int]:
    return [int(level) for level in ticks(first, last, 5) if level == int(level) and first <= level <= last]


def _level_text(level: float, levels: Sequence[float]) -> str:
    """A tick with as many digits as its neighbours' distance needs."""
    step = levels[1] - levels[0]
    digits = max(0, math.ceil(-math.log10(step) - 1e-9))
    return f"{level:.{digits + (round(step * 10**digits, 6) % 1 != 0)}f}"


def _value_text(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _wide_enough(low: float, high: float) -> tuple[float, float]:
    """A range around the values that does not make a flat curve look steep."""
    lacking = MIN_SPAN * max(abs(low), abs(high)) - (high - low)
    return (low - lacking / 2, high + lacking / 2) if lacking > 0 else (low, high)


def _ends(finals: Sequence[tuple[Point, str]], strokes: Sequence[Stroke], across: Scale, up: Scale) -> tuple[Mark, ...]:
    """The value at each curve's end: beside the panel, or for one that ends before the run, where no curve passes."""
    last = [_end(point, style, across, up) for point, style in finals if point.round >= across.high]
    early = [_end(point, style, across, up) for point, style in finals if point.round < across.high]
    lines = [_places(stroke) for stroke in strokes]
    return (*_spread(last), *(_aside(mark, lines) for mark in early))


def _end(last: Point, style: str, across: Scale, up: Scale) -> Mark:
    return Mark(up(last.value), _value_text(last.value), style, across(last.round) + END_GAP)


def _aside(mark: Mark, lines: Sequence[Sequence[tuple[float, float]]]) -> Mark:
    """The mark at the place around its curve's end where the fewest curves pass, near ones first."""
    lifts = (-10.0, 12.0, -22.0, 24.0, -34.0, 36.0)
    right = [replace(mark, at=mark.at + lift) for lift in lifts]
    left = [replace(one, x=mark.x - 2 * END_GAP, anchor="end") for one in right]
    inside = [one for one in (*right, *left) if TOP <= one.at <= LINE_HEIGHT - BOTTOM - 4]
    return min(inside, key=lambda one: (_crossings(one, lines), abs(one.at - mark.at)))


def _crossings(mark: Mark, lines: Sequence[Sequence[tuple[float, float]]]) -> int:
    """How many pixels of curves lie under a text."""
    width = CHARACTER * len(mark.text) + 2
    left = mark.x - (width if mark.anchor == "end" else 0)
    return sum(left <= x <= left + width and abs(y - mark.at) <= MIN_LABEL_GAP / 2 for line in lines for x, y in line)


def _places(stroke: Stroke) -> list[tuple[float, float]]:
    """A curve pixel by pixel."""
    points = [tuple(map(float, place.split())) for place in stroke.path[1:].split("L")]
    found = []
    for (x, y), (to_x, to_y) in pairwise(points):
        steps = max(1, round(max(abs(to_x - x), abs(to_y - y))))
        found += [(x + (to_x - x) * step / steps, y + (to_y - y) * step / steps) for step in range(steps)]
    return [*found, stroke.end]


def _spread(marks: Sequence[Mark]) -> tuple[Mark, ...]:
    """Labels moved down just enough not to lie on each other, then up together if the last one left the panel."""
    placed: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: mark.at):
        at = max(mark.at, placed[-1].at + MIN_LABEL_GAP) if placed else mark.at
        placed.append(replace(mark, at=at))
    excess = max(0.0, placed[-1].at - (LINE_HEIGHT - BOTTOM)) if placed else 0.0
    return tuple(replace(mark, at=mark.at - excess) for mark in placed)


def _bands(stages: Sequence[StageSpan], across: Scale) -> tuple[Band, ...]:
    """Strips that meet halfway between the last round of a stage and the first of the next."""
    bands = []
    for number, stage in enumerate(stages):
        start = across(stage.first - 0.5) if number else across.start
        stop = across(stage.last + 0.5) if number + 1 < len(stages) else across.stop
        room = int((stop - start) / CHARACTER)
        text = stage.name if len(stage.name) <= room else stage.name[: max(room - 1, 0)] + "…" if room > 2 else ""
        bands.append(Band(start, stop - start, text, is_shaded=number % 2 == 1, has_edge=number > 0))
    return tuple(bands)


def _bar(named: tuple[str, str], value: float, middle: float, across: Scale) -> Bar:
    start, stop = sorted((across(CHANCE), across(value)))
    return Bar(readable(named[0]), named[1], quantities.decimal(value), start, stop - start, middle, is_below=value < CHANCE)
