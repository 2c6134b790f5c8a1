"""A table of any columns: one CSV names the images and holds the reports, one row a study.

A row that cannot be used becomes a ``Refusal``; only a table that cannot be read at all raises.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from fedmix.data import phi
from fedmix.data.characteristics import Characteristics, band_named, sex_named
from fedmix.data.languages import language
from fedmix.data.layouts.records import (
    MAX_LABELS,
    Picture,
    Record,
    Refusal,
    Report,
    Source,
    SourceOptions,
    label_value,
    split_named,
    view_named,
)
from fedmix.data.layouts.sheets import reading, unbroken
from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import decode
from fedmix.errors import DataError

MAX_LABEL_LENGTH = 80  # longer is a sentence, not a finding


@dataclass(frozen=True)
class TableColumns:
    """Names of a table's columns. A default that the table lacks is done without; a name given on purpose has to be there.

    ``labels`` holds findings separated by '|' (an empty cell: not known); ``label_columns`` names one column per finding
    instead, with 1, 0, and -1 or blank for not known.
    """

    image: str = "image"
    text: str = "text"
    labels: str = "labels"
    label_columns: tuple[str, ...] = ()
    patient: str = "patient_id"
    study: str = "study_id"
    view: str = "view"
    split: str = "split"
    lang: str = "lang"
    sex: str = "sex"
    age: str = "age"


@dataclass(frozen=True)
class TableOptions:
    """Which table and how to read it. ``csv``: the table, alone or below the root; None: the only CSV file in the root."""

    csv: Path | None = None
    columns: TableColumns = field(default_factory=TableColumns)
    delimiter: str = ","

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1:
            raise DataError("the delimiter has to be one character, such as a comma, a semicolon or a tab")


@dataclass(frozen=True)
class Table:
    """A table that has been looked through once: where it is, what it has, how many rows, which findings it names."""

    path: Path
    columns: TableColumns
    delimiter: str
    fallback_encoding: str | None
    header: tuple[str, ...]
    num_rows: int
    label_names: tuple[str, ...]
    lang: str = ""

    def has(self, column: str) -> bool:
        """Whether the table has this column."""
        return column in self.header


def table_source(root: Path, options: SourceOptions, table: TableOptions | None = None) -> Source:
    """The layout ``table``; where the table has no view column, nothing is known of the views and all are used."""
    table = table or TableOptions()
    opened = open_table(
        _find_csv(root, table.csv),
        table.columns,
        delimiter=table.delimiter,
        fallback_encoding=options.fallback_encoding,
        label_names=options.label_names,
    )
    return Source(
        root=root,
        num_rows=opened.num_rows,
        label_names=opened.label_names,
        records=partial(table_records, replace(opened, lang=options.lang)),
        has_patients=opened.has(table.columns.patient),
        has_splits=opened.has(table.columns.split),
        frontal_only=False,
        fallback_encoding=options.fallback_encoding,
    )


def open_table(
    path: Path,
    columns: TableColumns,
    *,
    delimiter: str = ",",
    fallback_encoding: str | None = None,
    label_names: tuple[str, ...] | None = None,
) -> Table:
    """Read a CSV once, for its header, its length and the names of its findings (unless ``label_names`` fixes them)."""
    try:
        with reading(path) as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = tuple(name.strip() for name in next(rows, []))
            _check_header(header, columns)
            count, seen = _look_through(rows, header.index(columns.labels) if columns.labels in header else None)
    except (OSError, EOFError, csv.Error) as error:
        raise DataError(f"the table cannot be read ({type(error).__name__}); give a CSV file with a header row") from None
    if label_names is None:
        label_names = columns.label_columns or tuple(sorted(seen))
    return Table(path, columns, delimiter, fallback_encoding, header, count, label_names)


def table_records(table: Table) -> Iterator[Record | Refusal]:
    """The rows of a table in their order, each as a record or the reason why not."""
    with reading(table.path) as file:
        rows = csv.reader(file, delimiter=table.delimiter, strict=True)
        next(rows)
        for number, cells in enumerate(unbroken(rows), start=2):
            try:
                yield _record(table, number, cells)
            except RefusedError as refused:
                yield Refusal(number, refused.code)


def _find_csv(root: Path, given: Path | None) -> Path:
    if given is not None:
        for candidate in (given, root / given):
            if candidate.is_file():
                return candidate
        raise DataError("the given CSV file is not there, neither as it stands nor below the root folder")
    tables = sorted((*root.glob("*.csv"), *root.glob("*.csv.gz")))
    if len(tables) != 1:
        raise DataError(f"the root folder holds {len(tables)} CSV files; name the one to use with --csv")
    return tables[0]


def _check_header(header: tuple[str, ...], columns: TableColumns) -> None:
    # Names found in the header are not repeated: a table without one would put its first patient into the message.
    given = [getattr(columns, entry.name) for entry in fields(TableColumns) if entry.name != "label_columns"]
    on_purpose = set(given) - {entry.default for entry in fields(TableColumns)} | set(columns.label_columns)
    missing = sorted(name for name in on_purpose if name not in header)
    if missing:
        raise DataError(
            f"the table has {len(header)} columns and none named {', '.join(map(repr, missing))}; check its header row"
        )
    if columns.image not in header and columns.text not in header:
        raise DataError(
            f"the table has {len(header)} columns, none named {columns.image!r} (images) or {columns.text!r} (reports); "
            "its first row has to hold the column names, or name the columns"
        )
    used = [name for name in (*given, *columns.label_columns) if header.count(name) > 1]
    if used:
        raise DataError(
            f"the table has more than one column named {', '.join(map(repr, sorted(set(used))))}; rename all but one"
        )


def _look_through(rows: Iterator[list[str]], label_index: int | None) -> tuple[int, set[str]]:
    count, names = 0, set[str]()
    for cells in unbroken(rows):
        count += 1
        if label_index is not None and label_index < len(cells):
            names.update(filter(_is_finding, _findings(cells[label_index])))
        if len(names) > MAX_LABELS:
            raise DataError(
                f"the labels column names more than {MAX_LABELS} different findings; it has to hold names separated by '|', "
                "not free text: name another column, or give the list of findings"
            )
    return count, names


def _findings(cell: str) -> list[str]:
    return [name for name in (part.strip() for part in cell.split("|")) if name]


def _is_finding(name: str) -> bool:
    # A finding's name becomes metadata, which a date or a number of a record must not.
    return len(name) <= MAX_LABEL_LENGTH and name.isprintable() and not phi.kinds(name)


def _record(table: Table, number: int, cells: list[str]) -> Record:
    if len(cells) != len(table.header):
        raise RefusedError("row_malformed")
    row, columns = dict(zip(table.header, cells, strict=True)), table.columns
    patient = row.get(columns.patient, f"row {number}").strip()
    if not patient:
        raise RefusedError("patient_missing")
    image = row.get(columns.image, "").strip(" \t")
    text = _text(row.get(columns.text, ""), table.fallback_encoding)
    return Record(
        row=number,
        patient=patient,
        study=row.get(columns.study, "").strip() or f"row {number}",
        pictures=(Picture((image,), view_named(row.get(columns.view, ""))),) if image else (),
        report=Report(text, lang=language(row.get(columns.lang, "")) or table.lang) if text else None,
        split=split_named(row[columns.split]) if table.has(columns.split) else None,
        labels=_labels(table, row),
        characteristics=Characteristics(sex_named(row.get(columns.sex, "")), band_named(row.get(columns.age, ""))),
    )


def _text(cell: str, fallback_encoding: str | None) -> str | None:
    if not cell or cell.isspace():
        return None
    try:
        return decode(cell.encode("utf-8", "surrogateescape"), fallback=fallback_encoding)
    except UnicodeEncodeError:
        raise RefusedError("text_encoding") from None


def _labels(table: Table, row: dict[str, str]) -> dict[str, int]:
    if table.columns.label_columns:
        return {name: label_value(row[name]) for name in table.label_names if name in row}
    present = set(_findings(row.get(table.columns.labels, "")))
    if not all(map(_is_finding, present)):
        raise RefusedError("label_unreadable")
    # A cell that names findings was read for all of them: those it does not name are absent, not unknown.
    return {name: int(name in present) for name in table.label_names} if present else {}
