"""leakage.html: what an audit of a trained model tried, what it found and what that means, for a data-protection officer.

Plain words beside every number, how many patients it rests on, and "not enough data" where it is so. No patient's identifier,
no text, no image and no name of a file is in it; the model is named by its run and by its weights' hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedmix.errors import RunError
from fedmix.report import charts, leak_findings, quantities
from fedmix.report.files import read_json, write_text
from fedmix.report.leak_findings import CANARIES, GUESSING, TITLES, UPDATE, WORDS, Finding, Values
from fedmix.report.leak_panels import panels
from fedmix.report.pages import environment

SCHEMA = 1
NO_CANARIES = (
    "Planted texts and pictures",
    "None were planted before training. The command fedmix canaries makes a shard of them; exposure is measured of a model "
    "that saw it.",
)
NO_UPDATE = (
    "One site's update",
    "An audit of a model sees no update. Whoever receives one without a secure sum may find members and the words of reports "
    "in it; the option --update measures both.",
)
NOT_IMPLEMENTED = (
    "Images rebuilt from one site's update",
    "Not implemented; attacks of this kind need updates of very few steps.",
)


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


def audited(model: Path, when: datetime) -> dict[str, str | None]:
    """Which model was attacked and when: its weights, and the run whose folder it lies in, if it does."""
    manifest = read_json(model.resolve().parent / "manifest.json")
    run = manifest if isinstance(manifest, Mapping) else {}
    with (model / "model.safetensors").open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    names = {name: str(run[key]) if run.get(key) else None for name, key in (("run", "name"), ("run_id", "run_id"))}
    return {**names, "weights_sha256": weights, "when": when.isoformat(timespec="seconds")}


def _subject(found: Values) -> Iterator[tuple[str, str]]:
    """The same as facts; audits of before this was written down say so."""
    subject = found.get("audited")
    if subject is None:
        yield "model", "not recorded"
        return
    run = "of no run folder" if subject["run"] is None else f"of run {subject['run']} ({subject['run_id'] or 'no id'})"
    yield "model", run
    yield "weights", f"sha256 {subject['weights_sha256'][:16]}…"
    yield "audited", quantities.moment(subject["when"])


def page_of(found: Values) -> Page:
    """What the page shows of an audit."""
    subjects = found["subjects"]
    sides = {"members": subjects["members"], "non-members": subjects["non_members"]}
    facts = [(f"{name}", f"{side['patients']:,} patients, {side['studies']:,} studies") for name, side in sides.items()]
    asked = [("canaries", NO_CANARIES), ("update", NO_UPDATE)]
    return Page(
        verdict=tuple(_verdict(found)),
        facts=(*_subject(found), *facts, ("reference model", "yes" if found["has_reference"] else "none")),
        warnings=tuple(_warnings(found)),
        panels=tuple(panels(found)),
        findings=tuple(_findings(found)),
        not_tried=(*(why for name, why in asked if name not in found), NOT_IMPLEMENTED),
    )


def _findings(found: Values) -> Iterator[Finding]:
    yield from (leak_findings.membership(kind, found["membership"][kind]) for kind in TITLES if kind in found["membership"])
    yield leak_findings.relinkage(found["relinkage"])
    yield leak_findings.epsilon(found["epsilon"])
    yield from (leak_findings.canaries(kind, block) for kind, block in found.get("canaries", {}).items())
    if "update" in found:
        yield leak_findings.update(found["update"]["membership"])
        if "words" in found["update"]:
            yield leak_findings.words(found["update"]["words"])


def rows(found: Values) -> list[tuple[str, str, str, str]]:
    """For the terminal: attack, its number, the interval, and what it means in one sentence."""
    attacks = {TITLES[kind]: found["membership"][kind] for kind in TITLES if kind in found["membership"]}
    listed = [(title, *_auc(block), leak_findings.attack_meaning(block)[0]) for title, block in attacks.items()]
    relinked = found["relinkage"]
    points, meaning = leak_findings.points, leak_findings.relinkage_meaning(relinked)[0]
    span = leak_findings.span(relinked["difference_r@1_ci95"], points)
    listed.append(("Re-linkage", points(relinked["difference_r@1"]), span, meaning))
    bound = found["epsilon"]
    meaning = leak_findings.epsilon_meaning(bound)[0]
    listed.append(("Epsilon at least", quantities.decimal(bound["lower_bound"], 2), "", meaning))
    for kind, block in found.get("canaries", {}).items():
        bits = f"{quantities.decimal(block['all']['mean_exposure_bits'], 1)} bits"
        listed.append((CANARIES[kind], bits, "", leak_findings.canary_meaning(block)))
    if "update" in found:
        whole = found["update"]["membership"]["patient"]
        listed.append((UPDATE, *_auc(whole), leak_findings.update_meaning(whole)[0]))
        if "words" in found["update"]:
            words = found["update"]["words"]
            listed.append((WORDS, f"{quantities.percent(words['recall'])} found", "", leak_findings.words_meaning(words)))
    return listed


def _auc(block: Values) -> tuple[str, str]:
    return quantities.decimal(block["auc"]), leak_findings.span(block["auc_ci95"])


def _verdict(found: Values) -> Iterator[str]:
    """The answer first, in sentences that a reader without mathematics can use."""
    leaks, num_tried = list(_leaks(found)), len(list(_measured(found)))
    if not num_tried:
        nothing = leak_findings.not_enough(found["membership"]["patient"])
        yield f"There is {nothing}, so nothing is said about what the model gives away."
        return
    attacks = quantities.plural(num_tried, "attack")
    if leaks:
        was = "was" if len(leaks) == 1 else "were"
        yield f"This model remembers some of its training: of {attacks}, better than guessing {was} {'; '.join(leaks)}."
    else:
        yield f"Of {attacks}, none could tell better than guessing who was in the training."
    yield from _of_update(found)
    yield "An attack that fails is no proof of safety: only differential privacy bounds all attacks, stronger ones too."


def _measured(found: Values) -> Iterator[str]:
    """Attacks on the model that had enough data."""
    yield from (kind for kind in TITLES if kind in found["membership"] and found["membership"][kind]["auc"] is not None)
    if found["relinkage"]["difference_r@1"] is not None:
        yield "relinkage"
    yield from found.get("canaries", {})


def _leaks(found: Values) -> Iterator[str]:
    """What did better than guessing, unless a model that saw none of the studies told the groups apart as well."""
    for kind in TITLES:
        block = found["membership"].get(kind)
        if block and _is_above(block) and not leak_findings.is_no_memory(block):
            yield f"{TITLES[kind].lower()} ({quantities.percent(block['auc'], 0)} right)"
    interval = found["relinkage"]["difference_r@1_ci95"]
    if interval and interval[0] > 0 and not leak_findings.are_other_pairs(found["relinkage"]):
        points = leak_findings.points(found["relinkage"]["difference_r@1"])
        yield f"re-linkage ({points} points more of the training pairs found)"
    for kind, block in found.get("canaries", {}).items():
        if leak_findings.is_exposed(block):
            bits = quantities.decimal(block["all"]["mean_exposure_bits"], 1)
            most = quantities.decimal(block["most_possible_bits"], 1)
            yield f"{CANARIES[kind].lower()} (exposed by {bits} of {most} bits)"


def _of_update(found: Values) -> Iterator[str]:
    """What one site's update gives away, which is another question than what the model does."""
    if "update" not in found:
        return
    told = []
    whole, words = found["update"]["membership"]["patient"], found["update"].get("words")
    if _is_above(whole):
        told.append(f"who is in the training ({quantities.percent(whole['auc'], 0)} right)")
    if words and leak_findings.gives_words_away(words):
        told.append(f"which words its reports use ({quantities.percent(words['recall'], 0)} of them)")
    if told:
        yield f"One site's update, for whoever sees it alone, tells {' and '.join(told)}."
    elif whole["auc"] is not None:
        yield "One site's update alone did not tell better than guessing what was asked of it."


def _is_above(block: Values) -> bool:
    """Whether an attack beats guessing."""
    return bool(block["auc_ci95"]) and block["auc_ci95"][0] > GUESSING


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
