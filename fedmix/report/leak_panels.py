"""The pictures of an audit's page: what each attack reached, with a line at what guessing reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedmix.report import charts, quantities
from fedmix.report.leak_findings import CANARIES, GUESSING, TITLES, Values
from fedmix.report.measures import Measure, Score

# interval_panel asks a measure for its name and how it shows a value; an audit has no evaluation to read it from.
AUC = Measure("AUC of the attack", "AUC", "higher", lambda evaluation: Score(None), lambda value: quantities.decimal(value, 2))
RECALL = Measure("R@1", "R@1", "higher", lambda evaluation: Score(None), lambda value: quantities.percent(value, 0))
SHARE = Measure("share of words", "share", "higher", lambda evaluation: Score(None), lambda value: quantities.percent(value, 0))
BITS = Measure("exposure", "bits", "higher", lambda evaluation: Score(None), lambda value: quantities.decimal(value, 1))


def panels(found: Values) -> Iterator[charts.IntervalPanel]:
    """One for each kind of attack that had enough data."""
    yield from _membership("Telling members from others", "Control: a model that saw none of them", found["membership"])
    if found["relinkage"]["difference_r@1"] is not None:
        yield _relinkage(found["relinkage"])
    for kind, block in found.get("canaries", {}).items():
        yield _canaries(CANARIES[kind], block)
    if "update" in found:
        update = found["update"]
        yield from _membership("Telling members from one update", "Control: the model before it", update["membership"])
        if "words" in update:
            yield _words(update["words"])


def _membership(title: str, control: str, blocks: Values) -> Iterator[charts.IntervalPanel]:
    told = {TITLES[kind]: blocks[kind] for kind in TITLES if kind in blocks and blocks[kind]["auc"] is not None}
    if told:
        yield _against_guessing(title, [_interval_row(name, "main", block) for name, block in told.items()])
    controls = {name: block["control"] for name, block in told.items() if "control" in block}
    if controls:
        yield _against_guessing(control, [_interval_row(name, "baseline", block) for name, block in controls.items()])


def _interval_row(name: str, kind: str, block: Values) -> charts.IntervalRow:
    return charts.IntervalRow(name, kind, block["auc"], _pair(block["auc_ci95"]), ())


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def _against_guessing(title: str, attacks: list[charts.IntervalRow]) -> charts.IntervalPanel:
    """Attacks on one axis with a line at what guessing reaches."""
    low = min(value for row in attacks for value in (row.mean, *(row.interval or ())))
    return _beside(title, attacks, charts.ticks(min(0.4, low), 1.0), AUC, GUESSING)


def _relinkage(block: Values) -> charts.IntervalPanel:
    sides = {"training pairs": "members", "other pairs": "non_members"}
    recalls = [
        charts.IntervalRow(name, "main", block[f"{side}_r@1"], _pair(block[f"{side}_r@1_ci95"]), ())
        for name, side in sides.items()
    ]
    top = max(value for row in recalls for value in (row.mean, *(row.interval or ())))
    return _beside("Own report found first", recalls, charts.ticks(0.0, top), RECALL, block["chance"])


def _canaries(name: str, block: Values) -> charts.IntervalPanel:
    """A row for each number of holders, with a dot for each canary."""
    rows = [
        charts.IntervalRow(
            f"held by {times}", "main", found["mean_exposure_bits"], None, tuple(map(float, found["exposure_bits"]))
        )
        for times, found in block["by_times"].items()
    ]
    levels = charts.ticks(0.0, block["most_possible_bits"])
    return _beside(f"{name}: bits of exposure", rows, levels, BITS, block["chance_bits"])


def _words(block: Values) -> charts.IntervalPanel:
    named = {"used words, found": block["recall"], "found words, used": block["precision"]}
    rows = [charts.IntervalRow(name, "main", value, None, ()) for name, value in named.items() if value is not None]
    return _beside("Words read from one update", rows, charts.ticks(0.0, 1.0), SHARE, block["chance"])


def _beside(
    title: str, rows: list[charts.IntervalRow], levels: list[float], measure: Measure, guessing: float
) -> charts.IntervalPanel:
    """Rows on one axis with a line at what guessing reaches."""
    panel = charts.interval_panel(title, rows, levels, measure)
    across = charts.Scale(levels[0], levels[-1], charts.BAR_LEFT, charts.WIDTH - charts.INTERVAL_RIGHT)
    line = f"the line at {guessing:.2g} is guessing"
    return replace(panel, line=across(guessing), description=f"{title}, {measure.short}; {line}: {_told(rows, measure)}")


def _told(rows: list[charts.IntervalRow], measure: Measure) -> str:
    return "; ".join(f"{row.name} {measure.show(row.mean)}" for row in rows)
