"""DICOM files that tests write themselves: pictures of known content in every encoding, whole or spoilt."""

from __future__ import annotations

import os
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

PATIENT = "CANARY^PATIENT"  # must never be seen outside of a header
GDCM_SYNTAXES = {
    uid.JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    uid.JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    uid.JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
    uid.JPEG2000Lossless: gdcm.TransferSyntax.JPEG2000Lossless,
}
NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
LOSSLESS = (*NATIVE, uid.RLELossless, *GDCM_SYNTAXES)


def marked(rows: int = 60, columns: int = 80, bits: int = 12) -> NDArray[np.uint16]:
    """Stored values with another level in each quadrant and a slope over all, so that no turn or mirror looks the same."""
    levels = np.array([[0.9, 0.65], [0.4, 0.15]]).repeat(rows // 2, 0).repeat(columns // 2, 1)
    return ((levels + np.arange(columns) / columns / 12) * ((1 << bits) - 1)).astype(np.uint16)


def dataset(pixels: NDArray[Any], *, bits: int = 12, **tags: Any) -> Dataset:
    """A DX image for presentation; ``tags`` are added, or taken away where they are None."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = uid.DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    built = Dataset()
    built.file_meta = meta
    values: dict[str, Any] = {
        "SOPClassUID": uid.DigitalXRayImageStorageForPresentation,
        "SOPInstanceUID": "1.2.3.4",
        "StudyInstanceUID": "1.2.3",
        "AccessionNumber": "CANARY-ACC",
        "PatientID": "CANARY-ID",
        "PatientName": PATIENT,
        "Modality": "DX",
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "BurnedInAnnotation": "NO",
        "PhotometricInterpretation": "MONOCHROME2",
        "SamplesPerPixel": 1,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 8 * pixels.itemsize,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(np.issubdtype(pixels.dtype, np.signedinteger)),
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(built, keyword, value)
    built.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
    built["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    return built


def file_of(pixels: NDArray[Any], *, syntax: uid.UID = uid.ExplicitVRLittleEndian, bits: int = 12, **tags: Any) -> bytes:
    """The same as a file in a transfer syntax."""
    built = dataset(pixels, bits=bits, **tags)
    if syntax in GDCM_SYNTAXES:
        return transcoded(written(built), syntax)
    if syntax == uid.RLELossless:
        built.compress(syntax, generate_instance_uid=False)
    elif syntax == uid.JPEGBaseline8Bit:
        built.PixelData = encapsulate([jpeg(pixels)])
    elif syntax == uid.ExplicitVRBigEndian:
        built.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
    return written(built, syntax)


def written(built: Dataset, syntax: uid.UID | None = None) -> bytes:
    """A dataset as a file."""
    built.file_meta.TransferSyntaxUID = syntax or built.file_meta.TransferSyntaxUID
    if built.file_meta.TransferSyntaxUID not in NATIVE:
        built["PixelData"].VR = "OB"
        built["PixelData"].is_undefined_length = True
    buffer = BytesIO()
    built.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def bare(pixels: NDArray[Any], *, implicit: bool = True, **tags: Any) -> bytes:
    """A file without preamble and group 0002, as old machines write it."""
    buffer = BytesIO()
    built = dataset(pixels, **tags)
    del built.file_meta
    built.save_as(buffer, implicit_vr=implicit, little_endian=True)
    return buffer.getvalue()


def transcoded(data: bytes, syntax: uid.UID) -> bytes:
    """A file's pixels compressed by GDCM."""
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        before.write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(str(before))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(GDCM_SYNTAXES[syntax]))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetFileName(str(after))
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return after.read_bytes()


def jpeg(pixels: NDArray[Any], quality: int = 95) -> bytes:
    """8-bit pixels as a JPEG image."""
    buffer = BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def table(first: int, bits: int, entries: NDArray[Any], **tags: Any) -> Sequence:
    """A lookup table as the only item of its sequence."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(entries) & 0xFFFF, first, bits])
    item.add_new("LUTData", "OW", entries.astype("<u2").tobytes())
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return Sequence([item])


def open_data() -> Path:
    """The small real corpus; skips the test where it is not."""
    root = Path(os.environ.get("FEDMIX_OPEN_DATA") or Path(__file__).parents[1].parent / "shared" / "data" / "cxr-open")
    if not (root / "dicom.csv").is_file():
        pytest.skip("the small real corpus is not here; point FEDMIX_OPEN_DATA at it")
    return root
