"""MIMIC-CXR (DICOM) and MIMIC-CXR-JPG: studies with reports, several images each, and official splits.

``mimic-cxr``: ``cxr-record-list.csv.gz`` (or, for reports alone, ``cxr-study-list.csv.gz``) and
``files/p10/p10000032/s50414267/<dicom_id>.dcm``, or ``.dcm.gz``. ``mimic-cxr-jpg``: ``mimic-cxr-2.0.0-metadata.csv.gz`` and
``.jpg`` in the same folders. Reports, from mimic-cxr-reports.zip, lie beside the folders of their studies or elsewhere, for
which see ``SourceOptions.reports``. The tables ``-split`` and ``-chexpert`` are used with either where they lie in the root.

Paths are built from the checked identifiers, not taken from the tables. A label is one of a study, so it is joined on both
identifiers; the few studies without a row have no labels. The split is one of an image, and patients have only one.
(Johnson et al. 2019, Scientific Data 6:317; arXiv:1901.07042.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fedmix.data.layouts import sheets
from fedmix.data.layouts.paths import real_root
from fedmix.data.layouts.records import (
    Picture,
    Record,
    Refusal,
    Report,
    Source,
    SourceOptions,
    chosen_labels,
    label_value,
    split_named,
    view_named,
)
from fedmix.data.quarantine import RefusedError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion"),
    *("Lung Opacity", "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices"),
)
_SUBJECT = re.compile(r"1\d{7}")
_STUDY = re.compile(r"5\d{7}")
_IMAGE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}")

StudyKey = tuple[str, str]  # subject_id, study_id


@dataclass
class _Studies:
    """Pictures by study in the order of the table, the row each study first stood in, and the rows that fit nowhere."""

    pictures: dict[StudyKey, list[Picture]] = field(default_factory=dict)
    rows: dict[StudyKey, int] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)

    def add(self, row: int, study: StudyKey, picture: Picture | None) -> None:
        self.rows.setdefault(study, row)
        pictures = self.pictures.setdefault(study, [])
        if picture is not None:
            pictures.append(picture)


def open_mimic_jpg(root: Path, options: SourceOptions) -> Source:
    """The layout ``mimic-cxr-jpg``."""
    studies = _Studies()
    table = sheets.needed(root, "mimic-cxr-2.*-metadata.csv")
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition", "ViewCodeSequence_CodeMeaning")
    for row, cells in sheets.cells_of(table, columns):
        try:
            image, *study = _checked(cells)
            studies.add(row, (study[0], study[1]), Picture((f"{_folder(*study[:2])}/{image}.jpg",), _view(*study[2:])))
        except RefusedError as refused:
            studies.refusals.append(Refusal(row, refused.code))
    return _source(root, options, studies)


def open_mimic(root: Path, options: SourceOptions) -> Source:
    """The layout ``mimic-cxr``; a root that has only the list of studies holds reports alone."""
    studies = _Studies()
    if sheets.find(root, "cxr-record-list.csv") is None:
        for row, cells in sheets.cells_of(sheets.needed(root, "cxr-study-list.csv"), ("subject_id", "study_id")):
            try:
                subject, study = _checked(None if cells is None else ("0-0-0-0-0", *cells), has_image=False)[1:]
                studies.add(row, (subject, study), None)
            except RefusedError as refused:
                studies.refusals.append(Refusal(row, refused.code))
        return _source(root, options, studies)
    views = _views(root)
    table = sheets.needed(root, "cxr-record-list.csv")
    for row, cells in sheets.cells_of(table, ("dicom_id", "subject_id", "study_id")):
        try:
            image, subject, study = _checked(cells)
            path = f"{_folder(subject, study)}/{image}.dcm"
            studies.add(row, (subject, study), Picture((path, f"{path}.gz"), views.get(image)))
        except RefusedError as refused:
            studies.refusals.append(Refusal(row, refused.code))
    return _source(root, options, studies)


def _checked(cells: tuple[str, ...] | None, *, has_image: bool = True) -> tuple[str, ...]:
    """A row whose first cells are image, subject and study, if these look as they should."""
    if cells is None:
        raise RefusedError("row_malformed")
    image, subject, study = cells[:3]
    if not (_SUBJECT.fullmatch(subject) and _STUDY.fullmatch(study) and (_IMAGE.fullmatch(image) or not has_image)):
        raise RefusedError("path_unexpected")
    return cells


def _folder(subject: str, study: str) -> str:
    return f"files/p{subject[:2]}/p{subject}/s{study}"


def _view(position: str, code_meaning: str) -> str:
    view = view_named(position)
    return view_named(code_meaning) if view == "unknown" and not position.strip() else view


def _views(root: Path) -> dict[str, str]:
    """Views by image, where the metadata of MIMIC-CXR-JPG lies in the root too; else the DICOM headers say."""
    table = sheets.find(root, "mimic-cxr-2.*-metadata.csv")
    if table is None:
        return {}
    rows = sheets.cells_of(table, ("dicom_id", "ViewPosition", "ViewCodeSequence_CodeMeaning"))
    return {cells[0]: _view(*cells[1:]) for _, cells in rows if cells is not None}


def _source(root: Path, options: SourceOptions, studies: _Studies) -> Source:
    splits = _splits(root)
    labels = _labels(root)
    names = chosen_labels(FINDINGS, options.label_names) if labels else ()
    notes = []
    if not labels:
        notes.append("There is no -chexpert table in the root: studies have no labels.")
    if splits is None:
        notes.append("There is no -split table in the root, so the official splits are not used.")
    return Source(
        root=root,
        num_rows=len(studies.rows) + len(studies.refusals),
        label_names=names,
        records=partial(_records, studies, splits, labels, names),
        reports_root=_reports_root(root, options),
        has_splits=splits is not None,
        fallback_encoding=options.fallback_encoding,
        notes=tuple(notes),
    )


def _records(
    studies: _Studies, splits: Mapping[str, str] | None, labels: Mapping[StudyKey, bytes | None], names: tuple[str, ...]
) -> Iterator[Record | Refusal]:
    yield from studies.refusals
    for study, row in studies.rows.items():
        subject, number = study
        split = None if splits is None else splits.get(subject, "unknown")
        values = labels.get(study, b"")
        if split == "unknown" or values is None:
            yield Refusal(row, "split_unknown" if values is not None else "label_unreadable")
            continue
        known = dict(zip(FINDINGS, (value - 1 for value in values), strict=False))
        yield Record(
            row=row,
            patient=subject,
            study=number,
            pictures=tuple(studies.pictures[study]),
            report=Report(places=(f"{_folder(*study)}.txt",), lang="en"),
            split=split,
            labels={name: known[name] for name in names if name in known},
        )


def _splits(root: Path) -> dict[str, str] | None:
    """The split of each patient; the table has one line an image."""
    table = sheets.find(root, "mimic-cxr-2.*-split.csv")
    if table is None:
        return None
    found: dict[str, str] = {}
    for _, cells in sheets.cells_of(table, ("subject_id", "split")):
        if cells is not None:
            try:
                found.setdefault(cells[0], split_named(cells[1]))
            except RefusedError:
                found.setdefault(cells[0], "unknown")
    return found


def _labels(root: Path) -> dict[StudyKey, bytes | None]:
    """Each study's labels plus one as a byte each, which 227,827 studies have room for; None where one is unreadable."""
    table = sheets.find(root, "mimic-cxr-2.*-chexpert.csv")
    found: dict[StudyKey, bytes | None] = {}
    for _, cells in sheets.cells_of(table, ("subject_id", "study_id", *FINDINGS)) if table else ():
        if cells is not None:
            try:
                found[cells[0], cells[1]] = bytes(label_value(cell) + 1 for cell in cells[2:])
            except RefusedError:
                found[cells[0], cells[1]] = None
    return found


def _reports_root(root: Path, options: SourceOptions) -> Path:
    if options.reports is not None:
        return real_root(options.reports)
    unpacked = root / "mimic-cxr-reports"
    return real_root(unpacked) if unpacked.is_dir() else root
