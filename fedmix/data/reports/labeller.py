"""Which findings a report says are there: a rule labeller with negation and uncertainty, for English chest reports.

After NegEx (Chapman et al. 2001) and CheXpert's labeller (1901.07031), much smaller: a finding's words, and within the same
clause a cue before or after them that denies or doubts it, or that makes them a question ("rule out pneumonia") or a memory
("history of effusion"). What is not said counts as what is denied: not there. So does what the rules do not know.

It reads what the model reads, also words that a tokenizer has set apart: lower case, "no effusion ." and reports cut short.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SAID, DOUBTED, NOT_SAID = 1.0, 0.5, 0.0

_HEART = r"(?:heart|cardiac silhouette|cardiomediastinal silhouette|cardiac contours?)"
_LARGE = r"(?:enlarged|prominent|increased in size)"
# Finding -> what says it. Sides, sizes and places are left to the model: public labels have none.
PHRASES: dict[str, str] = {
    "cardiomegaly": rf"cardiomegaly|enlargement of the {_HEART}|{_LARGE} {_HEART}|{_HEART}(?: size)? (?:\w+ ){{0,3}}?{_LARGE}"
    r"|cardiac enlargement",
    "effusion": r"effusions?|pleural fluid|blunting of the (?:\w+ ){0,2}costophrenic angles?|hydrothorax",
    "pneumothorax": r"(?:hydro)?pneumothora(?:x|ces)",
    "consolidation": r"consolidations?|air ?space (?:opacity|opacities|disease)|infiltrat(?:es?|ions?)|pneumonias?"
    r"|(?:focal|patchy|lung|lobar) (?:\w+ ){0,2}?opacit(?:y|ies)",
    "atelectasis": r"atelecta(?:sis|ses|tic)|(?:lobar|lung) collapse",
    "nodule": r"nodules?|nodular opacit(?:y|ies)|mass(?:es)?|rounded densit(?:y|ies)|lung lesions?",
    "edema": r"o?edema|(?:pulmonary )?vascular congestion|kerley(?: b)? lines",
    "fracture": r"fractures?|fractured",
    "pacemaker": r"pacemakers?|cardiac device|icd|defibrillator|implanted device",
    "tube": r"(?:endotracheal|et|tracheostomy|nasogastric|enteric|feeding|chest) tubes?|lines or tubes|picc(?: line)?"
    r"|central (?:venous )?(?:catheter|line)",
}
FINDINGS: tuple[str, ...] = tuple(PHRASES)

# "No effusion, mild cardiomegaly" says two things; "no consolidation, large effusion or oedema" denies three.
_DEGREE = r"(?:mild|mildly|moderate|severe|small|tiny|minimal|slight|stable|there is|there are)"
_CLAUSE = re.compile(rf"[.;:!?\n]+|\b(?:but|however|although|though|except|aside from|apart from)\b|,\s*(?={_DEGREE}\b)")

# Cues before a finding, anywhere in its clause.
_UNDECIDED = re.compile(r"\b(?:cannot|can not|not) (?:be )?(?:exclude|excluded|rule out|ruled out)\b")
_DENIED = re.compile(
    r"\bno\b(?! (?:significant |interval )*change)|\bnot\b(?! (?:significantly )?changed)"
    r"|\b(?:without|negative for|free of|clear of|absence of|resolution of|resolved|rather than)\b"
)
_NOT_OF_NOW = re.compile(r"\b(?:rule out|evaluate for|evaluation (?:of|for)|assess for|history of)\b")
_DOUBTED = re.compile(
    r"\b(?:possible|possibly|probable|probably|likely|suspected|may|might|could|questionable|suspicious for|concerning for"
    r"|suggest(?:s|ing|ive of)?|versus|vs)\b"
)
# Cues after it, at most three words on.
_NEAR = r"^(?:\W*\w+){0,3}?\W*\b"
_DENIED_AFTER = re.compile(
    rf"{_NEAR}(?:(?:is|are|was|were|has|have) (?:not|absent|resolved|been excluded)|not seen|resolved|absent)\b"
)
_DOUBTED_AFTER = re.compile(
    rf"{_NEAR}(?:(?:cannot|can not|not) be (?:excluded|ruled out)|(?:is|are) (?:possible|suspected|unlikely))\b"
)
_PATTERNS = {finding: re.compile(rf"\b(?:{phrase})\b") for finding, phrase in PHRASES.items()}


def read(report: str) -> list[float]:
    """SAID, DOUBTED or NOT_SAID for each of FINDINGS: the strongest that any clause of the report says."""
    found = dict.fromkeys(FINDINGS, NOT_SAID)
    for finding, before, after in _mentions(report):
        found[finding] = max(found[finding], _standing(before, after))
    return list(found.values())


def denied(report: str) -> list[bool]:
    """For each of FINDINGS whether some clause says in so many words that it is not there; silence denies nothing."""
    found = dict.fromkeys(FINDINGS, False)
    for finding, before, after in _mentions(report):
        found[finding] |= _standing(before, after) == NOT_SAID and not _NOT_OF_NOW.search(before)
    return list(found.values())


def _mentions(report: str) -> Iterator[tuple[str, str, str]]:
    """Every place where a finding is named: the finding, its clause up to its end, and the rest of the clause."""
    for clause in _CLAUSE.split(report.lower()):
        for finding, pattern in _PATTERNS.items():
            for match in pattern.finditer(clause):
                # Up to its end, for a cue may stand among its words: "the heart is not enlarged".
                yield finding, clause[: match.end()], clause[match.end() :]


def _standing(before: str, after: str) -> float:
    """How a finding stands between these words of its clause."""
    if _UNDECIDED.search(before) or _DOUBTED_AFTER.search(after):
        return DOUBTED
    if _DENIED.search(before) or _NOT_OF_NOW.search(before) or _DENIED_AFTER.search(after):
        return NOT_SAID
    return DOUBTED if _DOUBTED.search(before) else SAID
