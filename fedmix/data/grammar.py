"""Reports of invented studies, sentence by sentence, from a small grammar with synonyms, negation, hedges and history.

A report says every finding that is present, with side, severity and place, and never says one that is absent; what is
absent may be negated. Indications name diseases that the film need not show ("rule out pneumonia"): they are there to be
ignored. Severity words never overlap between levels, so that a report carries its facts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from fedmix.data.findings import COLUMN, ZONES, Findings
from fedmix.data.looks import Phrasing

_SIZES = (("small", "tiny", "trace"), ("moderate", "medium sized"), ("large", "massive"))
_DEGREES = (("mild", "slight", "minimal"), ("moderate",), ("severe", "marked"))
_MANNERS = (("mildly", "slightly", "minimally"), ("moderately",), ("severely", "markedly"))
_HEDGES = ("possible", "probable", "likely", "suspected")
_PLACES = (
    ("right upper lobe", "right upper zone", "right apex"),
    ("right middle lobe", "right mid zone", "right perihilar region"),
    ("right lower lobe", "right base", "right lower zone"),
    ("left upper lobe", "left upper zone", "left apex"),
    ("lingula", "left mid zone", "left perihilar region"),
    ("left lower lobe", "left base", "left lower zone"),
)
_TUBE_TIPS = (
    ("endotracheal tube tip is high", "the et tube is too high and should be advanced"),
    ("endotracheal tube is well positioned", "et tube tip in satisfactory position above the carina"),
    ("endotracheal tube tip is low", "the et tube is too low near the carina and should be withdrawn"),
)

_INDICATIONS = (
    "history of cough", "fever", "shortness of breath", "chest pain", "pre operative evaluation", "status post fall",
    "known heart failure", "rule out pneumonia", "line placement", "weight loss", "dyspnea on exertion",
    "evaluate for pneumothorax", "history of effusion", "altered mental status",
)  # fmt: skip
_FIRST_FILM = ("no prior for comparison", "no prior studies available", "comparison none")
_LATER_FILM = ("compared with prior study", "comparison with the previous radiograph", "prior chest radiograph is available")
_BONES = (
    "bony structures are intact", "no acute osseous abnormality", "degenerative changes of the spine",
    "osseous structures are unremarkable",
)  # fmt: skip
_NORMAL = ("no acute cardiopulmonary disease", "normal chest", "unremarkable study", "no acute abnormality")

# Label, or pair of labels that one sentence denies together -> how to deny it.
NEGATIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("cardiomegaly",): (
        "heart size is normal", "normal cardiac silhouette", "no cardiomegaly", "cardiomediastinal contours are normal"),
    ("effusion_right", "effusion_left"): ("no pleural effusion", "costophrenic angles are sharp", "no effusion"),
    ("pneumothorax_right", "pneumothorax_left"): ("no pneumothorax", "no evidence of pneumothorax"),
    ("consolidation",): ("lungs are clear of consolidation", "no focal consolidation", "no airspace opacity", "no infiltrate"),
    ("nodule",): ("no nodule", "no suspicious mass"),
    ("edema",): ("no edema", "pulmonary vascularity is normal", "no pulmonary vascular congestion"),
    ("pacemaker",): ("no implanted device", "no pacemaker"),
    ("tube",): ("no endotracheal tube", "no lines or tubes"),
}  # fmt: skip
_NEGATION_FACTOR = {"nodule": 0.5, "pacemaker": 0.15, "tube": 0.2}  # what is rarely looked for is rarely denied
_ONE_SIDE_CLEAR = {
    "effusion": ("no {side} pleural effusion", "the {side} costophrenic angle is sharp"),
    "pneumothorax": ("no {side} pneumothorax", "no pneumothorax on the {side}"),
}


def affirmations(label: str, severity: int, side_or_zone: str = "") -> tuple[str, ...]:
    """Sentence patterns that say a finding; ``{size}``, ``{degree}``, ``{manner}``, ``{place}`` are still open."""
    if label == "tube":
        return _TUBE_TIPS[severity]
    return tuple(pattern.replace("{side}", side_or_zone) for pattern in _AFFIRMATIONS[label])


_AFFIRMATIONS: dict[str, tuple[str, ...]] = {
    "cardiomegaly": (
        "{degree} cardiomegaly", "the heart is {manner} enlarged", "{degree} enlargement of the cardiac silhouette",
        "{manner} enlarged cardiomediastinal silhouette"),
    "effusion": (
        "{size} {side} pleural effusion", "{size} amount of pleural fluid on the {side}",
        "blunting of the {side} costophrenic angle by a {size} effusion"),
    "effusion both": ("{size} bilateral pleural effusions", "{size} amount of bilateral pleural fluid"),
    "pneumothorax": (
        "{size} {side} pneumothorax", "{size} {side} apical pneumothorax with visible pleural line",
        "{side} pneumothorax {size} in size"),
    "consolidation": (
        "{degree} consolidation in the {place}", "{degree} airspace opacity at the {place}",
        "{degree} {place} infiltrate concerning for pneumonia", "focal {degree} opacity in the {place}"),
    "nodule": (
        "{size} nodule in the {side} lung", "{size} rounded density in the {side} lung", "nodular opacity {size} {side} zone"),
    "edema": (
        "{degree} interstitial edema", "{degree} pulmonary vascular congestion with kerley lines",
        "{degree} bilateral perihilar haze consistent with edema"),
    "pacemaker": (
        "left chest wall pacemaker with lead in place", "pacemaker is noted",
        "cardiac device with lead over the right ventricle"),
}  # fmt: skip


class Reporter:
    """One radiologist at one hospital: turns the facts of a study into sentences, drawing words from ``rng``."""

    def __init__(self, phrasing: Phrasing, rng: random.Random) -> None:
        self._habits = phrasing
        self._rng = rng

    def write(self, findings: Findings, row: int, is_later_film: bool) -> str:
        """Write the report of study ``row``."""
        draw, habits = self._rng.random, self._habits
        present = {label for label, column in COLUMN.items() if findings.present[row, column]}
        positive, negative = list(self._affirm(findings, row, present)), list(self._deny(present))
        opening = [self._pick(_INDICATIONS)] if draw() < habits.history_rate else []
        if draw() < 0.4:
            opening.append(self._pick(_LATER_FILM if is_later_film else _FIRST_FILM))
        closing = []
        if not positive and (draw() < 0.7 or not (opening or negative)):  # no report is empty
            closing.append(self._pick(_NORMAL))
        elif positive and draw() < 0.25:
            closing.append("impression " + positive[int(draw() * len(positive))])
        return " ".join(f"{text[0].upper()}{text[1:]}." for text in (*opening, *self._ordered(positive, negative), *closing))

    def _pick(self, options: Sequence[str]) -> str:
        """Half the time this hospital's own wording, otherwise any."""
        draw = self._rng.random()
        if draw < 0.5:
            return options[self._habits.dialect % len(options)]
        return options[int((2 * draw - 1) * len(options))]

    def _ordered(self, positive: list[str], negative: list[str]) -> list[str]:
        self._rng.shuffle(positive)
        self._rng.shuffle(negative)
        if self._habits.order == "positive first":
            return positive + negative
        if self._habits.order == "negative first":
            return negative + positive
        mixed = positive + negative
        self._rng.shuffle(mixed)
        return mixed

    def _say(self, label: str, severity: int, side: str = "", place: str = "") -> str:
        text = self._pick(affirmations(label, severity, side))
        for gap, words in (("{size}", _SIZES), ("{degree}", _DEGREES), ("{manner}", _MANNERS)):
            if gap in text:
                text = text.replace(gap, self._pick(words[severity]))
        return text.replace("{place}", place)

    def _hedged(self, text: str) -> str:
        return f"{self._pick(_HEDGES)} {text}" if self._rng.random() < self._habits.hedge_rate else text

    def _affirm(self, findings: Findings, row: int, present: set[str]) -> Iterator[str]:
        severity = {label: int(findings.severity[row, COLUMN[label]]) for label in present}
        both = {"effusion_right", "effusion_left"} <= present and severity["effusion_right"] == severity["effusion_left"]
        if both:
            yield self._hedged(self._say("effusion both", severity["effusion_right"]))
        for label in COLUMN:
            if label not in present or (both and label.startswith("effusion")):
                continue
            kind, _, side = label.partition("_")
            if label == "consolidation":
                place = self._pick(_PLACES[findings.consolidation_zone[row]])
                yield self._hedged(self._say(label, severity[label], place=place))
            elif label == "nodule":
                yield self._hedged(self._say(label, severity[label], ZONES[findings.nodule_zone[row]]))
            elif side or label == "edema":
                yield self._hedged(self._say(kind, severity[label], side))
            else:
                yield self._say(label, severity[label])

    def _deny(self, present: set[str]) -> Iterator[str]:
        draw, rate = self._rng.random, self._habits.negation_rate
        for labels, options in NEGATIONS.items():
            if present.isdisjoint(labels):
                if draw() < rate * _NEGATION_FACTOR.get(labels[0], 1.0):
                    yield self._pick(options)
            elif len(labels) == 2 and not present.issuperset(labels) and draw() < 0.4 * rate:
                kind = labels[0].partition("_")[0]
                yield self._pick(_ONE_SIDE_CLEAR[kind]).replace("{side}", "left" if labels[0] in present else "right")
        if draw() < 0.4:
            yield self._pick(_BONES)


def _prompts(label: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    kind, _, side = label.partition("_")
    if label == "nodule":
        patterns = [text for zone in ZONES for text in affirmations(label, 1, zone)[:2]]
    elif label == "consolidation":
        patterns = [text.replace("{place}", names[0]) for names in _PLACES for text in affirmations(label, 1)[:2]]
    elif label == "tube":
        patterns = [text for tips in _TUBE_TIPS for text in tips]
    else:
        patterns = list(affirmations(kind, 1, side))
    words = {"{size}": "moderate", "{degree}": "moderate", "{manner}": "moderately"}
    for gap, word in words.items():
        patterns = [text.replace(gap, word) for text in patterns]
    denials = next(options for labels, options in NEGATIONS.items() if label in labels)
    sentences = [tuple(f"{text[0].upper()}{text[1:]}." for text in texts) for texts in (patterns, denials)]
    return sentences[0], sentences[1]


# Label -> (sentences that say it, sentences that deny it), for zero-shot classification.
PROMPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {label: _prompts(label) for label in COLUMN}
