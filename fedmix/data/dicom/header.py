"""The tags that are read, and nothing else: what a radiograph is, how it lies, whose it is (to be hashed by the caller)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from pydicom import uid
from pydicom.dataset import Dataset, FileDataset
from pydicom.multival import MultiValue

from fedmix.data.characteristics import AGE_BANDS, SEXES, UNKNOWN, band_between, band_named, sex_named
from fedmix.data.dicom.files import open_dataset, refusing

View = Literal["PA", "AP", "lateral", "unknown"]

MAX_TEXT = 64  # what the standard allows for the longest of these values

HEADER_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "AccessionNumber",
    "Modality",
    "ConversionType",
    "PatientID",
    "PatientSex",
    "PatientAge",
    "PatientBirthDate",
    "StudyDate",
    "BodyPartExamined",
    "ViewPosition",
    "ViewCodeSequence",
    "StudyInstanceUID",
    "PatientOrientation",
    "Laterality",
    "ImageLaterality",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "BurnedInAnnotation",
    "PresentationLUTShape",
)

_POSITIONS: Mapping[str, View] = {
    "PA": "PA",
    "AP": "AP",
    **dict.fromkeys(("LL", "RL", "L", "LAT", "LATERAL", "LLAT", "LARGE LATERAL"), "lateral"),
}
_CODES: Mapping[str, View] = {  # PS3.16 CID 4010: meanings, SNOMED CT codes and the older ones of SNOMED RT
    **dict.fromkeys(("postero-anterior", "posteroanterior", "272479007", "R-40888"), "PA"),
    **dict.fromkeys(("antero-posterior", "anteroposterior", "399348003", "R-10206"), "AP"),
    **dict.fromkeys(("lateral", "399067008"), "lateral"),
    **dict.fromkeys(("left lateral", "399173006", "R-10236", "right lateral", "399198007", "R-10232"), "lateral"),
}


@dataclass(frozen=True)
class Header:
    """What was read of a file's header; blank or 0 where it does not say.

    ``patient_id``, ``study_instance_uid``, ``sop_instance_uid`` and ``accession_number`` name a person: hash them, and keep
    them out of every file, log and message. ``view_code``: value and meaning of the first view code. ``orientation``: towards
    which side of the patient rows and columns run. ``sex``, ``age_band``: as ``fedmix.data.characteristics`` names them; the
    age and the dates that a band is made of go no further than the process that reads the file.
    """

    patient_id: str
    study_instance_uid: str
    sop_instance_uid: str
    accession_number: str
    sop_class: str
    transfer_syntax: str
    modality: str
    conversion_type: str
    body_part: str
    view_position: str
    view_code: tuple[str, ...]
    orientation: tuple[str, ...]
    laterality: str
    sex: str
    age_band: str
    burned_in: str
    photometric: str
    presentation: str
    samples: int
    frames: int
    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool

    def to_bytes(self) -> bytes:
        """As JSON, to be sent from the process that read it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        """What ``to_bytes`` made; ValueError where a name or a type is another."""
        values = json.loads(data)
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        kinds = {field.name: str(field.type).split("[")[0] for field in fields(cls)}
        if {name: type(value).__name__ for name, value in values.items()} != kinds:
            raise ValueError("not a header")
        if values["sex"] not in SEXES or values["age_band"] not in AGE_BANDS:
            raise ValueError("not a header")
        return cls(**values)


def read_header(data: bytes) -> Header:
    """The header of a DICOM file. Raises ``RefusedError`` with the reason code."""
    with refusing():
        return header_of(open_dataset(data, HEADER_TAGS, stop_before_pixels=True))


def view_of(header: Header) -> View:
    """How the rays went: the view position, else the view code, else what the orientation rules out. Never a guess.

    Rows that run from front to back show a patient from the side. Rows that run from side to side do not say whether the rays
    came from the front or the back, so such a header is "unknown".
    """
    position = _POSITIONS.get(header.view_position.upper())
    if position is not None:
        return position
    for code in header.view_code:
        view = _CODES.get(code) or _CODES.get(code.lower())
        if view is not None:
            return view
    return "lateral" if any(side[:1] in ("A", "P") for side in header.orientation) else "unknown"


