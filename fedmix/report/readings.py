"""What the report shows of findings beyond its headline: shares of the labels, subgroups, calibration, other ways to ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedmix.report import charts, quantities
from fedmix.report.evaluated import Calibration, Classification, Classifier, Evaluation, MinedPrompts, ShareOfLabels, Subgroup
from fedmix.report.measures import LINEAR_PROBE, MEASURES

AUROC = MEASURES[LINEAR_PROBE]
SUBGROUPS = "classification/subgroups"
TUNED = {"fine_tune": "Fine-tuned end to end", "prompt_tune": "With tuned prompts on the frozen model"}


@dataclass(frozen=True)
class Readings:
    """Panels, and sentences for what has no picture."""

    panels: tuple[charts.IntervalPanel, ...] = ()
    notes: tuple[str, ...] = ()


def readings(evaluation: Evaluation | None) -> Readings:
    """Everything there is to show; empty for a run of before these were measured."""
    found = evaluation.classification if evaluation else None
    if evaluation is None or found is None:
        return Readings()
    whole = found.linear_probe.macro_auroc if found.linear_probe else None
    shares = _named(found.label_shares)
    panels = list(_panel("Linear probe AUROC by share of the labels", shares, whole))
    notes = list(_missing("by share of the labels", shares))
    for kind, groups in found.subgroups.items():
        by = f"by {_spoken(kind)}"
        panels += _panel(f"Linear probe AUROC {by}", _drawn(groups, found.linear_probe), whole)
        notes += [*_missing(by, groups), *_everybody(by, groups, found.linear_probe), *_compared(by, groups)]
    notes += _unsaid(evaluation.skipped)
    for title, blocks in (("Fine-tuning", found.fine_tune), ("Tuned prompts", found.prompt_tune)):
        panels += _panel(f"{title} AUROC by share of the labels", _named(blocks), whole)
    return Readings(tuple(panels), (*notes, *_behind(found), *_calibration(found.calibration)))


def other_ways(evaluation: Evaluation) -> list[str]:
    """What mined prompts, fine-tuning and tuned prompts reach beside what they are compared with, a sentence each.

    What was asked for and could not be done has its reason; what was not asked for, nothing.
    """
    found = evaluation.classification or Classification()
    sentences = list(_mined(found.mined_prompts))
    for name, how in TUNED.items():
        if f"classification/{name}" in evaluation.skipped:
            sentences.append(f"{how}: nothing, for {evaluation.skipped[f'classification/{name}']}.")
        reached = [
            f"{quantities.decimal(block.macro_auroc)} on {share} of the labels{_over(block)}"
            for share, block in _named(getattr(found, name)).items()
            if block.macro_auroc is not None
        ]
        if reached:
            sentences.append(f"{how}, it reaches a macro AUROC of {quantities.listing(reached)}.")
    return sentences


def _mined(found: MinedPrompts | None) -> Iterator[str]:
    if found is None or found.macro_auroc is None or found.fixed_prompts is None or found.gain_over_fixed is None:
        return
    yield (
        f"Asked in sentences of reports, it tells {quantities.plural(found.num_labels_scored or 0, 'finding')} apart at a "
        f"macro AUROC of {quantities.decimal(found.macro_auroc)}; fixed prompts reach "
        f"{quantities.decimal(found.fixed_prompts)} on them "
        f"({_difference(found.gain_over_fixed, found.gain_over_fixed_ci95)})."
    )


def _over(block: ShareOfLabels) -> str:
    gain = block.gain_over_probe
    return "" if gain is None else f" ({_difference(gain, block.gain_over_probe_ci95)} over a linear probe)"


def _difference(value: float, interval: tuple[float, float] | None) -> str:
    return quantities.signed(value, 3) + (f", {' to '.join(quantities.signed(end, 3) for end in interval)}" if interval else "")


def _named(shares: Mapping[str, ShareOfLabels]) -> dict[str, ShareOfLabels]:
    return {_share_name(name, block): block for name, block in shares.items()}


def _share_name(name: str, block: ShareOfLabels) -> str:
    share = name.removesuffix("_percent") + " %"
    return share if block.num_train is None else f"{share} ({block.num_train:,})"


def _drawn(groups: Mapping[str, Subgroup], whole: Classifier | None) -> dict[str, Subgroup]:
    return {name: block for name, block in groups.items() if not _is_everybody(block, whole)}


def _is_everybody(block: Classifier, whole: Classifier | None) -> bool:
    """Whether a group is the whole test set, so that nobody is left to compare it with."""
    return block.num_test is not None and whole is not None and block.num_test == whole.num_test


def _everybody(by: str, groups: Mapping[str, Subgroup], whole: Classifier | None) -> Iterator[str]:
    for name, block in groups.items():
        if _is_everybody(block, whole):
            yield f"{by.capitalize()} there is nothing to compare: all {block.num_test:,} test studies are of {name}."


def _unsaid(skipped: Mapping[str, str]) -> Iterator[str]:
    """Kinds of subgroup that there are none of, a sentence for each reason."""
    kinds: dict[str, list[str]] = {}
    for key, reason in skipped.items():
        if key.startswith(SUBGROUPS):
            kinds.setdefault(reason, []).append(_spoken(key.removeprefix(SUBGROUPS).removeprefix("/")))
    for reason, names in kinds.items():
        by = f" by {quantities.listing(names)}" if all(names) else ""
        yield f"No subgroups{by}: {reason}."


def _compared(by: str, groups: Mapping[str, Subgroup]) -> Iterator[str]:
    """The difference that can be read, since each group's mean is over the findings that its own studies allow."""
    told = [
        f"{name} {_difference(block.difference, block.difference_ci95)}"
        + (f" (on {quantities.plural(block.num_labels_compared, 'finding')})" if block.num_labels_compared else "")
        for name, block in groups.items()
        if block.difference is not None
    ]
    if told:
        yield f"{by.capitalize()}, difference from all other test patients on the findings that both have: {'; '.join(told)}."


