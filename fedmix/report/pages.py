"""How every page here is made: jinja2 with autoescape, templates of this package, an unknown name is an error."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined


def environment() -> Environment:
    """The templates, and the filter ``unbroken``."""
    loader = PackageLoader("fedmix.report")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["unbroken"] = _unbroken
    return made


def _unbroken(text: str) -> str:
    """Text in which no number is parted from its unit at the end of a line."""
    return re.sub(r"(?<=\d) (?=(?:dB|[kMGT]?B|s|min|h)\b|%)", "\N{NO-BREAK SPACE}", text)
