"""The bytes of a file -> a pydicom dataset that holds the tags asked for and no others."""

from __future__ import annotations

import logging
import re
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO

from pydicom import dcmread, uid
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import read_dataset, read_preamble

from fedmix.data.quarantine import RefusedError

MAX_BYTES = 256 * 1024 * 1024  # 64 million pixels of 16 bits are half of it
MAX_INFLATED_BYTES = 160 * 1024 * 1024  # the same pixels and a generous header

_GROUPS = (b"\x08\x00", b"\x02\x00", b"\x00\x08")  # what a file without a preamble opens with, little or big endian
_STORAGE_CLASS = re.compile(rb"(?:\x08\x00\x16\x00|\x00\x08\x00\x16).{4}1\.2\.840\.10008\.5\.1\.4\.1\.1\.", re.DOTALL)
_SEARCHED_BYTES = 4096  # SOP Class is among the first tags of every data set


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are clearly DICOM.

    Either "DICM" stands behind a preamble, or the file opens with a tag of group 0002 or 0008 and the SOP Class tag among
    its first names a storage class of the standard: no other format does that by chance.
    """
    if data[128:132] == b"DICM":
        return True
    return data[:2] in _GROUPS and _STORAGE_CLASS.search(data, 0, _SEARCHED_BYTES) is not None


def open_dataset(data: bytes, tags: Sequence[str], *, stop_before_pixels: bool) -> FileDataset:
    """Read the named tags. To be called inside ``refusing``."""
    if len(data) > MAX_BYTES:
        raise RefusedError("file_too_large")
    if not is_dicom(data):
        raise RefusedError("image_format")
    meta, start = _read_meta(data)
    if meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        raise RefusedError("dicom_directory")
    if meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        data = _plain(data[:start]) + _inflate(data[start:])
    return dcmread(BytesIO(data), stop_before_pixels=stop_before_pixels, force=True, specific_tags=list(tags))


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever goes wrong inside is a refusal, and pydicom keeps silent: its warnings and errors quote the file."""
    log = logging.getLogger("pydicom")
    passes_on, log.propagate = log.propagate, False
    try:
        with warnings.catch_warnings(), disable_value_validation():
            warnings.simplefilter("ignore")
            yield
    except RefusedError:
        raise
    except MemoryError:
        raise RefusedError("decoder_memory") from None
    except Exception:
        # A damaged file can raise nearly anything, RecursionError included. Not chained: messages may quote the file.
        raise RefusedError("dicom_broken") from None
    finally:
        log.propagate = passes_on


def _read_meta(data: bytes) -> tuple[Dataset, int]:
    """Group 0002, empty where there is none, and where the data set begins."""
    file = BytesIO(data)
    read_preamble(file, force=True)
    meta = read_dataset(file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    return meta, file.tell()


def _plain(head: bytes) -> bytes:
    """Say that what follows is not deflated (any more), or pydicom would inflate it without a bound."""
    deflated, plain = (str(syntax).encode() for syntax in (uid.DeflatedExplicitVRLittleEndian, uid.ExplicitVRLittleEndian))
    return head.replace(deflated, plain.ljust(len(deflated), b"\0"))


def _inflate(packed: bytes) -> bytes:
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = machine.decompress(packed, MAX_INFLATED_BYTES)
    if machine.unconsumed_tail:
        raise RefusedError("dicom_inflates")
    if not machine.eof:
        raise RefusedError("dicom_broken")
    return inflated
