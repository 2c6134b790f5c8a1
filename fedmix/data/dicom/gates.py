"""What a header has to say before a decoder sees the pixels."""

from __future__ import annotations

from dataclasses import dataclass

from pydicom import uid

from fedmix.data.dicom.header import Header
from fedmix.data.images import MAX_PIXELS, MIN_SIDE
from fedmix.data.quarantine import RefusedError

MAX_SIDE = 10_000  # pixels; the largest chest detectors have about 5,000
MIN_BITS, MAX_BITS = 8, 16

_RADIOGRAPHS = (uid.ComputedRadiographyImageStorage, uid.DigitalXRayImageStorageForPresentation)
_HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)
_CHEST_WORDS = ("CHEST", "THORAX", "TORAX", "TÓRAX", "LUNG", "RIB")

# One decoder for each transfer syntax, where pydicom alone would try the next when one fails, and nobody would know.
# Deflated files are inflated before.
DECODERS = {
    uid.ImplicitVRLittleEndian: "",
    uid.ExplicitVRLittleEndian: "",
    uid.ExplicitVRBigEndian: "",
    uid.RLELossless: "pydicom",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",  # its 8-bit kind; the other has no decoder here
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "gdcm",
    uid.JPEGLSNearLossless: "gdcm",
    uid.JPEG2000Lossless: "gdcm",
    uid.JPEG2000: "gdcm",
}


@dataclass(frozen=True)
class Gates:
    """What a site lets in beyond CR and DX images for presentation.

    ``secondary_capture``: screenshots and scanned films too, where a name may stand in the pixels. ``unmarked``: images whose
    header does not say whether anything is burned in; those that say YES are always refused.
    """

    secondary_capture: bool = False
    unmarked: bool = True


def check(header: Header, gates: Gates) -> None:
    """Raise ``RefusedError`` unless this is a single grey chest radiograph of a size and encoding that can be read."""
    _check_kind(header, gates)
    _check_shape(header)
    if header.transfer_syntax in _HTJ2K:
        raise RefusedError("dicom_htj2k")
    if header.transfer_syntax not in DECODERS:
        raise RefusedError("dicom_transfer_syntax")
    if header.transfer_syntax == uid.JPEGExtended12Bit and header.bits_stored != 8:
        raise RefusedError("dicom_jpeg_12_bit")


def _check_kind(header: Header, gates: Gates) -> None:
    is_capture = header.sop_class == uid.SecondaryCaptureImageStorage
    if header.sop_class not in _RADIOGRAPHS and not is_capture:
        raise RefusedError("dicom_class")
    if is_capture and not gates.secondary_capture:
        raise RefusedError("dicom_secondary_capture")
    if header.modality not in ("CR", "DX"):
        raise RefusedError("dicom_modality")
    if header.body_part and not any(word in header.body_part for word in _CHEST_WORDS):
        raise RefusedError("dicom_body_part")
    if header.burned_in not in ("NO", ""):
        raise RefusedError("dicom_burned_in")
    if not header.burned_in and not gates.unmarked:
        raise RefusedError("dicom_unmarked")


def _check_shape(header: Header) -> None:
    if header.frames != 1:
        raise RefusedError("dicom_frames")
    if header.samples != 1 or header.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise RefusedError("dicom_colour")
    if max(header.rows, header.columns) > MAX_SIDE or header.rows * header.columns > MAX_PIXELS:
        raise RefusedError("image_too_large")
    if min(header.rows, header.columns) < MIN_SIDE:
        raise RefusedError("image_too_small")
    if (
        header.bits_allocated not in (8, 16)
        or not MIN_BITS <= header.bits_stored <= header.bits_allocated
        or header.high_bit != header.bits_stored - 1
    ):
        raise RefusedError("dicom_bits")
