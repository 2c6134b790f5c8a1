"""What a compressed image says of itself in its own first bytes: decoders believe these and not the DICOM header."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pydicom import uid

from fedmix.data.quarantine import RefusedError

_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
_LOSSY_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit)
_HIGH_THROUGHPUT = 1 << 14  # of the capabilities in SIZ (ITU-T T.814, A.2)
_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}  # F7 is JPEG-LS; the three are tables


class Size(NamedTuple):
    """Of a compressed image."""

    rows: int
    columns: int
    components: int


def size_of(encoded: bytes, transfer_syntax: str) -> Size:
    """The size of a JPEG, JPEG-LS or JPEG 2000 image.

    Raises ValueError or struct.error where there is no such image, and ``RefusedError`` where it is of a kind that has no
    decoder here, whatever its transfer syntax says.
    """
    if transfer_syntax in _JPEG_2000:
        return _jpeg_2000_size(encoded)
    size, bits = _jpeg_size(encoded)
    if transfer_syntax in _LOSSY_JPEG and bits != 8:
        raise RefusedError("dicom_jpeg_12_bit")
    return size


def _jpeg_size(encoded: bytes) -> tuple[Size, int]:
    """ITU-T T.81, B.2.2, and T.87, C.2.2: the frame header, and the bits of its samples."""
    if encoded[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG image")
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", encoded, position)
        if marker >> 8 != 0xFF:
            raise ValueError("not a JPEG marker")
        if marker & 0xFF in _START_OF_FRAME:
            bits, *size = struct.unpack_from(">BHHB", encoded, position + 4)
            return Size(*size), bits
        position += 1 if marker == 0xFFFF else 2 + length  # a marker may be led in by fill bytes


def _jpeg_2000_size(encoded: bytes) -> Size:
    """ITU-T T.800, A.5.1: SIZ is the second marker. DICOM has no JP2 boxes around it (PS3.5, A.4.4)."""
    if encoded[:4] != b"\xff\x4f\xff\x51":
        raise ValueError("not a JPEG 2000 codestream")
    capabilities, right, bottom, left, top = struct.unpack_from(">H4I", encoded, 6)
    if capabilities & _HIGH_THROUGHPUT:
        raise RefusedError("dicom_htj2k")
    (components,) = struct.unpack_from(">H", encoded, 40)
    return Size(bottom - top, right - left, components)
