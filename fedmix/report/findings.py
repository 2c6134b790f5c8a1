"""AUROC of each finding: a bar where enough test studies stand behind it, and a sentence on what the mean is over.

A finding that hardly any test study has can reach any AUROC by luck, and a bar hides that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fedmix.report import charts, quantities
from fedmix.report.evaluated import Classification, Classifier

MIN_CASES = 5  # test studies with and without a finding, as for its AUROC in a subgroup


@dataclass(frozen=True)
class Findings:
    """A panel for each reading of the features, what has no bar, and the sentence that stands in where there is nothing."""

    panels: tuple[charts.BarPanel, ...] = ()
    notes: tuple[str, ...] = ()
    absence: str = ""


def findings(found: Classification | None) -> Findings:
    """Everything there is of single findings, in one order: the last reading's, best first."""
    blocks = {title: block for title, block in _readings(found).items() if _known(block)}
    if not blocks:
        return Findings(absence="No finding was evaluated on its own.")
    strength = _known(list(blocks.values())[-1])
    order = sorted(
        {name for block in blocks.values() for name in _known(block)}, key=lambda name: (-strength.get(name, 0.0), name)
    )
    panels = (_panel(title, block, order) for title, block in blocks.items())
    return Findings(tuple(panel for panel in panels if panel), notes(found))


def notes(found: Classification | None) -> tuple[str, ...]:
    """Over how many findings each mean is, and which have too few studies for a bar; nothing where no counts were kept."""
    told: dict[str, list[str]] = {}
    for title, block in _readings(found).items():
        if block.num_per_label and _known(block):
            told.setdefault(" ".join(_behind_the_mean(block)), []).append(title)
    return tuple(f"{quantities.listing(titles)}: {sentences}" for sentences, titles in told.items())


def _readings(found: Classification | None) -> Mapping[str, Classifier]:
    blocks = {"Zero-shot AUROC": found.zero_shot, "Linear probe AUROC": found.linear_probe} if found else {}
    return {title: block for title, block in blocks.items() if block}


def _panel(title: str, block: Classifier, order: list[str]) -> charts.BarPanel | None:
    known, few = _known(block), _few(block)
    drawn = {name: known[name] for name in order if name in known and name not in few}
    positives = {name: cases.positive for name, cases in block.num_per_label.items()}
    return charts.bar_panel(title, drawn, block.macro_auroc, positives) if drawn else None


def _known(block: Classifier) -> dict[str, float]:
    """AUROC of each finding that has one; a finding without both classes in the test set is null."""
    return {name: value for name, value in block.per_label.items() if value is not None}


def _few(block: Classifier) -> dict[str, int]:
    """Findings whose AUROC rests on too few studies with or without it, with the number of the rarer kind."""
    rarer = {name: min(cases.positive, cases.negative) for name, cases in block.num_per_label.items()}
    return {name: rarer[name] for name in _known(block) if rarer.get(name, MIN_CASES) < MIN_CASES}


def _behind_the_mean(block: Classifier) -> Iterator[str]:
    scored, few = _known(block), _few(block)
    of = "" if block.num_test is None else f", {block.num_test:,} test studies"
    yield f"the mean is over {len(scored)} of {quantities.plural(len(block.per_label), 'finding')}{of}."
    if few:
        named = [
            f"{charts.readable(name)} ({number})" for name, number in sorted(few.items(), key=lambda one: (-one[1], one[0]))
        ]
        yield (
            f"Not enough data to stand alone, with fewer than {MIN_CASES} studies with or without it, yet part of the mean: "
            f"{quantities.listing(named)}."
        )
    if absent := [charts.readable(name) for name in block.per_label if name not in scored]:
        yield f"No AUROC, for want of any study with or without the finding: {quantities.listing(absent)}."
