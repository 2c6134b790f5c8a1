"""How large a compressed image says it is, in its own first bytes: decoders believe these and not the DICOM header."""

from __future__ import annotations

import struct

from pydicom import uid

_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
_RLE_HEADER_BYTES = 64
_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}  # F7 is JPEG-LS; the three are tables


def size_of(encoded: bytes, transfer_syntax: str) -> tuple[int, int, int] | None:
    """Rows, columns and components of a JPEG, JPEG-LS or JPEG 2000 image; None for RLE, which does not say.

    Raises ValueError or struct.error where there is no such image.
    """
    if transfer_syntax == uid.RLELossless:
        return None
    return _jpeg_2000_size(encoded) if transfer_syntax in _JPEG_2000 else _jpeg_size(encoded)


def _jpeg_size(encoded: bytes) -> tuple[int, int, int]:
    """ITU-T T.81, B.2.2, and T.87, C.2.2: the frame header."""
    if encoded[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG image")
    position = 2
    while True:
        marker, length = struct.unpack_from(">HH", encoded, position)
        if marker >> 8 != 0xFF:
            raise ValueError("not a JPEG marker")
        if marker & 0xFF in _START_OF_FRAME:
            rows, columns, components = struct.unpack_from(">HHB", encoded, position + 5)
            return rows, columns, components
        position += 1 if marker == 0xFFFF else 2 + length  # a marker may be led in by fill bytes


def _jpeg_2000_size(encoded: bytes) -> tuple[int, int, int]:
    """ITU-T T.800, A.5.1: SIZ is the second marker. DICOM has no JP2 boxes around it (PS3.5, A.4.4)."""
    if encoded[:4] != b"\xff\x4f\xff\x51":
        raise ValueError("not a JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack_from(">4I", encoded, 8)
    (components,) = struct.unpack_from(">H", encoded, 40)
    return bottom - top, right - left, components
