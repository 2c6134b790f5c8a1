"""A report's sections: what was found, what it means, why it was asked for, what it was compared with.

A heading is a line's first words in capitals before a colon ("FINDINGS:"), as MIMIC-CXR and most hospital systems write
them, or one of the known names in any case ("Impression:"), in English or Spanish. Reports that lost their line breaks in an
export are read as well: there only known names in capitals are headings. Misspelt names ("IMPRESSOIN") are recognised by
their likeness. What a study is called ("CHEST, TWO VIEWS:") heads its findings. Addenda, which MIMIC-CXR puts on top above a
line of underscores, become a section of their own, so that the report below keeps its own headings; "___" within a line is
a mark of de-identification and stays.

After the rules of MIMIC-CXR's own section parser (Johnson et al. 2019, Scientific Data 6:317, and its repository), except for
its hand-made lists of single studies: where a report has neither findings nor impression, its last paragraph is taken.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from fedmix.errors import DataError

SECTIONS = ("findings", "impression", "indication", "comparison", "technique", "addendum", "other")
DEFAULT_SECTIONS = ("findings", "impression")
WHOLE = "whole"  # instead of a list of sections: the text as it stands

_NAMES = {
    "findings": ("findings", "finding", "hallazgos", "radiographic findings"),
    "impression": (
        *("impression", "conclusion", "conclusions", "findings and impression", "findings/impression", "opinion", "summary"),
        *("impresion", "impresión", "impresión diagnóstica", "impresion diagnostica", "conclusión", "conclusiones"),
    ),
    "indication": (
        *("indication", "clinical indication", "reason for exam", "reason for examination", "reason for study", "history"),
        *("clinical history", "clinical information", "patient history", "indicación", "indicacion", "motivo"),
        *("datos clínicos", "datos clinicos", "información clínica", "informacion clinica"),
    ),
    "comparison": (
        *("comparison", "comparisons", "comparison exam", "comparison film", "reference exam"),
        *("comparación", "comparacion", "estudio previo", "estudios previos"),
    ),
    "technique": ("technique", "procedure", "exam", "examination", "type of examination", "técnica", "tecnica", "exploración"),
    "addendum": ("addendum", "addenda", "adenda"),
    "other": (
        *("recommendation", "recommendations", "recommendation(s)", "notification", "comment", "comments", "wet read"),
        *("date", "final report", "note", "attending", "signed"),
    ),
}
_SECTION_OF = {name: section for section, names in _NAMES.items() for name in names}
_LIKENESS = 0.85  # "mpression" and "finidngs" pass, "infection" for "indication" does not
_SPELT = tuple(name for name in _SECTION_OF if len(name) >= 8)
_STUDY_NAME = re.compile(
    r"chest|thorax|tórax|portable|radiograph|ribs"
    r"|\b(?:one|two|1|2) views?\b|\b(?:pa|ap|lateral|frontal) (?:view|and|upright)"
)

_RULE = re.compile(r"^[ \t]*_{5,}[ \t]*$", re.MULTILINE)
_KNOWN = "|".join(sorted(map(re.escape, _SECTION_OF), key=len, reverse=True))
_LINE_HEADING = re.compile(
    rf"^[ \t]*(?:(?P<capitals>[A-ZÁÉÍÓÚÑ][A-ZÁÉÍÓÚÑ0-9 ()/,&-]{{1,60}})|(?P<known>(?i:{_KNOWN}))):(?=\s|$)", re.MULTILINE
)
_INNER_HEADING = re.compile(rf"(?:^|(?<=[.\s]))(?P<known>{_KNOWN.upper()}):(?=\s|$)")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


def sections_of(text: str) -> dict[str, str]:
    """The sections of a plain text by name, in the order of their first appearance; {} where there is no heading at all.

    Sections that come twice are joined; empty ones are left out. What stands before the first heading is "other".
    """
    *addenda, body = [part for part in _RULE.split(text) if part.strip()] or [""]
    found: dict[str, list[str]] = {}
    for part in addenda:
        name = "addendum" if re.search(r"\baddend|\badenda", part, re.IGNORECASE) else "other"
        found.setdefault(name, []).append(part)
    headed = _headed(body)
    if not headed and not any(name == "addendum" for name in found):
        return {}
    for name, content in headed or [("other", body)]:
        found.setdefault(name, []).append(content)
    return {name: joined for name, parts in found.items() if (joined := "\n".join(part for part in parts if part.strip()))}


def pick(report: str | Mapping[str, str], wanted: Sequence[str]) -> str:
    """The wanted sections one after the other, in the order asked for; a text without any heading comes whole.

    ``report``: a plain text, or its sections where the data set keeps them apart. Where findings or impression are wanted
    and a plain text has neither, its last paragraph stands for them: that is where a radiologist writes them.
    """
    check_wanted(wanted)
    if WHOLE in wanted:
        return report if isinstance(report, str) else "\n".join(report.values())
    sections = sections_of(report) if isinstance(report, str) else report
    if isinstance(report, str) and not sections:
        return _RULE.sub("", report)
    chosen = [sections[name] for name in wanted if name in sections]
    if not chosen and isinstance(report, str) and set(wanted) & set(DEFAULT_SECTIONS):
        chosen = _last_paragraph(list(sections.values())[-1])
    return "\n".join(chosen)


def check_wanted(wanted: Sequence[str]) -> None:
    """Raise ``DataError`` for a list of sections that cannot be had."""
    unknown = [name for name in wanted if name not in (*SECTIONS, WHOLE)]
    if unknown or not wanted:
        named = f"no section is called {unknown[0]!r}" if unknown else "no section is asked for"
        raise DataError(f"{named}; choose from {', '.join(SECTIONS)}, or {WHOLE}")


def _headed(body: str) -> list[tuple[str, str]]:
    """(section, content) pairs of the report without its addenda."""
    headings = [(match, name) for match in _headings(body) if (name := _section(match))]
    if not headings:
        return []
    ends = [*(match.start() for match, _ in headings[1:]), len(body)]
    pairs = [(name, body[match.end() : end]) for (match, name), end in zip(headings, ends, strict=True)]
    before = body[: headings[0][0].start()]
    return [("other", before), *pairs] if before.strip() else pairs


def _headings(body: str) -> list[re.Match[str]]:
    """Everything that looks like a heading, at the start of a line or, in capitals, within one."""
    found = {match.end(): match for pattern in (_INNER_HEADING, _LINE_HEADING) for match in pattern.finditer(body)}
    return sorted(found.values(), key=lambda match: match.start())


def _section(match: re.Match[str]) -> str:
    """Which section a heading opens; "" for capitals that are none of them ("BP: 120/80")."""
    name = " ".join(match[0].split(":")[0].lower().split())
    if name in _SECTION_OF:
        return _SECTION_OF[name]
    like = difflib.get_close_matches(name, _SPELT, n=1, cutoff=_LIKENESS)
    if like:
        return _SECTION_OF[like[0]]
    for section in ("impression", "findings", "comparison", "addendum"):
        if section in name:
            return section
    if "history" in name or "indication" in name:
        return "indication"
    return "findings" if _STUDY_NAME.search(name) else ""


def _last_paragraph(text: str) -> list[str]:
    paragraphs = [part for part in _PARAGRAPH.split(text) if part.strip()]
    return paragraphs[-1:]
