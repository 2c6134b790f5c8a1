"""What each attack of an audit tried, found and means, in words for a data-protection officer.

A block is a part of leakage.json; where it holds no number for want of data, its reason is what is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmix.report import quantities

GUESSING = 0.5
ALPHA = 0.025  # a chance as small is taken for none; as at one end of a 95 % interval
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
CANARIES = {"texts": "Planted texts", "images": "Planted pictures"}
TRIED_CANARIES = {
    "texts": "Random texts of patients who never were went into the training; does the model know them better than others?",
    "images": "Random pictures of patients who never were went into the training; a tenth of each was shown, the rest drawn.",
}
UPDATE, WORDS = "Members of one update", "Words of an update"


@dataclass(frozen=True)
class Finding:
    """One attack: what was done, its numbers as text, how many it rests on, and what it means."""

    title: str
    tried: str
    numbers: tuple[tuple[str, str], ...]
    sizes: str
    meaning: tuple[str, ...]


def membership(kind: str, block: Values) -> Finding:
    """The attack on one kind of data of the model."""
    numbers = [("AUC", f"{quantities.decimal(block['auc'])} {span(block['auc_ci95'])}".strip())]
    for rate, name in (("0.01", "found at 1 % false alarms"), ("0.001", "found at 0.1 % false alarms")):
        value, interval = block[f"tpr@fpr_{rate}"], block.get(f"tpr@fpr_{rate}_ci95")
        text = "not enough data" if value is None else f"{quantities.percent(value)} {span(interval, quantities.percent)}"
        numbers.append((name, text.strip()))
    unit = "patients" if kind == "patient" else "studies"
    sizes = f"{block['num_members']:,} members, {block['num_non_members']:,} non-members ({unit})"
    return Finding(TITLES[kind], TRIED[kind], tuple(numbers), sizes, tuple(attack_meaning(block)))


def attack_meaning(block: Values) -> list[str]:
    """What telling members from others means; the first sentence stands alone."""
    return _meaning(
        block,
        "A model that saw none of them tells the groups apart too (AUC {apart}): they differ by themselves, and what is found "
        "is not all memory.",
    )


def _meaning(block: Values, not_memory: str) -> list[str]:
    """Against guessing, and ``not_memory`` where the control (AUC ``apart``) tells the groups apart as well."""
    sentences = [_against_guessing(block)]
    if block["auc"] is not None and is_no_memory(block):
        sentences.append(not_memory.format(apart=quantities.decimal(block["control"]["auc"], 2)))
    return sentences


def _against_guessing(block: Values) -> str:
    if block["auc"] is None:
        return f"{_capital(not_enough(block))}."
    low, high = block["auc_ci95"] or (0.0, 1.0)
    if low > GUESSING:
        right = quantities.percent(block["auc"], 0)
        return f"Better than guessing: of a member and a non-member, it tells in {right} of cases which is the member."
    if high < GUESSING:
        return "Worse than guessing: the members are the harder ones to fill in, whatever the model remembers."
    return (
        "Not told apart from guessing; that it tells a member from a non-member in up to "
        f"{quantities.percent(high)} of cases (guessing: 50 %) is not excluded."
    )


def is_no_memory(block: Values) -> bool:
    """Whether the control tells the groups apart, so that they differ by themselves."""
    interval = block.get("control", {}).get("auc_ci95")
    return bool(interval) and not interval[0] <= GUESSING <= interval[1]


def are_other_pairs(relinked: Values) -> bool:
    """Whether a model that saw no pair tells the two kinds of pairs apart as well."""
    interval = relinked.get("control", {}).get("difference_r@1_ci95")
    return bool(interval) and not interval[0] <= 0 <= interval[1]


def relinkage(block: Values) -> Finding:
    """The attack that puts reports to images."""
    tried = "For the image of a patient, the model ranked reports; how much more often was the patient's own the first?"
    if block["difference_r@1"] is None:
        return Finding("Re-linkage", tried, (), "", (f"{_capital(not_enough(block))}.",))
    numbers = (
        ("training pairs", quantities.percent(block["members_r@1"])),
        ("other pairs", quantities.percent(block["non_members_r@1"])),
        ("difference", f"{points(block['difference_r@1'])} {span(block['difference_r@1_ci95'], points)} percentage points"),
    )
    sizes = f"{block['num_members']:,} and {block['num_non_members']:,} pairs, each among {block['gallery']:,}"
    return Finding("Re-linkage", tried, numbers, sizes, tuple(relinkage_meaning(block)))


def relinkage_meaning(block: Values) -> list[str]:
    """What it means; the first sentence stands alone."""
    if block["difference_r@1"] is None:
        return [f"{_capital(not_enough(block))}."]
    others, chance = quantities.percent(block["non_members_r@1"]), quantities.percent(block["chance"])
    ability = (
        f"Whoever holds the model and a pile of reports finds the report of an image it never saw in {others} of cases "
        f"(chance: {chance}); that is what retrieval is for, and a reason not to keep names on either side."
    )
    low, _ = block["difference_r@1_ci95"] or (0.0, 0.0)
    if low <= 0:
        return ["Training pairs are not found more often than others.", ability]
    if are_other_pairs(block):
        return ["More often for training pairs, but a model that saw none of them finds these more often too.", ability]
    return ["More often for training pairs: the model has learnt some of them by heart.", ability]


def epsilon(block: Values) -> Finding:
    """What the attack on patients proves."""
    tried = "From the attack on patients: which promise of differential privacy would this model break?"
    if block["lower_bound"] is None:
        return Finding("Bound of epsilon", tried, (), "", (f"{_capital(not_enough(block))}.",))
    numbers = (
        ("epsilon at least", quantities.decimal(block["lower_bound"], 2)),
        ("most that could be shown", quantities.decimal(block["largest_possible"], 2)),
        ("delta", f"{block['delta']:g}"),
        ("confidence", quantities.percent(block["confidence"], 0)),
    )
    sizes = (
        f"{block['true_positives']:,} of {block['num_members']:,} members and "
        f"{block['false_positives']:,} of {block['num_non_members']:,} non-members accused; the other half of the patients "
        "chose from which score on, since one chosen on the same patients would prove too much"
    )
    return Finding("Bound of epsilon", tried, numbers, sizes, tuple(epsilon_meaning(block)))


def epsilon_meaning(block: Values) -> list[str]:
    """What it means; the first sentence stands alone."""
    if block["lower_bound"] is None:
        return [f"{_capital(not_enough(block))}."]
    bound = block["lower_bound"]
    if bound <= 0:
        return ["No promise of differential privacy is contradicted; this does not show that one is kept."]
    return [
        f"An accounted epsilon below {quantities.decimal(bound, 2)} would be contradicted by this attack.",
        "Patients of one model are taken as independent trials here, which holds only nearly.",
    ]


def canaries(kind: str, block: Values) -> Finding:
    """The exposure of planted texts or pictures."""
    held = {times: f"held by {quantities.plural(int(times), 'patient')}" for times in block["by_times"]}
    numbers = [
        (held[times], f"{quantities.decimal(found['mean_exposure_bits'], 1)} bits")
        for times, found in block["by_times"].items()
    ]
    numbers += [
        ("where nothing is known", f"{quantities.decimal(block['chance_bits'], 1)} bits"),
        ("most that could be shown", f"{quantities.decimal(block['most_possible_bits'], 1)} bits"),
    ]
    if kind == "images":
        drawn = f"{block['psnr_db']:.1f} dB, others {block['candidates_psnr_db']:.1f} dB"
        numbers.append(("how closely drawn (PSNR)", drawn))
    sizes = f"{block['num_planted']:,} planted among {block['num_candidates']:,} never planted"
    return Finding(CANARIES[kind], TRIED_CANARIES[kind], tuple(numbers), sizes, (canary_meaning(block),))


def canary_meaning(block: Values) -> str:
    """What it means, in one sentence."""
    if not is_exposed(block):
        return "Not told apart from others that were drawn alike; a little memory may be missed with so few planted."
    if block["by_times"].get("1", {"p_value": 1.0})["p_value"] < ALPHA:
        return "Learnt by heart, even what a single patient held: so may be what sets one real patient apart."
    return "Learnt by heart where several patients held the same; what a single one held was not told apart."


def is_exposed(block: Values) -> bool:
    """Whether planted canaries are known better than chance explains."""
    return bool(block["all"]["p_value"] < ALPHA)


def update(blocks: Values) -> Finding:
    """Members of one update: every kind of data in one place."""
    numbers = [
        (TITLES[kind].lower(), f"AUC {quantities.decimal(blocks[kind]['auc'])} {span(blocks[kind]['auc_ci95'])}".strip())
        for kind in TITLES
        if kind in blocks and blocks[kind]["auc"] is not None
    ]
    tried = "The same attack on the model as a site sent it back, against the model as the site got it."
    whole = blocks["patient"]
    sizes = f"{whole['num_members']:,} members, {whole['num_non_members']:,} non-members (patients)"
    return Finding(UPDATE, tried, tuple(numbers), sizes, tuple(update_meaning(whole)))


def update_meaning(block: Values) -> list[str]:
    """What it means; the first sentence stands alone."""
    return _meaning(
        block,
        "The model before the update tells the groups apart already (AUC {apart}): rounds before it taught it some of these "
        "patients, or the groups differ by themselves.",
    )


def words(block: Values) -> Finding:
    """The words that an update gives away."""
    tried = "Which rows of the word table moved between the two models? Only words that were read have a reason to."
    numbers = (
        ("of the words used, found", quantities.percent(block["recall"])),
        ("of the words found, used", quantities.percent(block["precision"])),
        ("by guessing", quantities.percent(block["chance"])),
    )
    sizes = f"{block['num_recovered']:,} words found, {block['num_seen']:,} in the site's training reports"
    return Finding(WORDS, tried, numbers, sizes, (words_meaning(block),))


def words_meaning(block: Values) -> str:
    """What it means, in one sentence."""
    if not gives_words_away(block):
        return "The update does not tell better than guessing which words the site's reports use."
    return (
        "Whoever receives this update alone can list words that the site's reports use, rare ones too; a secure sum, frozen "
        "word embeddings or differential privacy hides them."
    )


def gives_words_away(block: Values) -> bool:
    """Whether the words found are the site's more often than chance explains."""
    return bool(block["p_value"] < ALPHA)


def not_enough(block: Values) -> str:
    """Why a block holds no number."""
    return str(block["reason"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def points(value: float | None) -> str:
    """A difference of shares in percentage points."""
    return quantities.DASH if value is None else quantities.signed(100 * value, 1)


def span(interval: list[float] | None, show: Any = quantities.decimal) -> str:
    """An interval in brackets, or nothing."""
    if interval is None:
        return ""
    low, high = map(show, interval)
    return f"({low} to {high})"
