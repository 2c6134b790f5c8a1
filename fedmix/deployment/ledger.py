"""A ledger: one JSON line for every event, each holding the hash of the line before it.

An edit, a deletion or a new order breaks the chain. A tail that was cut at a line's end does not, so the newest hash is kept
apart as well: beside the ledger in a head file, and with every peer that a message went to. Who may write both files of one
side can still rewrite its history, but not the heads that its peers wrote down.

An entry counts once the head file names it, and only then may what it tells of happen. So a torn last line after a kill is
of something that never happened and is cut off; damage to anything older is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fedmix.disk import reason_of, write_whole
from fedmix.errors import LedgerError

NO_HEAD = ""  # what stands before the first entry
MAX_LINE_BYTES = 1 << 16
OWN_FIELDS = {"index", "time", "event", "previous", "hash"}
MEND = "put back the newest copy that verifies, and tell your peers before you go on"


@dataclass(frozen=True)
class Verified:
    """A ledger that is whole: its entries and the newest one's hash."""

    entries: int
    head: str


@dataclass(frozen=True)
class _Head:
    """The newest acknowledged entry: how many there are, its hash, and the bytes up to its end."""

    entries: int = 0
    hash: str = NO_HEAD
    size: int = 0


class Ledger:
    """A ledger that is written to, by several processes if need be."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, event: str, **facts: Any) -> str:
        """Write an entry, have the disk confirm it, and return the new head.

        ``facts`` are plain JSON values under other names than an entry's own. Raises LedgerError where the entry cannot be
        kept, or where the ledger's tail is not what was written last.
        """
        with self._opened() as file:
            before = self._mended(file)
            entry = {"index": before.entries, "time": _now(), "event": event, "previous": before.hash}
            line, digest = _line_of(entry, facts)
            _write_line(file, line, at=before.size)
            self._keep_head(_Head(before.entries + 1, digest, before.size + len(line)))
        return digest

    def head(self) -> str:
        """The hash of the newest entry; empty before the first."""
        with self._opened() as file:
            return self._mended(file).hash

    def entries(self) -> Iterator[dict[str, Any]]:
        """The entries from the oldest on; raises LedgerError at the first that does not follow from the one before."""
        return _chain(self._path)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise LedgerError(f"the ledger cannot be kept: {reason_of(error)}; see to its folder and its disk") from None

    def _mended(self, file: IO[bytes]) -> _Head:
        """The head to go on from, once what a kill left behind it is out of the way."""
        head, size = _read_head(self._path), file.seek(0, os.SEEK_END)
        if size < head.size or _last_hash(file, head.size) != head.hash:
            raise LedgerError(f"the ledger's last entry is not the one that was written last; {MEND}")
        if size == head.size:
            return head
        file.seek(head.size)
        rest = file.read(MAX_LINE_BYTES + 1)
        if not rest.endswith(b"\n"):
            if len(rest) > MAX_LINE_BYTES or b"\n" in rest:
                raise LedgerError(f"the ledger goes on after its head with what it never wrote; {MEND}")
            file.truncate(head.size)
            return head
        # Killed between the entry and its head: a whole entry is kept, for it says no less than what happened.
        entry = _entry_of(rest, index=head.entries, previous=head.hash)
        found = _Head(head.entries + 1, entry["hash"], head.size + len(rest))
        self._keep_head(found)
        return found

    def _keep_head(self, head: _Head) -> None:
        write_whole(head_file(self._path), json.dumps({"entries": head.entries, "hash": head.hash, "size": head.size}))


def verify(path: Path, *, peer: Path | None = None, name: str | None = None) -> Verified:
    """Check a ledger from its first entry to its head.

    ``peer``: the other side's ledger, itself checked, each of whose ``peer_head`` has to be in this one; with ``name``,
    those alone that it wrote down for the ``peer`` of this name. Raises LedgerError that says which line is wrong, or that
    the peer wrote down no head.
    """
    hashes = [NO_HEAD, *(entry["hash"] for entry in _chain(path))]
    found = Verified(len(hashes) - 1, hashes[-1])
    head = _read_head(path)
    if (head.entries, head.hash, head.size) != (found.entries, found.head, path.stat().st_size if path.exists() else 0):
        raise LedgerError(
            f"the ledger has {found.entries} entries, its head file says {head.entries} with another end: entries were cut or "
            "added, or the writer was killed just now and mends it when it goes on"
        )
    if peer is not None:
        _compare(set(hashes), peer, name)
    return found


def measured(sizes: Iterable[int], arrays: Iterable[tuple[str, bytes]]) -> dict[str, Any]:
    """What an entry says of a message's content, alike at both ends: its bytes, the number of objects, its arrays' hash.

    ``sizes``: bytes of each object that it travels as; ``arrays``: names and bytes, in an order that both ends have.
    """
    sizes, seen = list(sizes), hashlib.sha256()
    for name, data in arrays:
        seen.update(f"{name}\n".encode())
        seen.update(data)
    return {"bytes": sum(sizes), "objects": len(sizes), "sha256": seen.hexdigest() if sizes else ""}


def head_file(path: Path) -> Path:
    """Where a ledger's newest hash is kept apart from it."""
    return path.with_suffix(".head")


