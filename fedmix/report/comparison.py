"""Studies as tables and panels: what `fedmix compare` prints, draws and writes of them.

For every regime a table of means, a table of paired differences, a table of costs; for every measure a panel a regime on
one common axis. A difference is main method less the other one, so where higher is better a positive one is in its favour.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedmix import config
from fedmix.errors import ConfigError
from fedmix.report import charts, markdown, measures, quantities, study_value
from fedmix.report.attacked import AttackTable, Marked, attack_tables, failures, lies
from fedmix.report.measures import Cell, Grid, Measure, Row, Score, method_name
from fedmix.report.study import ATTACKS, BEST_SITE, MAIN, MEASURES, POOLED, Cost, Estimate, Study, about_method, judged_on
from fedmix.report.summary import Report, read_report

NOT_LEARNT = "this method has not learnt it"
NOT_TRIED = "nobody attacked this method"
NO_PAIR = "no seed has both yet"
SAME = "same"  # of a run that came out as the main method's in every seed
AGAINST = "to the disadvantage of fedmix: interval leaves zero out"
IN_FAVOUR = "in favour of fedmix: interval leaves zero out"
UNTRAINED = ("random_init", "public_init")
UNRANKED = ("membership_auc",)  # .482 is as much a guess as .5, so the lowest is no best
RAISED = "\N{SUPERSCRIPT ONE}\N{SUPERSCRIPT TWO}"  # numbers of the reasons why core seconds are missing
NAMED = 3  # methods that a sentence names before it counts the rest
COSTS = ("Steps of all sites", "Images", "Reports", "Pairs", "Core seconds", "Sent by sites")
ELSEWHERE = (
    "These runs were judged on different held-out studies or galleries: their numbers cannot be set against each other, and "
    "none is called best."
)
ABOUT_INTERVALS = (
    "Intervals are 95 %, Student's t over seeds. A seed moves initial weights, batches and, of phantom sites, the draw of "
    "their data; the held-out studies are the same for all, so intervals do not cover their draw."
)
ABOUT_BEST_SITE = "The best site is chosen by its zero-shot AUROC on the test studies, which flatters it and nobody else."
ABOUT_COSTS = (
    "Steps and examples are counted. Core seconds are CPU time: steps times what one step took when it was measured alone in "
    "one thread on this machine; pooled training was measured while it ran."
)


@dataclass(frozen=True)
class CostRow:
    """What a method's training took, as text in the order of COSTS."""

    name: str
    kind: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Gap:
    """Recovered gap of each measure towards one kind of pooled training."""

    towards: str
    texts: tuple[tuple[str, str], ...]
    unclear: tuple[str, ...]
    undefined: tuple[str, ...]


@dataclass(frozen=True)
class RegimeTables:
    """One regime's tables."""

    name: str
    num_seeds: str
    basis: str
    winners: str
    means: Grid
    about_differences: str
    differences: Grid
    costs: tuple[CostRow, ...]
    cost_notes: tuple[str, ...]
    gaps: tuple[Gap, ...]
    values: tuple[study_value.Row, ...]


@dataclass(frozen=True)
class Figure:
    """One measure, a panel a regime."""

    title: str
    better: str
    panels: tuple[charts.IntervalPanel, ...]


