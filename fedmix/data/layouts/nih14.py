"""NIH ChestX-ray14: frontal images with 14 findings, without reports.

``Data_Entry_2017_v2020.csv``, the folders ``images_001/images`` to ``images_012/images`` (or one ``images``), and the official
lists ``test_list.txt`` and ``train_val_list.txt``; the latter leaves it to us which of its patients validate.

The header's ``OriginalImage[Width,Height]`` splits at its comma, so columns are found by name and never by place. "No
Finding" means that all 14 are absent. Each image is a study: the table does not say which were taken together. In older
tables an age is written "057Y", and some are of 400 years: those are not known. (Wang et al. 2017, CVPR, ChestX-ray8.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from fedmix.data.characteristics import Characteristics, band_named, sex_named
from fedmix.data.layouts import sheets
from fedmix.data.layouts.paths import path_parts
from fedmix.data.layouts.records import (
    TRAIN_OR_VAL,
    Picture,
    Record,
    Refusal,
    Source,
    SourceOptions,
    chosen_labels,
    view_named,
)
from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Effusion", "Emphysema", "Fibrosis", "Hernia"),
    *("Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", "Pneumothorax"),
)
_COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "View Position")
_CHARACTERISTICS = ("Patient Age", "Patient Gender", "Patient Sex")  # gender or sex, by the release
_IMAGE = re.compile(r"\d{8}_\d{3}\.png")


def open_nih14(root: Path, options: SourceOptions) -> Source:
    """The layout ``nih14``."""
    table = sheets.needed(root, "Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
    splits = _splits(root)
    names = chosen_labels(FINDINGS, options.label_names)
    folders = _folders(root)
    no_lists = "The official lists test_list.txt and train_val_list.txt are not in the root, so they are not used."
    return Source(
        root=root,
        num_rows=sum(1 for _ in sheets.cells_of(table, _COLUMNS)),
        label_names=names,
        records=partial(_records, table, folders, splits, names),
        has_splits=splits is not None,
        notes=() if splits else (no_lists,),
    )


def _records(
    table: Path, folders: Mapping[str, str], splits: Mapping[str, str] | None, names: tuple[str, ...]
) -> Iterator[Record | Refusal]:
    for row, cells in sheets.cells_of(table, _COLUMNS, _CHARACTERISTICS):
        try:
            yield _record(row, cells, folders, splits, names)
        except RefusedError as refused:
            yield Refusal(row, refused.code)


def _record(
    row: int,
    cells: tuple[str, ...] | None,
    folders: Mapping[str, str],
    splits: Mapping[str, str] | None,
    names: tuple[str, ...],
) -> Record:
    if cells is None:
        raise RefusedError("row_malformed")
    image, findings, patient, view, age, gender, sex = (cell.strip() for cell in cells)
    path_parts(image)
    if not _IMAGE.fullmatch(image):
        raise RefusedError("path_unexpected")
    if not patient:
        raise RefusedError("patient_missing")
    if splits is not None and image not in splits:
        raise RefusedError("split_unknown")
    return Record(
        row=row,
        patient=patient,
        study=image.removesuffix(".png"),
        pictures=(Picture((f"{folders.get(image, 'images')}/{image}",), view_named(view)),),
        split=None if splits is None else splits[image],
        labels=_labels(findings, names),
        characteristics=Characteristics(sex_named(gender or sex), band_named(age)),
    )


def _labels(cell: str, names: tuple[str, ...]) -> dict[str, int]:
    present = {name.strip() for name in cell.split("|")}
    if not present <= {*FINDINGS, "No Finding"} or ("No Finding" in present and len(present) > 1):
        raise RefusedError("label_unreadable")
    return {name: int(name in present) for name in names}


def _folders(root: Path) -> dict[str, str]:
    """Which folder each image lies in: the table does not say, and asking twelve folders for each would take twelve times."""
    found: dict[str, str] = {}
    for folder in (*sorted(root.glob("images_[0-9][0-9][0-9]/images")), *sorted(root.glob("images_[0-9][0-9][0-9]"))):
        if folder.is_dir():
            inside = folder.relative_to(root).as_posix()
            found.update((entry.name, inside) for entry in folder.iterdir() if _IMAGE.fullmatch(entry.name))
    return found


def _splits(root: Path) -> dict[str, str] | None:
    """The split of each image by the official lists."""
    lists = {TRAIN_OR_VAL: root / "train_val_list.txt", "test": root / "test_list.txt"}
    there = [path.is_file() for path in lists.values()]
    if not any(there):
        return None
    if not all(there):
        raise DataError("only one of train_val_list.txt and test_list.txt is in the root; put both there, or neither")
    return {name: split for split, path in lists.items() for name in path.read_text(errors="replace").split()}
