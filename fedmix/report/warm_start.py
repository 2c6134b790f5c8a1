"""The table of what a warm start took from its files: parameters that share a place and a fate are one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmix.model.pretrained import Entry, LoadReport, State

STATES: tuple[State, ...] = ("loaded", "resampled", "new")
COLOURS = {"loaded": "green", "resampled": "yellow", "new": "dim"}
DEEPEST = {"embed_image": 2, "embed_text": 2, "norm": 2}  # names kept of a path; of decoder and heads one


def warm_start_table(report: LoadReport) -> RenderableType:
    """Rows of parts, the totals of each state below them, and the notes; fits a terminal of 80 columns."""
    table = Table("part", "state", title="warm start", box=None, padding=(0, 1))
    for heading in ("tensors", "values"):
        table.add_column(heading, justify="right")
    table.add_column("shape, > ours", overflow="fold")
    for (part, state), entries in _grouped(report.entries).items():
        num_values = sum(entry.num_new if state == "new" else entry.num_taken for entry in entries)
        shape = _shapes(entries[0]) if len(entries) == 1 else ""
        table.add_row(part, Text(state, COLOURS[state]), str(len(entries)), _short(num_values), shape)
    table.add_section()
    for state in STATES:
        num_tensors, num_values = report.count(state)
        table.add_row("all", Text(state, COLOURS[state]), str(num_tensors), _short(num_values), "")
    return Group(table, *(Text(f"- {note}") for note in report.notes))


def _grouped(entries: Iterable[Entry]) -> dict[tuple[str, State], list[Entry]]:
    """Entries by part and state, in the model's order; a block's number is no part, so blocks taken and not are two rows."""
    found: dict[tuple[str, State], list[Entry]] = {}
    for entry in entries:
        found.setdefault((_part(entry.name), entry.state), []).append(entry)
    return found


def _part(name: str) -> str:
    """``blocks.3.mlp.image.fc1.weight`` -> ``blocks.mlp.image``; ``blocks.3.attention.qkv.bias`` -> ``blocks.attention``."""
    first, *rest = name.split(".")[:-1]
    if first == "blocks":
        return ".".join([first, *_without_inside(rest[1:])])
    return ".".join([first, *rest][: DEEPEST.get(first, 1)])


def _without_inside(words: Sequence[str]) -> Sequence[str]:
    return words[:1] if words[0] == "attention" else words[:2]


def _shapes(entry: Entry) -> str:
    own = "x".join(str(size) for size in entry.shape)
    return own if entry.resampled_from is None else f"{'x'.join(str(size) for size in entry.resampled_from)} > {own}"


def _short(number: int) -> str:
    """At most six characters: 999, 12.3k, 85.1M."""
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.1f}{name}"
    return str(number)
