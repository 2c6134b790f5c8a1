"""How data sets lie on disk: each layout turns a root folder into records, one per study, without opening an image.

Cells come from whoever wrote the table and are treated as hostile: a path is checked as text here, and opened component by
component below the root (``open_inside``), so that neither '..' nor a symbolic link nor a swap in between can leave it.
A row that cannot be used becomes a ``Refusal``; only a table that cannot be read at all raises.
"""

from __future__ import annotations

import csv
import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import decode
from fedmix.errors import DataError

MAX_FILE_BYTES = 256 * 1024 * 1024  # an uncompressed 16-bit image of 64 Mpx is half of it
MAX_LABELS = 512
MAX_LABEL_LENGTH = 80  # longer is a sentence, not a finding
MAX_PATH_LENGTH = 4096

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_VIEW_NAMES = {
    **dict.fromkeys(("pa", "posteroanterior", "postero-anterior"), "PA"),
    **dict.fromkeys(("ap", "anteroposterior", "antero-posterior", "ap_horizontal", "ap supine", "ap erect"), "AP"),
    **dict.fromkeys(("lateral", "lat", "ll", "l", "rl", "left lateral", "right lateral"), "lateral"),
}
_ERRNO_CODES = {
    errno.ENOENT: "file_missing",
    errno.ENOTDIR: "file_missing",
    errno.ELOOP: "path_escape",  # a link that appeared after the path was resolved
    errno.ENXIO: "file_not_regular",
    errno.ENAMETOOLONG: "path_too_long",
}


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

    def has(self, column: str) -> bool:
        """Whether the table has this column."""
        return column in self.header


@dataclass(frozen=True)
class Record:
    """One usable row, not yet opened: ``image`` is the path as the cell has it, ``labels`` finding -> 1, 0, -1 (not known)."""

    row: int
    patient: str
    study: str
    image: str | None
    text: str | None
    view: str
    split: str | None
    labels: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """A row that is left out: its number in the table (the header is row 1) and the reason code."""

    row: int
    code: str


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
        with _reading(path) as file:
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = tuple(name.strip() for name in next(rows, []))
            _check_header(header, columns)
            count, seen = _look_through(rows, header.index(columns.labels) if columns.labels in header else None)
    except (OSError, csv.Error) as error:
        raise DataError(f"the table cannot be read ({type(error).__name__}); give a CSV file with a header row") from None
    if label_names is None:
        label_names = columns.label_columns or tuple(sorted(seen))
    return Table(path, columns, delimiter, fallback_encoding, header, count, label_names)


def table_records(table: Table) -> Iterator[Record | Refusal]:
    """The rows of a table in their order, each as a record or the reason why not."""
    with _reading(table.path) as file:
        rows = csv.reader(file, delimiter=table.delimiter, strict=True)
        next(rows)
        for number, cells in enumerate(_unbroken(rows), start=2):
            try:
                yield _record(table, number, cells)
            except RefusedError as refused:
                yield Refusal(number, refused.code)


def open_inside(root: Path, cell: str) -> BinaryIO:
    """Open the regular file that a cell names under ``root`` (a real path), for reading. Raises ``RefusedError``.

    Links may point anywhere inside the root. The path is resolved first and then walked without following links, so what
    is opened is what was checked.
    """
    parts = _path_parts(cell)
    resolved = Path(os.path.realpath(root.joinpath(*parts)))
    if not resolved.is_relative_to(root):
        raise RefusedError("path_escape")
    folder = -1
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        *folders, name = resolved.relative_to(root).parts or (".",)
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: a pipe without a writer would hold the whole preparation.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise RefusedError(_ERRNO_CODES.get(error.errno or 0, "file_unreadable")) from None
    finally:
        if folder >= 0:
            os.close(folder)
    return _checked(file)


def read_inside(root: Path, cell: str) -> bytes:
    """The bytes of the file that a cell names under ``root``. Raises ``RefusedError``."""
    with open_inside(root, cell) as file:
        try:
            return file.read()
        except OSError:
            raise RefusedError("file_unreadable") from None


def _checked(descriptor: int) -> BinaryIO:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        raise RefusedError("file_too_large" if stat.S_ISREG(status.st_mode) else "file_not_regular")
    return os.fdopen(descriptor, "rb")


def _path_parts(cell: str) -> list[str]:
    """What a path says, before the disk is asked."""
    try:
        too_long = len(os.fsencode(cell)) > MAX_PATH_LENGTH
    except UnicodeEncodeError:
        raise RefusedError("path_control") from None
    if too_long:
        raise RefusedError("path_too_long")
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in cell):
        raise RefusedError("path_control")
    if "\\" in cell:
        raise RefusedError("path_backslash")
    if cell.startswith("/") or re.match(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*:/", cell):
        raise RefusedError("path_absolute")
    parts = [part for part in cell.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise RefusedError("path_parent")
    return parts


def _reading(path: Path) -> Any:
    # Bytes that are not UTF-8 travel as surrogates, so that one odd row is decoded or refused by itself.
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _unbroken(rows: Iterator[list[str]]) -> Iterator[list[str]]:
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
    for cells in _unbroken(rows):
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
    return len(name) <= MAX_LABEL_LENGTH and name.isprintable()


def _record(table: Table, number: int, cells: list[str]) -> Record:
    if len(cells) != len(table.header):
        raise RefusedError("row_malformed")
    row, columns = dict(zip(table.header, cells, strict=True)), table.columns
    patient = row.get(columns.patient, f"row {number}").strip()
    if not patient:
        raise RefusedError("patient_missing")
    return Record(
        row=number,
        patient=patient,
        study=row.get(columns.study, "").strip() or f"row {number}",
        image=row.get(columns.image, "").strip(" \t") or None,
        text=_text(row.get(columns.text, ""), table.fallback_encoding),
        view=_VIEW_NAMES.get(row.get(columns.view, "").strip().lower(), "unknown"),
        split=_split(row[columns.split]) if table.has(columns.split) else None,
        labels=_labels(table, row),
    )


def _text(cell: str, fallback_encoding: str | None) -> str | None:
    if not cell or cell.isspace():
        return None
    try:
        return decode(cell.encode("utf-8", "surrogateescape"), fallback=fallback_encoding)
    except UnicodeEncodeError:
        raise RefusedError("text_encoding") from None


def _split(cell: str) -> str:
    try:
        return _SPLIT_NAMES[cell.strip().lower()]
    except KeyError:
        raise RefusedError("split_unknown") from None


def _labels(table: Table, row: dict[str, str]) -> dict[str, int]:
    if table.columns.label_columns:
        return {name: _label(row[name]) for name in table.label_names if name in row}
    present = set(_findings(row.get(table.columns.labels, "")))
    if not all(map(_is_finding, present)):
        raise RefusedError("label_unreadable")
    # A cell that names findings was read for all of them: those it does not name are absent, not unknown.
    return {name: int(name in present) for name in table.label_names} if present else {}


def _label(cell: str) -> int:
    values = {"": -1, "-1": -1, "-1.0": -1, "0": 0, "0.0": 0, "1": 1, "1.0": 1}
    try:
        return values[cell.strip()]
    except KeyError:
        raise RefusedError("label_unreadable") from None
