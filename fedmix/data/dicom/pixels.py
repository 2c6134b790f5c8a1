"""A DICOM file -> grey values as a reader would see them on a screen, with rows and columns as they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from fedmix.data.dicom.codestream import size_of
from fedmix.data.dicom.display import DISPLAY_TAGS, grey_table
from fedmix.data.dicom.files import open_dataset, refusing
from fedmix.data.dicom.gates import DECODERS, Gates, check
from fedmix.data.dicom.header import HEADER_TAGS, Header, header_of
from fedmix.data.quarantine import RefusedError

_RLE_GROWTH, _RLE_BYTES = 2, 1024  # a clumsy writer spends two bytes on each, and what is around them; more is a bomb
_BLOCK = 1 << 18  # pixels at a time: indices of 8 bytes each stay in the cache, and memory does not grow with the image


def read_pixels(data: bytes, *, gates: Gates | None = None) -> NDArray[np.uint8]:
    """The bytes of a DICOM file -> [H, W]. Raises ``RefusedError`` with the reason code, gates before any decoding."""
    with refusing():
        dataset = open_dataset(data, (*HEADER_TAGS, *DISPLAY_TAGS, "PixelData"), stop_before_pixels=False)
        header = header_of(dataset)
        check(header, gates or Gates())
        pixels = _decode(dataset, header)
        return _through(grey_table(dataset, header, lambda: _count(pixels, header)), pixels)


def _decode(dataset: FileDataset, header: Header) -> NDArray[Any]:
    """Stored values [H, W]; bits above those stored may hold anything."""
    if "PixelData" not in dataset:
        raise RefusedError("dicom_no_pixels")
    _check_length(dataset.PixelData, header)
    syntax = uid.UID(header.transfer_syntax)
    options: dict[str, Any] = {} if syntax.is_encapsulated else {"view_only": True, "correct_unused_bits": False}
    pixels, _ = get_decoder(syntax).as_array(dataset, index=0, raw=True, decoding_plugin=DECODERS[syntax], **options)
    return pixels


def _check_length(encoded: bytes, header: Header) -> None:
    """Header and pixels have to agree before a decoder allocates anything."""
    expected = header.rows * header.columns * (header.bits_allocated // 8)
    if not uid.UID(header.transfer_syntax).is_encapsulated:
        agrees = len(encoded) in (expected, expected + expected % 2)
    elif header.transfer_syntax == uid.RLELossless:
        agrees = len(encoded) <= _RLE_GROWTH * expected + _RLE_BYTES
    else:
        size = size_of(get_frame(encoded, 0, number_of_frames=1), header.transfer_syntax)
        agrees = size == (header.rows, header.columns, 1)
    if not agrees:
        raise RefusedError("dicom_size_mismatch")


def _patterns(pixels: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The bits of the pixels as unsigned numbers of this machine's byte order, block by block."""
    flat = pixels.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        native = block.astype(block.dtype.newbyteorder("="), copy=False)
        yield native.view(f"u{native.itemsize}")


def _count(pixels: NDArray[Any], header: Header) -> NDArray[np.int64]:
    """[2 ** bits_stored]: how many pixels have each pattern of stored bits; those above are not part of the image."""
    counts = np.zeros(1 << 8 * pixels.itemsize, np.int64)
    for block in _patterns(pixels):
        counts += np.bincount(block, minlength=len(counts))
    folded: NDArray[np.int64] = counts.reshape(-1, 1 << header.bits_stored).sum(axis=0)
    return folded


def _through(table: NDArray[np.uint8], pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Look every pixel up; bits above those stored change nothing, since the table is repeated for each of their values."""
    repeated = np.tile(table, (1 << 8 * pixels.itemsize) // len(table))
    grey = np.empty(pixels.size, np.uint8)
    for number, block in enumerate(_patterns(pixels)):
        part = grey[number * _BLOCK : number * _BLOCK + block.size]
        np.take(repeated, block, out=part, mode="clip")  # nothing is beyond; the default would fill another array first
    return grey.reshape(pixels.shape)