def _compare(hashes: set[str], peer: Path, name: str | None) -> None:
    num_heads = 0
    for line, entry in enumerate(_chain(peer), start=1):
        concerns = name is None or entry.get("peer") == name
        num_heads += concerns and bool(entry.get("peer_head"))
        if concerns and entry.get("peer_head", NO_HEAD) not in hashes:
            raise LedgerError(
                f"the peer wrote down a head on {entry['time']} (its line {line}) that this ledger does not hold: entries "
                "were cut off or rewritten here"
            )
    if not num_heads:
        raise LedgerError(
            "the peer's ledger is missing, or holds no head of this one, so nothing was compared; is it the right file?"
        )


def _chain(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a ledger, each checked against the one before."""
    previous, index = NO_HEAD, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                entry = _entry_of(line, index=index, previous=previous)
                yield entry
                previous, index = entry["hash"], index + 1
    except FileNotFoundError:
        return  # nothing was written yet
    except OSError as error:
        raise LedgerError(f"the ledger cannot be read: {reason_of(error)}") from None


def _entry_of(line: bytes, *, index: int, previous: str) -> dict[str, Any]:
    """The entry of a line, if it is the one that belongs there, to the byte."""
    try:
        entry = json.loads(line)
        said = entry.pop("hash")
        written, digest = _line_of(entry, {})
        fits = (entry["index"], entry["previous"], said, written) == (index, previous, digest, line)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError, LedgerError):
        fits = False
    if not fits:
        raise LedgerError(f"line {index + 1} of the ledger was changed, moved or cut, or a line before it is missing")
    return {**entry, "hash": said}


def _line_of(entry: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[bytes, str]:
    """An entry's one way of being written, and its hash (SHA-256 over the same without the hash)."""
    if OWN_FIELDS & facts.keys():
        raise LedgerError(f"an entry names {', '.join(sorted(OWN_FIELDS & facts.keys()))} itself; call the fact otherwise")
    try:
        rest = {**entry, **facts}
        digest = hashlib.sha256(_canonical(rest)).hexdigest()
        line = _canonical({**rest, "hash": digest}) + b"\n"
    except (TypeError, ValueError) as error:
        raise LedgerError(f"an entry holds what JSON cannot write ({type(error).__name__})") from None
    if len(line) > MAX_LINE_BYTES:
        raise LedgerError(f"an entry of {len(line)} bytes; a ledger's line has at most {MAX_LINE_BYTES}")
    return line, digest


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _write_line(file: IO[bytes], line: bytes, *, at: int) -> None:
    file.seek(at)
    try:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), at)  # a full disk took a part of it
        raise


def _read_head(path: Path) -> _Head:
    try:
        values = json.loads(head_file(path).read_bytes())
        head = _Head(values["entries"], values["hash"], values["size"])
        if [type(each) for each in (head.entries, head.hash, head.size)] != [int, str, int]:
            raise TypeError
        return head
    except FileNotFoundError:
        return _Head()
    except (ValueError, KeyError, TypeError):
        raise LedgerError(f"the ledger's head file is not readable; {MEND}") from None


def _last_hash(file: IO[bytes], size: int) -> str | None:
    """The hash of the line that ends at a place in the file."""
    if size == 0:
        return NO_HEAD
    start = max(0, size - MAX_LINE_BYTES - 1)
    file.seek(start)
    before = file.read(size - start)
    line = before[before.rfind(b"\n", 0, -1) + 1 :]
    try:
        entry = json.loads(line)
        return str(_entry_of(line, index=entry["index"], previous=entry["previous"])["hash"])
    except (ValueError, KeyError, TypeError, LedgerError):
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
