"""Names of languages: the tags of BCP 47 (RFC 5646), as far as a report's language needs them."""

from __future__ import annotations

import re

_TAG = re.compile(r"([a-z]{2,3})(?:[-_]([a-z]{4}))?(?:[-_]([a-z]{2}|\d{3}))?")


def language(cell: str) -> str:
    """A cell that names language, and perhaps script and region, in the usual case ("pt-BR"); "" for anything else.

    Cells are free text too, which must not become metadata.
    """
    found = _TAG.fullmatch(cell.strip().lower())
    if found is None:
        return ""
    spoken, script, region = found.groups(default="")
    return "-".join(part for part in (spoken, script.title(), region.upper()) if part)
