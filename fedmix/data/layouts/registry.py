"""The layouts by name: to add a data set, write its reader beside this file and add a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedmix.data.layouts.chexpert import open_chexpert
from fedmix.data.layouts.dicom_folder import open_dicom
from fedmix.data.layouts.mimic import open_mimic, open_mimic_jpg
from fedmix.data.layouts.nih14 import open_nih14
from fedmix.data.layouts.openi import open_openi
from fedmix.data.layouts.padchest import open_padchest
from fedmix.data.layouts.paths import real_root
from fedmix.data.layouts.records import Source, SourceOptions
from fedmix.data.layouts.table import table_source
from fedmix.errors import DataError

LAYOUTS: dict[str, Callable[[Path, SourceOptions], Source]] = {
    "chexpert": open_chexpert,
    "dicom": open_dicom,
    "mimic-cxr": open_mimic,
    "mimic-cxr-jpg": open_mimic_jpg,
    "nih14": open_nih14,
    "openi": open_openi,
    "padchest": open_padchest,
    "table": table_source,
}


def open_source(layout: str, root: Path, options: SourceOptions) -> Source:
    """Look through a data set at ``root`` in one of the ``LAYOUTS``. Raises ``DataError`` if it is not there."""
    if layout not in LAYOUTS:
        raise DataError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](real_root(root), options)
