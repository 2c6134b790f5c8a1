"""The updates of a round on the server's disk, in the form they came in, read back slice by slice.

Thirty-two updates of a large model do not fit into memory, and the sum must not depend on who answered first. So a reply
is written down when it has been taken, and the round's end adds parameter after parameter, sites in the order of their
names (fedmix/federation/aggregate.py). The file has no name: however the process ends, nothing of it is left.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Size, Tensor

from fedmix import config
from fedmix.batch import Stream
from fedmix.errors import RunError
from fedmix.federation.compression import decode_rows
from fedmix.federation.update import rows_of


class Lines(Protocol):
    """One part of a coded parameter: an array with one line per row, in memory or on disk."""

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        """Some of the lines."""
        ...


@dataclass(frozen=True)
class Coded:
    """A site's update as it travelled: a Contribution (fedmix/federation/update.py) whose parts are decoded when read."""

    site: str
    examples: Mapping[Stream, int]
    steps: int
    parts: Mapping[str, Mapping[str, Lines]]
    shapes: Mapping[str, Size]
    wire: config.Wire
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    second_moments: Mapping[str, float] = field(default_factory=dict)

    def names(self) -> Collection[str]:
        """Parameters whose change was sent."""
        return self.parts.keys()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter's change, float32 [stop - start, columns]."""
        _, columns = rows_of(self.shapes[name])
        return decode_rows({part: lines[start:stop] for part, lines in self.parts[name].items()}, columns, self.wire)


@dataclass(frozen=True)
class _OnDisk:
    """Lines in the spool's file."""

    handle: int
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        start, stop, _ = rows.indices(self.shape[0])
        lines = np.empty((max(stop - start, 0), *self.shape[1:]), self.dtype)
        line_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        _read(self.handle, lines.reshape(-1).view(np.uint8).data, self.offset + start * line_bytes)
        return lines


class Spool:
    """One round's updates in a file without a name."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError if the folder cannot be written."""
        try:
            self._folder = folder
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # open as long as the round
        except OSError as error:
            raise RunError(
                f"cannot keep a round's updates in {folder}: {error.strerror}; mend it and go on with --resume"
            ) from None
        self._end = 0

    def add(self, update: Coded) -> Coded:
        """Write an update down; returns the same update, read from disk from now on. Raises RunError on a full disk."""
        try:
            return replace(
                update,
                parts={
                    name: {part: self._write(lines[:]) for part, lines in parts.items()} for name, parts in update.parts.items()
                },
            )
        except OSError as error:
            raise RunError(
                f"cannot keep a round's updates: {error.strerror}; make room for them and go on with --resume, no committed "
                "round is lost"
            ) from None

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()
        with contextlib.suppress(OSError):  # somebody else's file in it, or a next round's spool
            self._folder.rmdir()

    def _write(self, lines: NDArray[Any]) -> _OnDisk:
        place = _OnDisk(self._file.fileno(), self._end, lines.dtype, lines.shape)
        waiting = np.ascontiguousarray(lines).reshape(-1).view(np.uint8).data
        while waiting:
            written = os.pwrite(self._file.fileno(), waiting, self._end)
            self._end += written
            waiting = waiting[written:]
        return place


def _read(handle: int, into: memoryview, offset: int) -> None:
    while into:
        found = os.preadv(handle, [into], offset)
        if not found:
            raise RunError("the file of the round's updates is shorter than what was written to it; check the disk")
        into, offset = into[found:], offset + found
