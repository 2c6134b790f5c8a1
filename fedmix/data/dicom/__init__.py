"""DICOM radiographs, read from bytes: a header of allow-listed tags, and pixels as they would be shown on a screen.

Files come from anywhere and are treated as hostile: whatever is wrong with one is a ``RefusedError`` with a reason code,
and nothing of a file's text is ever logged. What no check here can promise, that a decoder neither crashes nor hangs, is
what fedmix.data.walls is for. No path is built from a tag, and a DICOMDIR is never read.
"""

from fedmix.data.dicom.files import MAX_BYTES, is_dicom
from fedmix.data.dicom.gates import Gates, check
from fedmix.data.dicom.header import Header, View, read_header, view_of
from fedmix.data.dicom.pixels import read_pixels

__all__ = ["MAX_BYTES", "Gates", "Header", "View", "check", "is_dicom", "read_header", "read_pixels", "view_of"]
