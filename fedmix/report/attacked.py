"""What a lying site did to every method: each attack beside the honest regime, one table a measure.

An attack under which runs fail is a result, so such a cell says that it failed and a mean says over how many seeds it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmix import config
from fedmix.report import quantities
from fedmix.report.measures import Cell, Grid, Measure, Row, Score, method_name
from fedmix.report.study import MAIN, MEASURES, PLANTED, Study, about_method

SHOWN = ("zero_shot_auroc", "image_to_text_r10", PLANTED)
MARKED = "worse than with honest sites, and seeds tell it apart"
FAILED = "runs under this attack failed before this number, for the causes that are listed"
NOT_YET = "no seed has it yet"


@dataclass(frozen=True)
class Marked(Cell):
    """A cell that stands out because it is worse, if ``is_worse``, and because it is better otherwise."""

    is_worse: bool = False


@dataclass(frozen=True)
class AttackTable:
    """One measure: methods down, the honest regime and the attacks across."""

    title: str
    about: str
    grid: Grid


def attack_tables(study: Study) -> tuple[AttackTable, ...]:
    """The tables of a study that has honest and attacked regimes; none where no regime is attacked or none is honest."""
    honest = next((regime for regime in study.regimes if regime not in study.attacks), None)
    if honest is None or not study.attacks:
        return ()
    found = []
    for name in SHOWN:
        chosen = [regime for regime, attack in study.attacks.items() if name != PLANTED or attack.finding is not None]
        measure, grid = MEASURES[name], _grid(study, [honest, *chosen], name)
        if chosen and grid.has_numbers:
            unit = "in %, " if measure.show(0.0).endswith("%") else ""
            about = f"{unit}{measure.better} is better; bold: {MARKED} (difference paired by seed)"
            found.append(AttackTable(f"{measure.title} under attack", about, grid))
    return tuple(found)


def lies(study: Study) -> tuple[str, ...]:
    """What the lying site of each regime does."""
    return tuple(f"{method_name(regime)}: {_lie(attack)}." for regime, attack in study.attacks.items())


def _lie(attack: config.Attack) -> str:
    if attack.finding is not None:
        share, finding = quantities.percent(attack.share, 0), method_name(attack.finding)
        mark = f"marks {share} of its studies, images without {finding}, with a {attack.trigger}"
        return f"{attack.site} {mark} and pairs them with reports of {finding}"
    if attack.kind == "little_is_enough":
        away = f"{attack.strength:g} standard deviation{'' if attack.strength == 1 else 's'} against it"
        return f"{attack.site} sends the mean of the others' updates, moved {away}"
    longer = "" if attack.strength == 1 else f", {attack.strength:g} times as long"
    what = {"scale": "its update", "sign_flip": "its update turned round", "noise": "noise in place of its update"}
    return f"{attack.site} sends {what[attack.kind]}{longer}"


def failures(study: Study) -> tuple[str, ...]:
    """What failed, and why."""
    failed = [cell for cell in study.cells if cell.state == "failed"]
    return tuple(
        f"Failed: {method_name(cell.regime)}, seed {cell.seed}: {cell.cause or 'no cause was kept'}" for cell in failed
    )


def _grid(study: Study, regimes: Sequence[str], name: str) -> Grid:
    measure, notes = MEASURES[name], dict[str, int]()
    rows = tuple(
        Row(
            method_name(method),
            about_method(method),
            "main" if method == MAIN else "baseline",
            tuple(_cell(study, regimes[0], regime, method, name, notes) for regime in regimes),
        )
        for method in study.methods
    )
    return Grid(tuple(_column(measure, regime) for regime in regimes), rows, tuple(notes))


def _column(measure: Measure, regime: str) -> Measure:
    """The measure as the column of one regime."""
    name = method_name(regime)
    return replace(measure, title=name, short=name.replace(" ", "\n"), unit="")


def _cell(study: Study, honest: str, regime: str, method: str, name: str, notes: dict[str, int]) -> Cell:
    measure, one = MEASURES[name], study.estimate(regime, method, name)
    seeds = [cell for cell in study.cells if cell.regime == regime]
    if one is None:
        text, why = ("failed", FAILED) if any(cell.state == "failed" for cell in seeds) else (quantities.DASH, NOT_YET)
        return Cell(text, note=notes.setdefault(why, len(notes) + 1))
    change = study.change(honest, regime, method, name)
    worse = change is not None and change.is_clear and (change.mean < 0) == (measure.better == "higher")
    interval = quantities.span(*map(measure.show, one.interval)) if one.interval else ""
    whole = all(len(study.seeds) == study.num_seeds(regime, other) for other in study.methods)
    setting = "" if whole else f"{one.num_seeds} of {len(seeds)} seeds"  # of all rows: a column that shares it says it once
    score = Score(one.mean, one.interval)
    return Marked(measure.show(one.mean), interval, setting, is_best=worse, score=score, is_worse=worse)
