"""leakage.html: what an audit of a trained model tried, what it found and what that means, for a data-protection officer.

Plain words beside every number, how many patients it rests on, and "not enough data" where it is so. No identifier, no text,
no image and no name of a file is in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedmix.errors import RunError
from fedmix.report import charts, quantities
from fedmix.report.measures import Measure, Score
from fedmix.report.pages import environment
from fedmix.report.summary import write_text

SCHEMA = 1
GUESSING = 0.5
Values = Mapping[str, Any]

TITLES = {
    "patient": "Whole patients",
    "text": "Reports",
    "image": "Images",
    "pair": "Image with report",
}
TRIED = {
    "patient": "Everything below about all of a patient's studies, as one number a patient.",
    "text": "Words of a report were hidden; a model that was trained on it fills them more surely.",
    "image": "Three quarters of an image were hidden; a model that was trained on it draws them more closely.",
    "pair": "Image and report were compared; a model that was trained on both places them closer together.",
}
NOT_TRIED = (
    (
        "Planted texts",
        "None were planted before training. Exposure can be measured only of texts that were (fedmix.evaluation.canaries).",
    ),
    (
        "Words read from one site's update",
        "An audit of a model sees no update. Whoever receives one without a secure sum can read which words its reports use "
        "(fedmix.evaluation.word_recovery measures it).",
    ),
    ("Images rebuilt from one site's update", "Not implemented; attacks of this kind need updates of very few steps."),
)
# interval_panel asks a measure for its name and how it shows a value; an audit has no evaluation to read it from.
AUC = Measure("AUC of the attack", "AUC", "higher", lambda evaluation: Score(None), lambda value: quantities.decimal(value, 2))
RECALL = Measure("R@1", "R@1", "higher", lambda evaluation: Score(None), lambda value: quantities.percent(value, 0))


@dataclass(frozen=True)
class Finding:
    """One attack: what was done, its numbers as text, how many it rests on, and what it means."""

    title: str
    tried: str
    numbers: tuple[tuple[str, str], ...]
    sizes: str
    meaning: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """Everything the template draws."""

    verdict: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]
    panels: tuple[charts.IntervalPanel, ...]
    findings: tuple[Finding, ...]
    not_tried: tuple[tuple[str, str], ...]


def write_leakage(path: Path, found: Values) -> Path:
    """Render the content of leakage.json; raises RunError for that of another schema."""
    if found.get("schema") != SCHEMA:
        raise RunError(f"leakage.json: schema is {found.get('schema')!r}, this fedmix reads {SCHEMA}; audit the model again")
    write_text(path, environment().get_template("leakage.html.j2").render(page=page_of(found), charts=charts))
    return path


def page_of(found: Values) -> Page:
    """What the page shows of an audit."""
    membership, subjects = found["membership"], found["subjects"]
    kinds = [kind for kind in TITLES if kind in membership]
    findings = [_membership(kind, membership[kind]) for kind in kinds]
    findings += [_relinkage(found["relinkage"]), _epsilon(found["epsilon"])]
    sides = {"members": subjects["members"], "non-members": subjects["non_members"]}
    facts = [(f"{name}", f"{side['patients']:,} patients, {side['studies']:,} studies") for name, side in sides.items()]
    return Page(
        verdict=tuple(_verdict(found)),
        facts=(*facts, ("reference model", "yes" if found["has_reference"] else "none")),
        warnings=tuple(_warnings(found)),
        panels=tuple(_panels(found, kinds)),
        findings=tuple(findings),
        not_tried=NOT_TRIED,
    )


def rows(found: Values) -> list[tuple[str, str, str, str]]:
    """For the terminal: attack, its number, the interval, and what it means in one sentence."""
    listed = []
    for kind in TITLES:
        if kind in found["membership"]:
            block = found["membership"][kind]
            meaning = _attack_meaning(block)[0]
            listed.append((TITLES[kind], quantities.decimal(block["auc"]), _span(block["auc_ci95"]), meaning))
    relinked = found["relinkage"]
    difference = _points(relinked["difference_r@1"])
    listed.append(("Re-linkage", difference, _span(relinked["difference_r@1_ci95"], _points), _relinkage_meaning(relinked)[0]))
    bound = found["epsilon"]
    listed.append(("Epsilon at least", quantities.decimal(bound["lower_bound"], 2), "", _epsilon_meaning(bound)[0]))
    return listed


def _verdict(found: Values) -> Iterator[str]:
    """The answer first, in sentences that a reader without mathematics can use."""
    leaks, num_tried = list(_leaks(found)), len(list(_measured(found)))
    if not num_tried:
        yield f"There is {_not_enough(found['membership']['patient'])}, so nothing is said about what the model gives away."
        return
    attacks = quantities.plural(num_tried, "attack")
    if leaks:
        yield f"This model remembers some of its training: of {attacks}, better than guessing {_was(leaks)} {'; '.join(leaks)}."
    else:
        yield f"Of {attacks}, none could tell better than guessing who was in the training."
    yield "An attack that fails is no proof of safety: only differential privacy bounds all attacks, stronger ones too."


def _was(leaks: list[str]) -> str:
    return "was" if len(leaks) == 1 else "were"


def _measured(found: Values) -> Iterator[str]:
    """Attacks that had enough data."""
    yield from (kind for kind in TITLES if kind in found["membership"] and found["membership"][kind]["auc"] is not None)
    if found["relinkage"]["difference_r@1"] is not None:
        yield "relinkage"


def _leaks(found: Values) -> Iterator[str]:
    """What did better than guessing, unless a model that saw none of the studies told the groups apart as well."""
    for kind in TITLES:
        block = found["membership"].get(kind)
        if block and block["auc_ci95"] and block["auc_ci95"][0] > GUESSING and not _is_no_memory(block):
            yield f"{TITLES[kind].lower()} ({quantities.percent(block['auc'], 0)} right)"
    interval = found["relinkage"]["difference_r@1_ci95"]
    if interval and interval[0] > 0 and not _are_other_pairs(found["relinkage"]):
        points = _points(found["relinkage"]["difference_r@1"])
        yield f"re-linkage ({points} points more of the training pairs found)"


def _is_no_memory(block: Values) -> bool:
    """Whether the control tells the groups apart, so that they differ by themselves."""
    interval = block.get("control", {}).get("auc_ci95")
    return bool(interval) and not interval[0] <= GUESSING <= interval[1]


def _are_other_pairs(relinked: Values) -> bool:
    """Whether a model that saw no pair tells the two kinds of pairs apart as well."""
    interval = relinked.get("control", {}).get("difference_r@1_ci95")
    return bool(interval) and not interval[0] <= 0 <= interval[1]


def _warnings(found: Values) -> Iterator[str]:
    subjects = found["subjects"]
    if not subjects["are_alike"]:
        yield (
            "Members and non-members come from different shards. Other hospitals have other devices and habits, so an attack "
            "may have told hospitals apart and not memory; give the members' shard on both sides to rule that out."
        )
    if not found["has_reference"]:
        yield (
            "No reference model was given. Attacks without one are weaker, and there is no control for differences between "
            "the groups; give --reference, for instance a model of a run without this site."
        )
    if subjects["num_shared_patients_left_out"]:
        number = quantities.plural(subjects["num_shared_patients_left_out"], "patient")
        yield f"{number} of the non-members' shards are members too and were left out."


def _panels(found: Values, kinds: list[str]) -> Iterator[charts.IntervalPanel]:
    blocks = {TITLES[kind]: found["membership"][kind] for kind in kinds}
    attacks = [_interval_row(name, "main", block) for name, block in blocks.items() if block["auc"] is not None]
    if attacks:
        yield _against_guessing("Telling members from others", attacks)
    controls = [
        _interval_row(name, "baseline", block["control"])
        for name, block in blocks.items()
        if block.get("control") and block["control"]["auc"] is not None
    ]
    if controls:
        yield _against_guessing("Control: a model that saw none of them", controls)
    relinked = found["relinkage"]
    if relinked["difference_r@1"] is not None:
        sides = {"training pairs": "members", "other pairs": "non_members"}
        recalls = [
            charts.IntervalRow(name, "main", relinked[f"{side}_r@1"], _pair(relinked[f"{side}_r@1_ci95"]), ())
            for name, side in sides.items()
        ]
        top = max(value for row in recalls for value in (row.mean, *(row.interval or ())))
        panel = charts.interval_panel("Own report found first", recalls, charts.ticks(0.0, top), RECALL)
        told = "; ".join(f"{row.name} {RECALL.show(row.mean)}" for row in recalls)
        yield replace(panel, description=f"Share of images whose own report is ranked first: {told}")


def _interval_row(name: str, kind: str, block: Values) -> charts.IntervalRow:
    return charts.IntervalRow(name, kind, block["auc"], _pair(block["auc_ci95"]), ())


def _pair(interval: list[float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])


def _against_guessing(title: str, attacks: list[charts.IntervalRow]) -> charts.IntervalPanel:
    """Attacks on one axis with a line at what guessing reaches."""
    low = min(value for row in attacks for value in (row.mean, *(row.interval or ())))
    levels = charts.ticks(min(0.4, low), 1.0)
    panel = charts.interval_panel(title, attacks, levels, AUC)
    across = charts.Scale(levels[0], levels[-1], charts.BAR_LEFT, charts.WIDTH - charts.INTERVAL_RIGHT)
    told = "; ".join(f"{row.name} {AUC.show(row.mean)}" for row in attacks)
    return replace(panel, line=across(GUESSING), description=f"{title}, AUC; the line at {GUESSING} is guessing: {told}")


def _membership(kind: str, block: Values) -> Finding:
    numbers = [("AUC", f"{quantities.decimal(block['auc'])} {_span(block['auc_ci95'])}".strip())]
    for rate, name in (("0.01", "found at 1 % false alarms"), ("0.001", "found at 0.1 % false alarms")):
        value, interval = block[f"tpr@fpr_{rate}"], block.get(f"tpr@fpr_{rate}_ci95")
        text = "not enough data" if value is None else f"{quantities.percent(value)} {_span(interval, quantities.percent)}"
        numbers.append((name, text.strip()))
    unit = "patients" if kind == "patient" else "studies"
    sizes = f"{block['num_members']:,} members, {block['num_non_members']:,} non-members ({unit})"
    return Finding(TITLES[kind], TRIED[kind], tuple(numbers), sizes, tuple(_attack_meaning(block)))


def _attack_meaning(block: Values) -> list[str]:
    if block["auc"] is None:
        return [f"{_capital(_not_enough(block))}."]
    low, high = block["auc_ci95"] or (0.0, 1.0)
    if low > GUESSING:
        sentences = [f"Better than guessing: it is right about {quantities.percent(block['auc'], 0)} of such pairs."]
    elif high < GUESSING:
        sentences = ["Worse than guessing: the members are the harder ones to fill in, whatever the model remembers."]
    else:
        sentences = [f"Not told apart from guessing; a leak of up to {quantities.decimal(high, 2)} is not excluded."]
    if _is_no_memory(block):
        apart = quantities.decimal(block["control"]["auc"], 2)
        sentences.append(
            f"A model that saw none of them tells the groups apart too (AUC {apart}): they differ by themselves, and what is "
            "found is not all memory."
        )
    return sentences


def _relinkage(block: Values) -> Finding:
    tried = "For the image of a patient, the model ranked reports; how much more often was the patient's own the first?"
    if block["difference_r@1"] is None:
        return Finding("Re-linkage", tried, (), "", (f"{_capital(_not_enough(block))}.",))
    numbers = (
        ("training pairs", quantities.percent(block["members_r@1"])),
        ("other pairs", quantities.percent(block["non_members_r@1"])),
        ("difference", f"{_points(block['difference_r@1'])} {_span(block['difference_r@1_ci95'], _points)}"),
    )
    sizes = f"{block['num_members']:,} and {block['num_non_members']:,} pairs, each among {block['gallery']:,}"
    return Finding("Re-linkage", tried, numbers, sizes, tuple(_relinkage_meaning(block)))


def _relinkage_meaning(block: Values) -> list[str]:
    if block["difference_r@1"] is None:
        return [f"{_capital(_not_enough(block))}."]
    others, chance = quantities.percent(block["non_members_r@1"]), quantities.percent(block["chance"])
    ability = (
        f"Whoever holds the model and a pile of reports finds the report of an image it never saw in {others} of cases "
        f"(chance: {chance}); that is what retrieval is for, and a reason not to keep names on either side."
    )
    low, _ = block["difference_r@1_ci95"] or (0.0, 0.0)
    if low <= 0:
        return ["Training pairs are not found more often than others.", ability]
    if _are_other_pairs(block):
        return ["More often for training pairs, but a model that saw none of them finds these more often too.", ability]
    return ["More often for training pairs: the model has learnt some of them by heart.", ability]


def _epsilon(block: Values) -> Finding:
    tried = "From the attack on patients: which promise of differential privacy would this model break?"
    if block["lower_bound"] is None:
        return Finding("Bound of epsilon", tried, (), "", (f"{_capital(_not_enough(block))}.",))
    numbers = (
        ("epsilon at least", quantities.decimal(block["lower_bound"], 2)),
        ("most that could be shown", quantities.decimal(block["largest_possible"], 2)),
        ("delta", f"{block['delta']:g}"),
        ("confidence", quantities.percent(block["confidence"], 0)),
    )
    sizes = (
        f"{block['true_positives']:,} of {block['num_members']:,} members and "
        f"{block['false_positives']:,} of {block['num_non_members']:,} non-members accused"
    )
    return Finding("Bound of epsilon", tried, numbers, sizes, tuple(_epsilon_meaning(block)))


def _epsilon_meaning(block: Values) -> list[str]:
    if block["lower_bound"] is None:
        return [f"{_capital(_not_enough(block))}."]
    bound = block["lower_bound"]
    if bound <= 0:
        return ["No promise of differential privacy is contradicted; this does not show that one is kept."]
    return [
        f"An accounted epsilon below {quantities.decimal(bound, 2)} would be contradicted by this attack.",
        "Patients of one model are taken as independent trials here, which holds only nearly.",
    ]


def _not_enough(block: Values) -> str:
    return str(block["reason"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return quantities.DASH if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _span(interval: list[float] | None, show: Any = quantities.decimal) -> str:
    if interval is None:
        return ""
    low, high = map(show, interval)
    return f"({low} to {high})"
