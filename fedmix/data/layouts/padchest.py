"""PadChest: images of several views with Spanish reports and findings, without official splits.

``PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv`` (its first column is an index without a name) and the images, each
zip unpacked into a folder of its number (``0/...png``, the column ImageDir) or all into one.

The 16-bit PNG files of MONOCHROME1 images are negatives, which no tag in them says: the table's column does. The cell of
Labels is a Python list; it is read as a literal of bounded length and as nothing else, and an empty one means that nobody
looked. Reports are in Spanish, lower case, stemmed: they are taken whole. PatientBirth is a year, so that an age may be one
too high; with an impossible one (2052) it is not known. (Bustos et al. 2020, Medical Image Analysis 66; arXiv:1901.07441.)
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedmix.data import phi
from fedmix.data.characteristics import Characteristics, band_between, sex_named
from fedmix.data.layouts import sheets
from fedmix.data.layouts.paths import path_parts
from fedmix.data.layouts.records import Picture, Record, Refusal, Report, Source, SourceOptions, found_labels, view_named
from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import decode

TABLE = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
MAX_CELL = 4096  # characters of a list of findings; Python's parser is not meant for longer ones from outside
MAX_FINDING = 80
_COLUMNS = (
    *("ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "PhotometricInterpretation_DICOM", "Report", "Labels"),
)
_CHARACTERISTICS = ("PatientSex_DICOM", "PatientBirth", "StudyDate_DICOM")
_IMAGE = re.compile(r"[A-Za-z0-9._-]{1,200}\.png")
_FOLDER = re.compile(r"\d{1,3}(?:\.0)?")


def open_padchest(root: Path, options: SourceOptions) -> Source:
    """The layout ``padchest``."""
    studies = _studies(sheets.needed(root, TABLE, "PADCHEST_*.csv"), options)
    named = (name for record in studies.values() if isinstance(record, Record) for name in record.labels)
    names = found_labels(named, options.label_names)
    records = [each if isinstance(each, Refusal) else replace(each, labels=_filled(each, names)) for each in studies.values()]
    return Source(
        root=root,
        num_rows=len(records),
        label_names=names,
        records=partial(iter, records),
        fallback_encoding=options.fallback_encoding,
    )


def _studies(table: Path, options: SourceOptions) -> Mapping[str, Record | Refusal]:
    found: dict[str, Record | Refusal] = {}
    for row, cells in sheets.cells_of(table, _COLUMNS, _CHARACTERISTICS):
        try:
            record = _record(row, cells, options)
        except RefusedError as refused:
            found[f"row {row}"] = Refusal(row, refused.code)
            continue
        key = f"study {record.patient} {record.study}"
        before = found.get(key)
        if isinstance(before, Record):
            record = replace(before, pictures=before.pictures + record.pictures, labels={**before.labels, **record.labels})
        found[key] = record
    return found


def _record(row: int, cells: tuple[str, ...] | None, options: SourceOptions) -> Record:
    if cells is None:
        raise RefusedError("row_malformed")
    image, folder, study, patient, projection, photometric, report, labels, sex, birth, taken = (cell.strip() for cell in cells)
    path_parts(image)
    path_parts(folder)
    if not _IMAGE.fullmatch(image) or not _FOLDER.fullmatch(folder):
        raise RefusedError("path_unexpected")
    if not patient or not study:
        raise RefusedError("patient_missing")
    text = decode(report.encode("utf-8", "surrogateescape"), fallback=options.fallback_encoding)
    places = (f"{folder.removesuffix('.0')}/{image}", image, f"images/{image}")
    return Record(
        row=row,
        patient=patient,
        study=study,
        pictures=(Picture(places, view_named(projection), is_negative=photometric == "MONOCHROME1"),),
        report=Report(text, lang="es") if text and text.lower() not in ("nan", "none") else None,
        labels=dict.fromkeys(_findings(labels), 1),
        characteristics=Characteristics(sex_named(sex), band_between(birth, taken)),
    )


def _findings(cell: str) -> list[str]:
    """["pulmonary edema", ...] of "['pulmonary edema ', ...]". Raises ``RefusedError``."""
    if not cell or cell == "nan":
        return []
    try:
        listed = ast.literal_eval(cell) if len(cell) <= MAX_CELL else None
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise RefusedError("label_unreadable") from None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise RefusedError("label_unreadable")
    names = [" ".join(name.split()) for name in listed if name.strip()]
    if any(len(name) > MAX_FINDING or not name.isprintable() or phi.kinds(name) for name in names):
        raise RefusedError("label_unreadable")
    return names


def _filled(record: Record, names: tuple[str, ...]) -> dict[str, int]:
    """A study whose findings were listed was read for all of them; nothing is known of one with an empty list."""
    return {name: int(name in record.labels) for name in names} if record.labels else {}
