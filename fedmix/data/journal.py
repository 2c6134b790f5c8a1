"""What a preparation has finished, line by line, so that one that was killed goes on where it was.

::

    .NAME.partial/ journal.jsonl  a mark of what is prepared and how, then a line for each study, for what was left out, and for
                                  each row of the data set that is done
                   shard/         the member files, as they grow
                   older/         the shard that is being replaced, for as long as one takes the other's place

- A line is written once what it tells of is on the disk. Whatever stands behind the last row that is done is cut off before
  the work goes on, and done again.
- One process writes at a time: it holds a lock, which the system takes back from a process that is killed.
- Lines hold keyed hashes, counts and reason codes, no more than the shard does.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedmix.disk import flush
from fedmix.errors import DataError

Line = list[Any]  # its kind, and what there is to say

ROW = "row"  # the kind of line that ends what belongs to one row of the data set


class Journal:
    """The work folder beside a shard's goal, locked for this process until it is closed.

    ``mark``: of everything that decides what the shard will be; with None nothing outlives this process, and the folder has
    a name of its own. Raises ``DataError`` where another process is at work, or where work of another mark was interrupted
    and ``fresh`` does not say to start over. ``is_new``: whether nothing was there to go on with.
    """

    def __init__(self, goal: Path, mark: str | None, *, fresh: bool = False) -> None:
        goal.parent.mkdir(parents=True, exist_ok=True)
        between = "" if mark else f"{secrets.token_hex(4)}."
        self._goal, self._home, self._is_lasting = goal, goal.parent / f".{goal.name}.{between}partial", mark is not None
        self.folder, self._older = self._home / "shard", self._home / "older"
        self._home.mkdir(exist_ok=True)
        self._file = open(self._home / "journal.jsonl", "a+b")  # noqa: SIM115  held, with its lock, until ``close``
        try:
            self._lock()
            self.is_new = self._begins(mark or "", fresh=fresh)
        except BaseException:
            self.close()
            raise

    @property
    def is_finished(self) -> bool:
        """Whether the shard was in its place already when the process that made it ended."""
        return not self.folder.exists()

    def lines(self) -> Iterator[Line]:
        """Everything that was written, in order."""
        with open(self._file.name, "rb") as file:
            next(file)
            yield from map(json.loads, file)

    def write(self, lines: Iterable[Line]) -> None:
        """Add lines; what they tell of has to be on the disk."""
        self._file.write(b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines))
        self._file.flush()
        if self._is_lasting:
            os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Put the shard in its place; an older one steps aside first and is deleted last."""
        if not self.is_finished:
            if self._goal.exists():
                self._goal.rename(self._older)
            self.folder.rename(self._goal)
            flush(self._goal.parent)
        self.discard()

    def discard(self) -> None:
        """Keep nothing of the work."""
        self._settle_older()
        shutil.rmtree(self._home, ignore_errors=True)

    def close(self) -> None:
        """Let others in; what is there stays."""
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError("another process prepares this very shard; wait for it, or choose another place") from None

    def _begins(self, mark: str, *, fresh: bool) -> bool:
        """Go on behind the last row that is done, or begin; whether this is a beginning."""
        found, end = _read(Path(self._file.name))
        if end and found == mark and not fresh and (self.folder.exists() or self._goal.exists()):
            os.truncate(self._file.fileno(), end)
            return False
        if end and found != mark and not fresh and self.folder.exists():
            raise DataError(
                "an interrupted preparation of this shard was started with other options, another key or another tokenizer; "
                "give the same to go on with it, or start over with --fresh"
            )
        os.truncate(self._file.fileno(), 0)
        self._settle_older()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.write([["mark", mark]])
        return True

    def _settle_older(self) -> None:
        """A shard that stepped aside for one that never came is put back."""
        if self._older.exists() and not self._goal.exists():
            self._older.rename(self._goal)
        shutil.rmtree(self._older, ignore_errors=True)


def _read(path: Path) -> tuple[str, int]:
    """The mark, and where the last row that is done ends: 0 where there is none, and so nothing to lose."""
    mark, end, position = "", 0, 0
    with open(path, "rb") as file:
        for data in file:
            try:
                kind, *said = json.loads(data if data.endswith(b"\n") else b"")
            except ValueError:  # the process was killed in the midst of this line, or the machine lost power
                break
            if not position and kind == "mark":
                mark = said[0]
            position += len(data)
            if kind == ROW:
                end = position
    return mark, end
