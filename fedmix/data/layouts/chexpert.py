"""CheXpert: frontal and lateral images with 14 uncertain labels and official splits, without reports.

``train.csv``, ``valid.csv`` and ``train/patient00001/study1/view1_frontal.jpg``, with the folder of the release
("CheXpert-v1.0-small") as the root or right below it. The column Path starts with that folder's name, which differs between
releases, so only what follows is used, and only if it looks as it should.

1 is present, 0 absent, -1 uncertain and blank not mentioned; the last two are both "not known" here. A frontal image whose
column AP/PA says LL or RL contradicts itself: its view is unknown. Age 0, in three rows, is
taken for not known. (Irvin et al. 2019, AAAI 33, 590-597; arXiv:1901.07031.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedmix.data.characteristics import Characteristics, band_named, sex_named
from fedmix.data.layouts import sheets
from fedmix.data.layouts.paths import path_parts, real_root
from fedmix.data.layouts.records import (
    Picture,
    Record,
    Refusal,
    Source,
    SourceOptions,
    chosen_labels,
    label_value,
    view_named,
)
from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation"),
    *("Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"),
)
_TABLES = {"train.csv": "train", "valid.csv": "val"}
_COLUMNS = ("Path", "Frontal/Lateral", "AP/PA", *FINDINGS)
_CHARACTERISTICS = ("Sex", "Age")
_PATH = re.compile(r"(?:train|valid)/(patient\d{5,6})/(study\d{1,3})/view\d{1,2}_(?:frontal|lateral)\.jpg")


def open_chexpert(root: Path, options: SourceOptions) -> Source:
    """The layout ``chexpert``."""
    inside = _release(root)
    names = chosen_labels(FINDINGS, options.label_names)
    studies = _studies(inside, names)
    return Source(
        root=inside, num_rows=len(studies), label_names=names, records=partial(iter, studies.values()), has_splits=True
    )


def _release(root: Path) -> Path:
    for folder in (root, *sorted(root.glob("CheXpert-v1.0*"))):
        if sheets.find(folder, *_TABLES) is not None:
            return real_root(folder)  # the release may be a link to another disk
    raise DataError("the root folder has no train.csv or valid.csv; give the folder of the CheXpert release")


def _studies(root: Path, names: tuple[str, ...]) -> Mapping[str, Record | Refusal]:
    """Every study of both tables: its first row's labels and all rows' pictures; labels are those of the study."""
    found: dict[str, Record | Refusal] = {}
    for name, split in _TABLES.items():
        table = sheets.find(root, name)
        for row, cells in sheets.cells_of(table, _COLUMNS, _CHARACTERISTICS) if table else ():
            try:
                record = _record(row, cells, split, names)
            except RefusedError as refused:
                found[f"{name} {row}"] = Refusal(row, refused.code)
                continue
            before = found.get(f"{record.patient} {record.study}")
            if isinstance(before, Record):
                record = replace(before, pictures=before.pictures + record.pictures)
            found[f"{record.patient} {record.study}"] = record
    return found


def _record(row: int, cells: tuple[str, ...] | None, split: str, names: tuple[str, ...]) -> Record:
    if cells is None:
        raise RefusedError("row_malformed")
    path, side, projection, *labels, sex, age = cells
    parts = path_parts(path)
    match = _PATH.fullmatch("/".join(parts[1:])) or _PATH.fullmatch("/".join(parts))
    if match is None:
        raise RefusedError("path_unexpected")
    values = dict(zip(FINDINGS, map(label_value, labels), strict=True))
    return Record(
        row=row,
        patient=match[1],
        study=match[2],
        pictures=(Picture((match[0],), _view(side, projection)),),
        split=split,
        labels={name: values[name] for name in names},
        characteristics=Characteristics(sex_named(sex), band_named("" if age.strip() == "0" else age)),
    )


def _view(side: str, projection: str) -> str:
    if side.strip() == "Lateral":
        return "lateral"
    view = view_named(projection)
    return view if side.strip() == "Frontal" and view in ("PA", "AP") else "unknown"
