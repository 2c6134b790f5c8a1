"""The gate for texts: does a report still say who, when or how to reach somebody?

Patterns, not understanding: they find dates, telephone numbers, e-mail and web addresses, record numbers, and names that
follow a title or a heading, in English and Spanish, in part in German and French. They do not find a bare name, so a text
that passes is not proven to be free of them. Marks of earlier de-identification ("___", "XXXX", "[**...**]") are no finding,
ages and years alone are none either (HIPAA Safe Harbor, 45 CFR 164.514(b)(2), names what is).

Nothing here returns, raises or logs a piece of text: only which kinds were found.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Policy = Literal["quarantine", "count"]
POLICIES: tuple[Policy, ...] = ("quarantine", "count")
KINDS = ("phi_date", "phi_phone", "phi_email", "phi_record", "phi_name")  # also the reason codes

_MONTHS = "|".join(
    (
        "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?",
        "nov(?:ember)?|dec(?:ember)?|enero|febrero|marzo|abril|mayo|junio|julio|agosto|septiembre|setiembre|octubre",
        "noviembre|diciembre|januar|februar|märz|juni|juli|oktober|dezember|janvier|février|mars|avril|juin|juillet|août",
        "septembre|octobre|novembre|décembre",
    )
)
_DAY, _MONTH, _YEAR = r"(?:0?[1-9]|[12]\d|3[01])", r"(?:0?[1-9]|1[0-2])", r"(?:(?:19|20)\d\d|\d\d)"
_DATES = (
    rf"\b(?:{_DAY}([/.-]){_MONTH}\1|{_MONTH}([/.-]){_DAY}\2){_YEAR}\b(?!\.?\d)",
    rf"\b(?:19|20)\d\d([/.-]){_MONTH}\1{_DAY}\b|\b(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\b",
    rf"\b{_DAY}(?:st|nd|rd|th|\.)?[ -](?:of |de |del )?(?:{_MONTHS})\b",
    rf"\b(?:{_MONTHS})\.? {_DAY}(?:st|nd|rd|th)?\b(?![.,]?\d)",
    rf"\b(?:{_MONTHS})\.?,? (?:of |de |del )?(?:19|20)\d\d\b",
    r"\b\d{1,2}(?:st|nd|rd|th)? (?:of )?(?-i:May|MAY)\b|\b(?-i:May|MAY) \d{1,2}\b",  # "3 may represent" is no date
    r"\bmay (?:\d{1,2}(?:st|nd|rd|th)?,? )?(?:19|20)\d\d\b",
    rf"\b(?:on|dated|since|from|fecha|el|del|vom|am|du|le) {_DAY}/{_DAY}\b(?!/)",
)
_PHONES = (
    r"(?<![\d.])\(?\d{3}\)?[ .-]{1,2}\d{3}[ .-]\d{4}\b",  # 555-123-4567
    r"(?<![\d.])[6-9]\d{2}[ .-]?\d{3}[ .-]?\d{3}(?![\d.])|(?<![\d.])[89]\d[ .-]\d{3}[ .-]\d{2}[ .-]\d{2}\b",  # Spain
    r"\+\d{1,3}[ .()-]{0,2}\d[\d .()-]{6,16}\d\b",
    r"\b(?:tel|tfno|phone|telephone|teléfono|telefono|móvil|movil|fax|pager|beeper|bleep|busca|ext|extension|extensión)\b"
    r"[ .:#-]{0,4}(?:at |number |no\.? ?)?\d[\d .-]{2,}",
    r"\bx\d{4,5}\b",
)
_EMAILS = (r"[\w.+-]{1,64}@[\w-]{1,63}\.[\w.-]{1,63}", r"\bhttps?://\S", r"\bwww\.\w")
_RECORDS = (
    r"\b(?:mrn|medical record|record (?:number|no)|accession(?: (?:number|no))?|patient id|case (?:number|no)"
    r"|ssn|nhs(?: (?:number|no))?|nhc|nuhsa|cip|dni|nie|historia(?: clínica| clinica)?|expediente|episodio|fallnummer)\b"
    r"[ .:#nº°o-]{0,6}[a-z]{0,3}-?\d[\da-z-]{2,}",
    r"\bacc(?:ession)? ?#[ :]{0,2}\d{3,}",
    r"(?<![\d.])\d{3}-\d{2}-\d{4}\b",
    r"(?<![\d.,])\d{7,}(?![.,]?\d)",
    r"\b\d{8}-?[a-z]\b|\b[xyz]-?\d{7}-?[a-z]\b",  # DNI and NIE
    r"\b[12]\.\d{1,6}(?:\.\d{1,39}){4,}",  # a DICOM UID
)
# A word after a title that is no de-identification mark. "MR" and "DR" are also magnetic resonance and digital radiography,
# and "MS" a disease: in capitals these need their full stop.
_NAME = r"(?!X{2,}\b)[A-ZÀ-Þ][\w'\u2019-]+"
_NAMES = (
    rf"\b(?:Dr|Drs|Dra|Prof|Mr|Mrs|Ms|Miss|Sr|Sra|Srta|Hr|Mme|Mlle|Dña)\.? {{0,2}}{_NAME}",
    rf"\b(?:DR|DRS|DRA|PROF|MR|MRS|MS|SR|SRA)\. {{0,2}}{_NAME}",
    rf"\b(?:Doctor|Doctora|Professor|Don|Doña|Señora|Señor|Herr|Frau|Monsieur|Madame|Docteur) {_NAME}",
    r"\b(?:dr|drs|dra|prof|sr|sra|srta|dña)\.? (?!(?i:x{2,})\b)(?!(?:y|and|for|of|on|at|by|or|to|was|is)\b)"
    r"[^\W\d_][\w'\u2019-]{2,}",
    rf"\b(?i:(?:dictated|signed|reported|read|verified|approved|interpreted|firmado|informado|dictado|validado) (?:by|por))"
    rf"[: ]{{1,3}}{_NAME}",
    rf"\b(?i:(?:patient|patient'?s? name|name|surname|nombre|apellidos?|paciente)) ?: ?{_NAME}",
    rf"\b(?:Drs?|Dra)\.? (?:[A-Z]\.? ){{1,3}}{_NAME}",
)


def _any(patterns: tuple[str, ...], flags: int = 0) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(pattern, flags) for pattern in patterns)


_PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    "phi_date": _any(_DATES, re.IGNORECASE),
    "phi_phone": _any(_PHONES, re.IGNORECASE),
    "phi_email": _any(_EMAILS, re.IGNORECASE),
    "phi_record": _any(_RECORDS, re.IGNORECASE),
    "phi_name": _any(_NAMES),
}
_MARKS = re.compile(r"\[\*\*[^\]]{0,80}\*\*\]|_{2,}")  # kept as a gap, so that no pattern reaches over them


def kinds(text: str) -> tuple[str, ...]:
    """Which of ``KINDS`` a text holds, each once, in their order."""
    folded = _MARKS.sub(" \x00 ", unicodedata.normalize("NFKC", text))
    return tuple(kind for kind, patterns in _PATTERNS.items() if any(pattern.search(folded) for pattern in patterns))
