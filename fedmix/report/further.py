"""What the model does beyond the main held-out set and its table: on further sets, and among pairs of one finding alone.

The table of a further set is the headline's, with its own chance levels, and never pooled with another set's: labels that
share a name may mean different things in two data sets.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedmix.report import measures, quantities
from fedmix.report.evaluated import Evaluation, RankingByFinding
from fedmix.report.measures import Grid
from fedmix.report.summary import Baseline, Report


@dataclass(frozen=True)
class FurtherSet:
    """One of ``held_out.also``: its name, the methods' numbers on it, and what the table has no column for."""

    name: str
    grid: Grid
    sentences: tuple[str, ...]


def further_sets(report: Report) -> tuple[FurtherSet, ...]:
    """The further held-out sets of a report, in its order."""
    return tuple(
        FurtherSet(name, measures.headline(_on(report, name)), tuple(by_finding(evaluation)))
        for name, evaluation in report.evaluation.also.items()
    )


def _on(report: Report, name: str) -> Report:
    """The report as if this set were the only one."""
    others = {method: baseline.evaluation.also.get(name) for method, baseline in report.baselines.items()}
    baselines = {method: Baseline(evaluation=found) for method, found in others.items() if found is not None}
    return report.model_copy(update={"evaluation": report.evaluation.also[name], "baselines": baselines})


def by_finding(evaluation: Evaluation) -> list[str]:
    """What was found among pairs with one of five findings alone; nothing where nobody asked."""
    found = evaluation.exclusive
    if found is None:
        return []
    if found.reason is not None:
        return [f"Retrieval by finding: {found.reason}."]
    sentences = [
        f"Among {found.num_each} pairs of each of five findings alone, {ranked}: {_ranking(one)}."
        for ranked, one in (("reports for an image", found.image_to_text), ("images for a report", found.text_to_image))
        if one
    ]
    if found.zero_shot is not None:
        each = ", ".join(f"{name} {quantities.percent(share, 0)}" for name, share in found.zero_shot.per_label.items())
        sentences.append(
            f"Their zero-shot accuracy is {quantities.percent(found.zero_shot.accuracy)} "
            f"({quantities.percent(found.zero_shot.chance)} by chance): {each}."
        )
    return sentences


def _ranking(found: RankingByFinding) -> str:
    """P@k, then H@k, each with what chance gives."""
    values = found.model_dump(by_alias=True)
    parts = []
    for letter in "PH":
        names = [f"{letter.lower()}@{depth}" for depth in (1, 5, 10)]
        shares, chance = (", ".join(quantities.percent(at.get(name)) for name in names) for at in (values, found.chance))
        parts.append(f"{letter}@1, 5 and 10 are {shares} ({chance} by chance)")
    return "; ".join(parts)
