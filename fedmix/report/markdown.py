"""Markdown that holds words of others: a name cannot leave its cell, become markup or load a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence


def text(words: str) -> str:
    """Words on one line, shown as they are."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", words.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.split())


def row(cells: Sequence[str]) -> str:
    """A row of a table, of cells that are Markdown already."""
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int = 1) -> str:
    """A table of plain words; from column ``num_words`` on they are numbers, set to the right."""
    rule = ["---" if column < num_words else "---:" for column in range(len(head))]
    return "\n".join([row(list(map(text, head))), row(rule), *(row(list(map(text, cells))) for cells in rows)]) + "\n"


def items(sentences: Sequence[str]) -> str:
    """A list of plain sentences."""
    return "".join(f"- {text(sentence)}\n" for sentence in sentences)
