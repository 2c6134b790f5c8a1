"""The table a user sees once, before the first round."""

from __future__ import annotations

import math

import tiny
from rich.console import Console

from fedmix.model.pretrained import Entry, LoadReport
from fedmix.report.warm_start import warm_start_table


def shown(report: LoadReport, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(warm_start_table(report))
    return capture.get()


def entries() -> tuple[Entry, ...]:
    """A base-sized model's names with a long shape that was fitted."""
    found = [Entry(name, "loaded", tuple(value.shape), None, 0) for name, value in tiny.model().named_parameters()]
    return (
        *(
            Entry(one.name, "new", one.shape, None, math.prod(one.shape))
            if one.name.startswith(("blocks.1.", "word_head"))
            else one
            for one in found
        ),
        Entry("embed_text.word.weight", "resampled", (30522, 768), (28996, 768), 768),
    )


def test_table_fits_eighty_columns_and_cuts_nothing() -> None:
    text = shown(LoadReport(entries(), ("a note",)))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "28996x768 > 30522x768" in text
    assert "blocks.attention_norm.image" in text
    assert "- a note" in text


def test_rows_add_up_to_every_parameter() -> None:
    report = LoadReport(entries(), ())
    rows = [line.split() for line in shown(report).splitlines()]
    counts = {state: [int(row[2]) for row in rows if row[1:2] == [state]] for state in ("loaded", "resampled", "new")}
    for state, (*parts, total) in counts.items():
        assert sum(parts) == total == report.count(state)[0]  # type: ignore[arg-type]


def test_blocks_taken_and_not_taken_are_two_rows() -> None:
    rows = [line.split()[:3] for line in shown(LoadReport(entries(), ())).splitlines()]
    assert ["blocks.attention", "loaded", "4"] in rows
    assert ["blocks.attention", "new", "4"] in rows
