"""Opening what a cell names: below the root, component by component, and never through a link that leads out.

Cells come from whoever wrote the table and are treated as hostile: a path is checked as text first, then resolved, then
walked without following links, so that neither '..' nor a symbolic link nor a swap in between can leave the root.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from fedmix.data.quarantine import RefusedError
from fedmix.errors import DataError

MAX_FILE_BYTES = 256 * 1024 * 1024  # an uncompressed 16-bit image of 64 Mpx is half of it
MAX_PATH_LENGTH = 4096

_ERRNO_CODES = {
    errno.ENOENT: "file_missing",
    errno.ENOTDIR: "file_missing",
    errno.ELOOP: "path_escape",  # a link that appeared after the path was resolved
    errno.ENXIO: "file_not_regular",
    errno.ENAMETOOLONG: "path_too_long",
}


def open_inside(root: Path, cell: str) -> BinaryIO:
    """Open the regular file that a cell names under ``root`` (a real path), for reading. Raises ``RefusedError``.

    Links may point anywhere inside the root. The path is resolved first and then walked without following links, so what
    is opened is what was checked.
    """
    parts = path_parts(cell)
    resolved = Path(os.path.realpath(root.joinpath(*parts)))
    if not resolved.is_relative_to(root):
        raise RefusedError("path_escape")
    folder = -1
    try:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        *folders, name = resolved.relative_to(root).parts or (".",)
        for part in folders:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Not blocking: a pipe without a writer would hold the whole preparation.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise RefusedError(_ERRNO_CODES.get(error.errno or 0, "file_unreadable")) from None
    finally:
        if folder >= 0:
            os.close(folder)
    return _checked(file)


def read_inside(root: Path, cell: str) -> bytes:
    """The bytes of the file that a cell names under ``root``. Raises ``RefusedError``."""
    with open_inside(root, cell) as file:
        try:
            return file.read()
        except OSError:
            raise RefusedError("file_unreadable") from None


def real_root(root: Path) -> Path:
    """The root without links, as the functions below want it. Raises ``DataError``."""
    try:
        real = root.resolve(strict=True)
    except OSError:
        real = None
    if real is None or not real.is_dir():
        raise DataError("the root folder is not there; give the folder that holds the data")
    return real


def read_first(root: Path, places: Sequence[str]) -> bytes:
    """The bytes of the first of some paths that is there; what ends in .gz is unpacked. Raises ``RefusedError``."""
    for place in places:
        try:
            data = read_inside(root, place)
        except RefusedError as refused:
            if refused.code != "file_missing":
                raise
            continue
        return unpacked(data) if place.endswith(".gz") else data
    raise RefusedError("file_missing")


def unpacked(data: bytes) -> bytes:
    """What a gzip file holds, if that is no more than a file may have. Raises ``RefusedError``."""
    inflater = zlib.decompressobj(wbits=31)
    try:
        content = inflater.decompress(data, MAX_FILE_BYTES + 1)
    except zlib.error:
        raise RefusedError("gzip_broken") from None
    if len(content) > MAX_FILE_BYTES:
        raise RefusedError("file_too_large")
    if not inflater.eof:
        raise RefusedError("gzip_broken")
    return content


def path_parts(cell: str) -> list[str]:
    """What a path says, before the disk is asked. Raises ``RefusedError``."""
    try:
        too_long = len(os.fsencode(cell)) > MAX_PATH_LENGTH
    except UnicodeEncodeError:
        raise RefusedError("path_control") from None
    if too_long:
        raise RefusedError("path_too_long")
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in cell):
        raise RefusedError("path_control")
    if "\\" in cell:
        raise RefusedError("path_backslash")
    if cell.startswith("/") or re.match(r"[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*:/", cell):
        raise RefusedError("path_absolute")
    parts = [part for part in cell.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise RefusedError("path_parent")
    return parts


def _checked(descriptor: int) -> BinaryIO:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        raise RefusedError("file_too_large" if stat.S_ISREG(status.st_mode) else "file_not_regular")
    return os.fdopen(descriptor, "rb")
