"""Any folder of DICOM files, as an archive exports them, with a table of reports if there is one.

Every regular file below the root is a candidate, whatever its name; those that are no DICOM files are counted and no fault.
Links are not followed, and no path is built from a tag: a DICOMDIR is left alone. Whose image it is, which study it belongs
to and which view it shows, only the file's own header says.

The table (``--reports``, a CSV, plain or gzip) has a column ``StudyInstanceUID``, or else ``AccessionNumber``, and one called
``report`` or ``text``; ``lang`` is read where it is there. Several rows of one study are one report, in their order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fedmix.data.languages import language
from fedmix.data.layouts import sheets
from fedmix.data.layouts.records import Picture, Record, Report, Source, SourceOptions
from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import decode
from fedmix.errors import DataError

if TYPE_CHECKING:
    from fedmix.data.dicom import Header

_KEYS = {"StudyInstanceUID": "study_instance_uid", "AccessionNumber": "accession_number"}
_TEXTS = ("report", "text")


@dataclass(frozen=True)
class _Reports:
    """Texts by the value of one header field; None: a text that cannot be decoded."""

    field: str
    texts: Mapping[str, str | None]
    langs: Mapping[str, str]


def open_dicom(root: Path, options: SourceOptions) -> Source:
    """The layout ``dicom``."""
    table = None if options.reports is None else options.reports.resolve()
    files = sorted(_files(root, table))
    if not files:
        raise DataError("the root folder holds no files; give the folder with the DICOM files")
    reports = None if table is None else _read_reports(table, options)
    alone = "No table of reports was given (--reports), so the studies are images alone."
    return Source(
        root=root,
        num_rows=len(files),
        label_names=(),
        records=partial(_records, files),
        fallback_encoding=options.fallback_encoding,
        notes=(alone,) if reports is None else (f"The table holds reports of {len(reports.texts)} studies.",),
        join=partial(_joined, reports),
        joined=table,
    )


def _files(root: Path, table: Path | None) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and name.upper() != "DICOMDIR" and path != table and not path.is_symlink():
                yield path.relative_to(root).as_posix()


def _records(files: list[str]) -> Iterator[Record]:
    for number, path in enumerate(files, start=1):
        yield Record(row=number, patient=None, study=None, pictures=(Picture((path,), view=None),))


def _joined(reports: _Reports | None, record: Record, header: Header) -> Record:
    """The record with the identifiers of its header, and its report if the table has one. Raises ``RefusedError``."""
    if not header.patient_id:
        raise RefusedError("patient_missing")
    study = header.study_instance_uid or header.accession_number or header.sop_instance_uid
    named = replace(record, patient=header.patient_id, study=study)
    key = "" if reports is None else getattr(header, reports.field)
    if reports is None or not key or key not in reports.texts:
        return named
    text = reports.texts[key]
    if text is None:
        raise RefusedError("text_encoding")
    return replace(named, report=Report(text, lang=reports.langs[key]))


def _read_reports(table: Path, options: SourceOptions) -> _Reports:
    key, text, *lang = _columns(table)
    texts: dict[str, str | None] = {}
    langs: dict[str, str] = {}
    for _, cells in sheets.cells_of(table, (key, text, *lang)):
        if cells is None or not cells[0].strip() or not cells[1].strip():
            continue
        study = cells[0].strip()
        texts[study] = _together(texts.get(study, ""), cells[1], options.fallback_encoding)
        langs[study] = (language(cells[2]) if lang else "") or options.lang
    return _Reports(_KEYS[key], texts, langs)


def _columns(table: Path) -> list[str]:
    header = sheets.header_of(table)
    found = [next((name for name in names if name in header), None) for names in (tuple(_KEYS), _TEXTS)]
    if None in found:
        raise DataError(
            f"the table of reports has {len(header)} columns; it needs one named {' or '.join(_KEYS)} "
            f"and one named {' or '.join(_TEXTS)}"
        )
    return [name for name in (*found, "lang" if "lang" in header else None) if name is not None]


def _together(before: str | None, cell: str, fallback_encoding: str | None) -> str | None:
    try:
        text = decode(cell.encode("utf-8", "surrogateescape"), fallback=fallback_encoding)
    except (RefusedError, UnicodeEncodeError):
        return None
    return None if before is None else f"{before}\n{text}".lstrip("\n")