def _sizes(block: Classifier) -> str:
    """What a group's mean is over."""
    if not isinstance(block, Subgroup):
        return ""
    sizes = [(block.num_test, "study", "studies"), (block.num_labels_scored, "finding", "findings")]
    return ", ".join(quantities.plural(number, noun, nouns) for number, noun, nouns in sizes if number is not None)


def _panel(title: str, blocks: Mapping[str, Classifier], whole: float | None) -> Iterator[charts.IntervalPanel]:
    """One panel, if there is a number to draw; the line is at the probe on everybody."""
    rows = [
        charts.IntervalRow(name, "main", block.macro_auroc, block.ci95, _draws(block), _sizes(block))
        for name, block in blocks.items()
        if block.macro_auroc is not None
    ]
    if not rows:
        return
    values = [value for row in rows for value in (row.mean, *(row.interval or ()), *row.values)]
    levels = charts.ticks(min(values), max(values))
    panel = charts.interval_panel(title, rows, levels, AUROC)
    across = charts.Scale(levels[0], levels[-1], charts.BAR_LEFT, charts.WIDTH - charts.INTERVAL_RIGHT)
    told = "; ".join(f"{row.name} {AUROC.show(row.mean)}{f' ({row.under})' if row.under else ''}" for row in rows)
    line = panel.line if whole is None else min(max(across(whole), across.start), across.stop)
    yield replace(panel, line=line, description=f"{title}, mean over findings: {told}")


def _draws(block: Classifier) -> tuple[float, ...]:
    return block.draws if isinstance(block, ShareOfLabels) else ()


def _missing(title: str, blocks: Mapping[str, Classifier]) -> Iterator[str]:
    absent = [f"{name}: {block.reason_for('macro_auroc')}" for name, block in blocks.items() if block.macro_auroc is None]
    if absent:
        yield f"Not shown {title}: {'; '.join(absent)}."


def _behind(found: Classification) -> Iterator[str]:
    """Groups whose interval of the difference from all others lies below zero."""
    behind = [
        f"{_spoken(kind)} {name} ({_difference(block.difference, block.difference_ci95)})"
        for kind, blocks in found.subgroups.items()
        for name, block in blocks.items()
        if block.difference is not None and block.difference_ci95 is not None and block.difference_ci95[1] < 0
    ]
    if behind:
        yield f"Served less well than all other test patients, in AUROC: {quantities.listing(behind)}."


def _spoken(kind: str) -> str:
    return kind.replace("_", " ")


def _calibration(found: Calibration | None) -> Sequence[str]:
    if found is None or found.ece is None or found.brier is None:
        return ()
    range_of = found.ece_if_calibrated
    calibrated = ""
    sizes = ((found.num_labels_scored, "finding", "findings"), (found.num_test, "test study", "test studies"))
    over = " of ".join(quantities.plural(number, noun, nouns) for number, noun, nouns in sizes if number is not None)
    if range_of is not None:
        low, high = map(quantities.decimal, range_of)
        calibrated = f"; calibrated probabilities on as many studies would give {low} to {high}"
    guess = ""
    if found.brier_of_prevalence is not None:
        guess = f"; always saying how frequent a finding is gives {quantities.decimal(found.brier_of_prevalence)}"
    return (
        f"Calibration{f' over {over}' if over else ''}: expected error {quantities.decimal(found.ece)}{calibrated}. "
        f"Brier score {quantities.decimal(found.brier)}{guess}.",
    )