@dataclass(frozen=True)
class Comparison:
    """All of a study that a page shows."""

    name: str
    standing: str
    judged_on: str
    failures: tuple[str, ...]
    lies: tuple[str, ...]
    attacks: tuple[AttackTable, ...]
    figures: tuple[Figure, ...]
    regimes: tuple[RegimeTables, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SideBySide:
    """Single runs in one table; ``warning`` says where they cannot be compared."""

    grid: Grid
    warning: str


def side_by_side(folders: Sequence[Path]) -> SideBySide:
    """A row for each run, under names that tell them apart; no best where they were judged on different studies.

    Raises RunError for a folder that holds no completed run.
    """
    reports = [read_report(folder) for folder in folders]
    grid, names = measures.compare_table(reports), [report.run.name for report in reports]
    shown = [name if names.count(name) == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]
    rows = tuple(replace(row, name=name) for row, name in zip(grid.rows, shown, strict=True))
    if len({_judged(folder, report) for folder, report in zip(folders, reports, strict=True)}) < 2:
        return SideBySide(replace(grid, rows=rows), "")
    plain = tuple(replace(row, cells=tuple(cell and replace(cell, is_best=False) for cell in row.cells)) for row in rows)
    return SideBySide(replace(grid, rows=plain), ELSEWHERE)


def _judged(folder: Path, report: Report) -> str:
    """What a run was judged on, as far as it tells: sample sizes, and which phantoms or shards its config names."""
    sizes = judged_on(report.evaluation)
    try:
        held = config.load(folder / "config.yaml").data.held_out
    except ConfigError:
        return sizes
    chosen = held.model_dump(mode="json", include={"phantom", "probe_studies"})
    return json.dumps([sizes, chosen, [shard.name for shard in held.shards]], sort_keys=True)


def compared(study: Study) -> Comparison:
    """Tables and panels of a study; regimes and measures of which there is nothing yet are left out."""
    regimes = [regime for regime in study.regimes if _has_any(study, regime)]
    figures = [figure for name in MEASURES if (figure := _figure(study, regimes, name)) is not None]
    notes = [ABOUT_INTERVALS, *([ABOUT_BEST_SITE] if BEST_SITE in study.methods else []), ABOUT_COSTS]
    return Comparison(
        name=study.name,
        standing=study.standing,
        judged_on=study.judged_on,
        failures=failures(study),
        lies=lies(study),
        attacks=attack_tables(study),
        figures=tuple(figures),
        regimes=tuple(tables(study, regime) for regime in regimes),
        notes=tuple(notes),
    )


def tables(study: Study, regime: str) -> RegimeTables:
    """The tables of one regime."""
    methods = [method for method in study.methods if any(study.estimate(regime, method, measure) for measure in MEASURES)]
    others = [method for method in methods if method != MAIN]
    costs = {method: study.cost(regime, method) or Cost() for method in methods if method not in UNTRAINED}
    missing = tuple(dict.fromkeys(cost.why for cost in costs.values() if cost.why))
    done = sum(cell.regime == regime and cell.state == "completed" for cell in study.cells)
    return RegimeTables(
        name=method_name(regime),
        num_seeds=f"{done} of {quantities.plural(len(study.seeds), 'seed')} complete",
        basis=_basis(study, regime, methods),
        winners=_winners(study, regime, methods),
        means=_means(study, regime, methods),
        about_differences=_about_differences(study, regime),
        differences=_differences(study, regime, others),
        costs=tuple(_cost_row(method, cost, missing) for method, cost in costs.items()),
        cost_notes=tuple(f"{RAISED[number]} Core seconds: {why}." for number, why in enumerate(missing)),
        gaps=tuple(_gap(study, regime, pooled) for pooled in POOLED if {pooled, BEST_SITE} <= set(methods)),
        values=study_value.rows(study, regime),
    )


def as_markdown(comparisons: Sequence[Comparison]) -> str:
    """Everything but the drawings, as GitHub Markdown."""
    parts: list[str] = []
    for one in comparisons:
        parts += [f"# {one.name}", " ".join(filter(None, (one.standing, one.judged_on))), *map(markdown.text, one.failures)]
        if one.attacks:
            parts.append(markdown.items(one.lies).rstrip())
        for table in one.attacks:
            parts += [f"## {table.title}", f"{table.about[0].upper()}{table.about[1:]}.", _as_markdown(table.grid)]
        for regime in one.regimes:
            parts += [f"## {regime.name} ({regime.num_seeds})", regime.basis, regime.winners, _as_markdown(regime.means)]
            parts += [f"{method_name(MAIN)} less each method. {regime.about_differences}", _as_markdown(regime.differences)]
            parts += [markdown.table(["", *COSTS], [(row.name, *row.texts) for row in regime.costs]).rstrip()]
            parts += [*regime.cost_notes]
            parts += [gap_sentence(gap) for gap in regime.gaps]
            if regime.values:
                parts += [
                    study_value.ABOUT,
                    markdown.table(study_value.HEAD, [row.texts for row in regime.values], num_words=2),
                ]
        parts += list(one.notes)
    return "\n\n".join(parts) + "\n"


def _as_markdown(grid: Grid) -> str:
    return measures.as_markdown(grid, with_settings=True).rstrip()


def gap_sentence(gap: Gap) -> str:
    """The recovered gap as a sentence; where pooling brought nothing over the best site there is no gap to recover, and where
    seeds do not tell it from nothing a share of it would be a share of noise.
    """
    parts = [f"{title} {text}" for title, text in gap.texts]
    if gap.unclear:
        parts.append(f"gap too small to share out in {quantities.listing(gap.unclear)}")
    if gap.undefined:
        parts.append(f"none to recover in {quantities.listing(gap.undefined)}")
    return f"Recovered gap from the best site to {gap.towards}: {'; '.join(parts)}. Of the means, without interval."


def _has_any(study: Study, regime: str) -> bool:
    return any(cell.regime == regime and cell.methods for cell in study.cells)


def _basis(study: Study, regime: str, methods: Sequence[str]) -> str:
    """Over how many seeds the means are; where methods differ or seeds are wanting, every number says it."""
    if _is_whole(study, regime, methods):
        return f"Means over {quantities.plural(len(study.seeds), 'seed')}." if len(study.seeds) > 1 else "Numbers of one seed."
    return "Not every method has all seeds yet: a number of fewer than two has no interval, and nothing is clear of it."


def _is_whole(study: Study, regime: str, methods: Sequence[str]) -> bool:
    found = (study.estimate(regime, method, name) for method in methods for name in MEASURES)
    return all(one.num_seeds == len(study.seeds) for one in found if one)


def _all_seeds(study: Study, regime: str, methods: Sequence[str]) -> int | None:
    """How many seeds the study has, for numbers to say of how many of them they are; None where all are of all."""
    return None if _is_whole(study, regime, methods) else len(study.seeds)


def _of_seeds(one: Estimate, seeds: int | None) -> str:
    return "" if seeds is None else f"{one.num_seeds} of {quantities.plural(seeds, 'seed')}"


def _means(study: Study, regime: str, methods: Sequence[str]) -> Grid:
    columns, notes = _columns(study, regime), dict[str, int]()
    found = {(method, name): study.estimate(regime, method, name) for method in methods for name in columns}
    ranked = {name: measure for name, measure in columns.items() if name not in UNRANKED}
    best = {name: _best(measure, [found[method, name] for method in methods]) for name, measure in ranked.items()}
    seeds = _all_seeds(study, regime, methods)
    rows = []
    for method in methods:
        cells = []
        for name, measure in columns.items():
            one = found[method, name]
            cells.append(_mean_cell(measure, one, best.get(name, ""), seeds) if one else _absent(name, notes))
        rows.append(Row(method_name(method), about_method(method), "main" if method == MAIN else "baseline", tuple(cells)))
    return Grid(tuple(columns.values()), tuple(rows), tuple(notes))


def _about_differences(study: Study, regime: str) -> str:
    lower = [measure.title for measure in _columns(study, regime).values() if measure.better == "lower"]
    text = "Paired: taken within a seed, then averaged; percentages in points."
    return f"{text} Lower is better in {quantities.listing(lower)}: there a negative one favours fedmix." if lower else text


def _differences(study: Study, regime: str, methods: Sequence[str]) -> Grid:
    columns, notes = _columns(study, regime), dict[str, int]()
    seeds = _all_seeds(study, regime, [MAIN, *methods])
    rows = []
    for method in methods:
        found = {name: study.difference(regime, method, name) for name in columns}
        is_same = not any(value for one in found.values() if one for value in one.by_seed.values())
        cells = []
        for name, measure in columns.items():
            one, has_both = found[name], all(study.estimate(regime, each, name) for each in (MAIN, method))
            cell = _difference_cell(measure, one, seeds) if one else _absent(name, notes, has_both=has_both)
            cells.append(Cell(SAME) if one and is_same else cell)
        rows.append(Row(method_name(method), "the same run in every seed" if is_same else "", "baseline", tuple(cells)))
    return Grid(tuple(columns.values()), tuple(rows), tuple(notes))


def _absent(name: str, notes: dict[str, int], *, has_both: bool = False) -> Cell:
    """A number that is not there, with the reason that it points to."""
    why = NO_PAIR if has_both else NOT_TRIED if name in ATTACKS else NOT_LEARNT
    return Cell(quantities.DASH, note=notes.setdefault(why, len(notes) + 1))


def _columns(study: Study, regime: str) -> dict[str, Measure]:
    """The measures of a table: those that any of its methods has."""
    found = {name for name in MEASURES if any(study.estimate(regime, method, name) for method in study.methods)}
    return {name: measure for name, measure in MEASURES.items() if name in found}


def _winners(study: Study, regime: str, methods: Sequence[str]) -> str:
    """Who has the best mean where, and of whom the seeds do not tell it apart, whoever leads."""
    told = [text for name in MEASURES if name not in UNRANKED and (text := _leader(study, regime, methods, name))]
    if not told:
        return ""
    if max(study.num_seeds(regime, method) for method in methods) < 2:
        return f"Best numbers, of one seed, which tells nothing apart. {'; '.join(told)}."
    return f"Best means; clear: the interval of the difference within seeds leaves zero out. {'; '.join(told)}."


def _leader(study: Study, regime: str, methods: Sequence[str], name: str) -> str:
    """Who leads in a measure; methods whose means read alike share the lead."""
    measure = MEASURES[name]
    found = {method: one.mean for method in methods if (one := study.estimate(regime, method, name))}
    ranked = sorted(found, key=found.__getitem__, reverse=measure.better == "higher")
    if len(ranked) < 2:
        return ""
    best = measure.show(found[ranked[0]])
    leaders = [method for method in ranked if measure.show(found[method]) == best]
    less = {method: study.difference(regime, method, name, of=ranked[0]) for method in ranked if method not in leaders}
    unclear = [method for method, one in less.items() if one is None or not one.is_clear]
    has_interval = any(one is not None and one.interval is not None for one in less.values())
    standing = "" if not has_interval else f", not clear of {_some(unclear)}" if unclear else ", clear of all others"
    who = f"{quantities.listing([method_name(method) for method in leaders])}{' alike' if len(leaders) > 1 else ''}"
    return f"{measure.title}: {who} ({best}{standing})"


def _some(methods: Sequence[str]) -> str:
    """Methods by name, and how many more where they are many."""
    names = [method_name(method) for method in methods]
    if len(names) > NAMED + 1:
        names = [*names[:NAMED], f"{len(names) - NAMED} more"]
    return quantities.listing(names)


def _best(measure: Measure, estimates: Sequence[Estimate | None]) -> str:
    """The best mean as it is shown."""
    means = [one.mean for one in estimates if one]
    return measure.show(max(means) if measure.better == "higher" else min(means)) if len(means) > 1 else ""


def _mean_cell(measure: Measure, one: Estimate, best: str, seeds: int | None) -> Cell:
    text = measure.show(one.mean)
    interval = quantities.span(*map(measure.show, one.interval)) if one.interval else ""
    return Cell(text, interval, _of_seeds(one, seeds), is_best=text == best, score=Score(one.mean, one.interval))


def _difference_cell(measure: Measure, one: Estimate, seeds: int | None) -> Cell:
    """A difference; ``is_best`` marks those whose interval leaves zero out, ``is_worse`` those of them in disfavour of ours."""
    interval = " to ".join(signed(measure, bound) for bound in one.interval) if one.interval else ""
    is_worse = one.is_clear and (one.mean < 0) == (measure.better == "higher")
    score = Score(one.mean, one.interval)
    return Marked(signed(measure, one.mean), interval, _of_seeds(one, seeds), one.is_clear, score=score, is_worse=is_worse)


def signed(measure: Measure, value: float) -> str:
    """A difference with its sign; of percentages in points."""
    text = measure.show(abs(value)).removesuffix(" %")
    if not any(digit in text for digit in "123456789"):
        return text
    return ("+" if value > 0 else "\N{MINUS SIGN}") + text


def _cost_row(method: str, cost: Cost, missing: Sequence[str]) -> CostRow:
    """A method's costs; core seconds that nobody measured point to the reason."""
    examples = [quantities.count(cost.examples.get(stream, 0)) for stream in ("image", "text", "paired")]
    core_s = _core_seconds(cost.core_s) + (RAISED[missing.index(cost.why)] if cost.why else "")
    texts = (quantities.count(cost.steps), *examples, core_s, quantities.size(cost.bytes_up))
    return CostRow(method_name(method), "main" if method == MAIN else "baseline", texts)


def _core_seconds(value: float | None) -> str:
    return quantities.count(value) if value is None or value >= 10 else quantities.decimal(value, 1)


def _gap(study: Study, regime: str, pooled: str) -> Gap:
    shares, unclear, undefined = [], [], []
    for name, measure in MEASURES.items():
        whole = study.difference(regime, BEST_SITE, name, of=pooled)
        if name in ATTACKS or whole is None or study.estimate(regime, MAIN, name) is None:
            continue
        share = study.recovered_gap(regime, name, pooled)
        if share is None:
            undefined.append(measure.title)
        elif not whole.is_clear:
            unclear.append(measure.title)
        else:
            shares.append((measure.title, f"{100 * share:.0f} %".replace("-", "\N{MINUS SIGN}")))
    return Gap(method_name(pooled), tuple(shares), tuple(unclear), tuple(undefined))


def _figure(study: Study, regimes: Sequence[str], name: str) -> Figure | None:
    """A measure's panels, one a regime, on one axis."""
    measure = MEASURES[name]
    found = {regime: _interval_rows(study, regime, name) for regime in regimes}
    values = [value for rows in found.values() for row in rows for value in row.values]
    if not values:
        return None
    levels = charts.ticks(min(values), max(values))
    panels = [charts.interval_panel(method_name(regime), rows, levels, measure) for regime, rows in found.items() if rows]
    better = f"{measure.better} is better"
    return Figure(f"{measure.title}{f', {measure.unit}' if measure.unit else ''}", better, tuple(panels))


def _interval_rows(study: Study, regime: str, name: str) -> list[charts.IntervalRow]:
    found = [(method, study.estimate(regime, method, name)) for method in study.methods]
    return [
        charts.IntervalRow(
            name=method_name(method),
            kind="main" if method == MAIN else "baseline",
            mean=one.mean,
            interval=one.interval,
            values=tuple(one.by_seed.values()),
        )
        for method, one in found
        if one is not None
    ]
