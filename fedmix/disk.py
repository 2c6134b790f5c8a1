"""What every room that writes to disk needs: the disk's word that something is there, and what went wrong in plain words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path


def flush(path: Path) -> None:
    """Have the disk confirm a file or folder before something relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    """Write a file that is there whole or not at all, even if the power fails; for one writer at a time."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def errno_of(error: Exception) -> int | None:
    """The system's number of what went wrong; safetensors hides it in the text of its own error."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def reason_of(error: Exception) -> str:
    """What the system said, without the path that its errors quote: a path may name a person."""
    number = errno_of(error)
    return type(error).__name__ if number is None else os.strerror(number)


def is_held(folder: Path) -> bool:
    """Whether a process works in a run folder. Asked with a shared lock, which takes no right to write there."""
    with contextlib.suppress(OSError), (folder / ".lock").open() as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False