def header_of(dataset: FileDataset) -> Header:
    """What a dataset says in the allow-listed tags. To be called inside ``refusing``."""
    return Header(
        patient_id=_text(dataset, "PatientID"),
        study_instance_uid=_text(dataset, "StudyInstanceUID"),
        sop_instance_uid=_text(dataset, "SOPInstanceUID"),
        accession_number=_text(dataset, "AccessionNumber"),
        sop_class=_text(dataset, "SOPClassUID"),
        transfer_syntax=_transfer_syntax(dataset),
        modality=_text(dataset, "Modality").upper(),
        conversion_type=_text(dataset, "ConversionType").upper(),
        body_part=_text(dataset, "BodyPartExamined").upper(),
        view_position=_text(dataset, "ViewPosition").upper(),
        view_code=_view_code(dataset),
        orientation=tuple(part.strip().upper() for part in _text(dataset, "PatientOrientation").split("\\") if part.strip()),
        laterality=_text(dataset, "ImageLaterality") or _text(dataset, "Laterality"),
        sex=sex_named(_text(dataset, "PatientSex")),
        age_band=_age_band(dataset),
        burned_in=_text(dataset, "BurnedInAnnotation").upper(),
        photometric=_text(dataset, "PhotometricInterpretation").upper(),
        presentation=_text(dataset, "PresentationLUTShape").upper(),
        samples=_number(dataset, "SamplesPerPixel"),
        frames=_number(dataset, "NumberOfFrames", absent=1),
        rows=_number(dataset, "Rows"),
        columns=_number(dataset, "Columns"),
        bits_allocated=_number(dataset, "BitsAllocated"),
        bits_stored=_number(dataset, "BitsStored"),
        high_bit=_number(dataset, "HighBit"),
        is_signed=_number(dataset, "PixelRepresentation") != 0,
    )


def _text(dataset: Dataset, keyword: str) -> str:
    value = dataset.get(keyword)
    parts = value if isinstance(value, MultiValue) else [value]
    return "\\".join("" if part is None else str(part) for part in parts).strip(" \0")[:MAX_TEXT]


def _number(dataset: Dataset, keyword: str, absent: int = 0) -> int:
    """A whole number; 0, which no gate lets pass, where it is something else or of a type that the standard does not allow."""
    if keyword not in dataset:
        return absent
    raw = dataset.get_item(keyword)
    if raw is None or raw.VR not in (None, "US", "IS"):
        return 0
    value: Any = dataset.get(keyword)
    if value is None:
        return absent
    return int(value) if isinstance(value, int) else 0


def _transfer_syntax(dataset: FileDataset) -> str:
    """As the file says; where it does not, as pydicom found its tags encoded."""
    if "TransferSyntaxUID" in dataset.file_meta:
        return _text(dataset.file_meta, "TransferSyntaxUID")
    is_implicit, is_little = dataset.original_encoding
    if is_implicit:
        return str(uid.ImplicitVRLittleEndian)
    return str(uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian)


def _view_code(dataset: Dataset) -> tuple[str, ...]:
    items = dataset.get("ViewCodeSequence") or []
    found = [_text(item, keyword) for item in items[:1] for keyword in ("CodeValue", "CodeMeaning")]
    return tuple(text for text in found if text)


def _age_band(dataset: Dataset) -> str:
    """Of the age with its unit, else of birth and study date."""
    age = _text(dataset, "PatientAge")
    band = band_named(age) if age[-1:].isalpha() else UNKNOWN  # without a unit it may be months
    return band_between(_text(dataset, "PatientBirthDate"), _text(dataset, "StudyDate")) if band == UNKNOWN else band
