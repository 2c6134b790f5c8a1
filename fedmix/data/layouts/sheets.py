"""Reading CSV files that others wrote: plain or gzip, with rows that are broken, in encodings nobody declared.

Bytes that are not UTF-8 travel as surrogates, so that one odd row is decoded or refused by itself.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmix.errors import DataError


def reading(path: Path) -> Any:
    """Open a CSV file as text; ``.gz`` is unpacked on the way."""
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    return gzip.open(path, "rt", **options) if path.name.endswith(".gz") else open(path, **options)


def unbroken(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """Rows that are not blank; a row the reader chokes on becomes an empty one and the reader goes on with the next line."""
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield []
            continue
        if cells:
            yield cells


def find(root: Path, *patterns: str) -> Path | None:
    """The first file in a folder that one of some patterns names, itself or with ``.gz`` after it."""
    for pattern in patterns:
        for ending in ("", ".gz"):
            found = sorted(path for path in root.glob(pattern + ending) if path.is_file())
            if found:
                return found[0]
    return None


def needed(root: Path, *patterns: str) -> Path:
    """Like ``find``, and an error where there is none."""
    path = find(root, *patterns)
    if path is None:
        raise DataError(f"the root folder has no {patterns[0]} (or {patterns[0]}.gz); give the folder that holds it")
    return path


def cells_of(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[tuple[int, tuple[str, ...] | None]]:
    """Row number (the header is row 1) and the cells of some columns; None for a row that does not fit the header.

    The cells of ``optional`` columns follow, blank where the table has no such column.
    Raises ``DataError`` if the file cannot be read or lacks a column.
    """
    try:
        with reading(path) as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]
            places = _places(header, columns)
            places += [header.index(name) if name in header else None for name in optional]
            widths = (len(header), len(header) - 1 if header[-1] == "" else len(header))  # some headers end in a comma
            for number, cells in enumerate(unbroken(rows), start=2):
                yield number, _cells(cells, places) if len(cells) in widths else None
    except (OSError, EOFError, csv.Error) as error:
        raise DataError(f"a table of the data set cannot be read ({type(error).__name__}); fetch it again") from None


def header_of(path: Path) -> list[str]:
    """The names of a table's columns. Raises ``DataError``."""
    try:
        with reading(path) as file:
            return [name.strip() for name in next(csv.reader(file, strict=True), [])]
    except (OSError, EOFError, csv.Error) as error:
        raise DataError(f"the table cannot be read ({type(error).__name__}); give a CSV file with a header row") from None


def _cells(cells: Sequence[str], places: Sequence[int | None]) -> tuple[str, ...]:
    return tuple("" if place is None else cells[place] for place in places)


def _places(header: Sequence[str], columns: Sequence[str]) -> list[int | None]:
    missing = [name for name in columns if name not in header]
    if missing or not header:  # what the header has is not repeated: without one it would be the first patient
        raise DataError(
            f"a table of the data set has {len(header)} columns and none named {', '.join(map(repr, missing))}; "
            "check that it is the release this layout is for"
        )
    return [header.index(name) for name in columns]
