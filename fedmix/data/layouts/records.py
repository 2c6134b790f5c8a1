"""What the reader of a data set hands on: studies that can be opened, rows that cannot, and what is known of the whole.

Nothing here has opened an image. A reader says where pictures and reports lie; ``fedmix.data.reading`` goes and looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmix.data.characteristics import NOT_SAID, Characteristics
from fedmix.data.languages import language
from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

MAX_LABELS = 512
TRAIN_OR_VAL = "train_val"  # an official list that leaves the validation set to whoever trains

_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_VIEW_NAMES = {
    **dict.fromkeys(("pa", "posteroanterior", "postero-anterior"), "PA"),
    **dict.fromkeys(("ap", "anteroposterior", "antero-posterior", "ap_horizontal", "ap supine", "ap erect"), "AP"),
    **dict.fromkeys(
        ("lateral", "lat", "ll", "l", "rl", "left lateral", "right lateral", "xtable lateral", "large lateral"), "lateral"
    ),
}
_LABEL_VALUES = {"": -1, "-1": -1, "-1.0": -1, "0": 0, "0.0": 0, "1": 1, "1.0": 1}


@dataclass(frozen=True)
class Picture:
    """One image file of a study, not yet opened.

    ``places``: paths below the root; the first that is there counts. ``view``: one of ``shard.VIEWS``, or None where only the
    file itself says (DICOM). ``is_negative``: black and white are exchanged in the file.
    """

    places: tuple[str, ...]
    view: str | None = "unknown"
    is_negative: bool = False


@dataclass(frozen=True)
class Report:
    """A study's report: its text, or its sections by name, or where the file is; ``lang`` as BCP 47 where it is known."""

    text: str | None = None
    sections: Mapping[str, str] | None = None
    places: tuple[str, ...] = ()
    lang: str = ""


@dataclass(frozen=True)
class Record:
    """One usable study, not yet opened.

    ``row``: where it stands in the data set's table (the header is row 1), or its number. ``patient`` and ``study`` are None
    where only the files say. ``split``: None to draw it. ``labels``: finding -> 1, 0, -1 (not known).
    ``characteristics``: as the table says; a DICOM file says it itself.
    """

    row: int
    patient: str | None
    study: str | None
    pictures: tuple[Picture, ...] = ()
    report: Report | None = None
    split: str | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    characteristics: Characteristics = NOT_SAID


@dataclass(frozen=True)
class Refusal:
    """A row that is left out: its number in the table (the header is row 1) and the reason code."""

    row: int
    code: str


@dataclass(frozen=True)
class SourceOptions:
    """What a reader may be asked besides its root.

    ``label_names``: the findings to keep; None takes all. ``fallback_encoding``: of reports that are not UTF-8.
    ``reports``: where reports lie if not below the root: a folder (MIMIC), a table (DICOM). ``lang``: the language, BCP 47, of
    texts whose table does not name one; public data sets know theirs.
    """

    label_names: tuple[str, ...] | None = None
    fallback_encoding: str | None = None
    reports: Path | None = None
    lang: str = ""

    def __post_init__(self) -> None:
        if self.lang != language(self.lang):
            raise DataError("the language is no tag of BCP 47; give one such as en, es or pt-BR")
        try:
            b"a".decode(self.fallback_encoding or "utf-8")
        except (LookupError, UnicodeDecodeError):
            raise DataError("the encoding is none that Python knows; name one such as cp1252 or latin-1") from None


@dataclass(frozen=True)
class Source:
    """A data set that has been looked through once; ``records`` walks it, always in the same order.

    ``root``, ``reports_root``: real paths, below which pictures and reports are opened. ``frontal_only``: what the data set
    is used for unless a site says otherwise. ``join``: completes a
    record from what its DICOM header says, and from ``joined``, a table.
    """

    root: Path
    num_rows: int
    label_names: tuple[str, ...]
    records: Callable[[], Iterator[Record | Refusal]]
    reports_root: Path | None = None
    has_patients: bool = True
    has_splits: bool = False
    frontal_only: bool = True
    fallback_encoding: str | None = None
    notes: tuple[str, ...] = ()
    join: Callable[[Record, Any], Record] | None = None
    joined: Path | None = None


def view_named(name: str) -> str:
    """What a view is called here; "unknown" for a name that says nothing certain."""
    return _VIEW_NAMES.get(name.strip().lower(), "unknown")


def split_named(name: str) -> str:
    """What a split is called here. Raises ``RefusedError``."""
    try:
        return _SPLIT_NAMES[name.strip().lower()]
    except KeyError:
        raise RefusedError("split_unknown") from None


def label_value(cell: str) -> int:
    """1 present, 0 absent, -1 for both uncertain (-1) and not mentioned (blank). Raises ``RefusedError``."""
    try:
        return _LABEL_VALUES[cell.strip()]
    except KeyError:
        raise RefusedError("label_unreadable") from None


def found_labels(named: Iterable[str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The findings to keep of a data set that names them as it goes."""
    if wanted is not None:
        return wanted
    names = tuple(sorted(set(named)))
    if len(names) > MAX_LABELS:
        raise DataError(f"the data set names {len(names)} findings, more than {MAX_LABELS}; give the list of those to keep")
    return names


def chosen_labels(known: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The findings to keep of a data set that has a fixed list of them."""
    if wanted is None:
        return known
    strange = [name for name in wanted if name not in known]
    if strange:
        raise DataError(f"the data set has no finding named {strange[0]!r}; it has {', '.join(known)}")
    return wanted
