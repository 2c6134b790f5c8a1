"""Open-i, the Indiana University collection: reports as XML with their sections apart, and the images they belong to.

``NLMCXR_reports.tgz`` as it was downloaded, or unpacked as ``ecgen-radiology/1.xml`` and so on; images as PNG
(``CXR1_1_IM-0001-3001.png``) in the root or in ``NLMCXR_png``. An archive is read where it lies: nothing is unpacked to disk.

Neither the XML nor the PNG files say which view an image is: all are "unknown", and used only where a site asks for it.
Findings are the heads of the MeSH terms ("Cardiomegaly/mild" is Cardiomegaly); "normal" means that all are absent, and
"No Indexing" that nobody looked. One report is one patient. (Demner-Fushman et al. 2016, JAMIA 23(2):304-310.)
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

from fedmix.data import xml
from fedmix.data.layouts.paths import read_inside
from fedmix.data.layouts.records import Picture, Record, Refusal, Report, Source, SourceOptions, found_labels
from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

ARCHIVE = "NLMCXR_reports.tgz"
_DOCUMENT = re.compile(r"(?:\./)?(?:ecgen-radiology/)?(\d{1,7})\.xml")
_STUDY = re.compile(r"CXR\d{1,7}")
_IMAGE = re.compile(r"[A-Za-z0-9_-]{1,80}")
_FINDING = re.compile(r"[A-Za-z][A-Za-z ,'()-]{1,78}")
_NOT_INDEXED = frozenset({"No Indexing", "Technical Quality of Image Unsatisfactory"})


def open_openi(root: Path, options: SourceOptions) -> Source:
    """The layout ``openi``; all reports are read here and kept, some 4,000 of a page each."""
    folder = _picture_folder(root)
    found = [_record(number, document, folder) for number, document in sorted(_documents(root), key=lambda pair: pair[0])]
    if not found:
        raise DataError(f"the root folder has no Open-i reports; give the folder that holds {ARCHIVE} or ecgen-radiology")
    heads = {name for record in found if isinstance(record, Record) for name in record.labels}
    names = found_labels(heads - _NOT_INDEXED - {"normal"}, options.label_names)
    records = [record if isinstance(record, Refusal) else replace(record, labels=_labels(record, names)) for record in found]
    no_images = "There are no images (CXR*.png) in the root or its folder NLMCXR_png: only reports are used."
    return Source(
        root=root,
        num_rows=len(records),
        label_names=names,
        records=lambda: iter(records),
        notes=(no_images,) if folder is None else ("Open-i does not say which images are frontal: their view is unknown.",),
    )


def _documents(root: Path) -> Iterator[tuple[int, bytes | RefusedError]]:
    """Number and content of each report, or why it cannot be had."""
    folder, archive = root / "ecgen-radiology", root / ARCHIVE
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _DOCUMENT.fullmatch(path.name):
                try:
                    yield int(match[1]), read_inside(root, f"ecgen-radiology/{path.name}")
                except RefusedError as refused:
                    yield int(match[1]), refused
    elif archive.is_file():
        yield from _packed(archive)


def _packed(archive: Path) -> Iterator[tuple[int, bytes | RefusedError]]:
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                match = _DOCUMENT.fullmatch(member.name)
                if match is None or not member.isreg():
                    continue
                file = members.extractfile(member) if member.size <= xml.MAX_BYTES else None
                yield int(match[1]), RefusedError("file_too_large") if file is None else file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{ARCHIVE} cannot be read to its end ({type(error).__name__}); fetch it again") from None


def _record(number: int, document: bytes | RefusedError, folder: str | None) -> Record | Refusal:
    try:
        if isinstance(document, RefusedError):
            raise document
        return _read(number, xml.parse(document), folder)
    except RefusedError as refused:
        return Refusal(number, refused.code)


def _read(number: int, document: Element, folder: str | None) -> Record:
    study = document.find("uId")
    name = "" if study is None else study.get("id", "")
    if not _STUDY.fullmatch(name):
        raise RefusedError("patient_missing")
    images = [image.get("id", "") for image in document.iter("parentImage")]
    if not all(map(_IMAGE.fullmatch, images)):
        raise RefusedError("path_unexpected")
    return Record(
        row=number,
        patient=name,
        study=name,
        pictures=() if folder is None else tuple(Picture((f"{folder}{image}.png",)) for image in images),
        report=_report(document),
        labels=dict.fromkeys(_heads(document), 1),
    )


def _report(document: Element) -> Report | None:
    sections = {part.get("Label", "").lower(): "".join(part.itertext()) for part in document.iter("AbstractText")}
    there = {label: text for label, text in sections.items() if text.strip()}
    return Report(sections=there, lang="en") if there else None


def _heads(document: Element) -> Iterator[str]:
    for term in document.iterfind("MeSH/major"):
        head = (term.text or "").split("/")[0].strip()
        if not _FINDING.fullmatch(head):
            raise RefusedError("label_unreadable")
        yield head


def _labels(record: Record, names: tuple[str, ...]) -> dict[str, int]:
    """1 and 0 for a report that was indexed; nothing is known of the others."""
    heads = set(record.labels) - _NOT_INDEXED
    return {name: int(name in heads) for name in names} if heads else {}


def _picture_folder(root: Path) -> str | None:
    for folder in ("", "NLMCXR_png/", "images/"):
        if next((root / folder).glob("CXR*.png"), None) is not None:
            return folder
    return None
