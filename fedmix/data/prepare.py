"""A site's files -> a prepared shard: reads in threads, writes in the table's order, leaves out and counts what is bad.

Threads rather than processes: Pillow decodes and resizes without holding the interpreter, and images stay where they are
instead of being copied between processes. Files that need a sandbox (DICOM) are for child processes, not for this module.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedmix.data.images import ImageOptions, read_image
from fedmix.data.layouts import Record, Refusal, Table, TableColumns, open_table, read_inside, table_records
from fedmix.data.quarantine import REASONS, RefusedError
from fedmix.data.reports import clean, has_words
from fedmix.data.shard import Shard, ShardWriter
from fedmix.errors import DataError

if TYPE_CHECKING:
    from fedmix.batch import Stream
    from fedmix.data.tokenizer import Tokenizer

KEY_BYTES = 32
# Rows that lack what the shard is to hold are counted, yet nothing is wrong with them.
NOT_BAD = frozenset({"no_image", "no_text"})
SHOWN_ROWS = 5  # row numbers kept per reason code, for whoever goes looking


@dataclass(frozen=True)
class TableOptions:
    """How a table becomes a shard.

    ``csv``: the table, alone or below the root; None: the only CSV file in the root. ``stream``: "image" drops the texts,
    "text" the images, "paired" keeps only rows with both, None keeps every row with what it has. ``max_words``: longer texts
    are cut. ``label_names``: None takes every finding that the table names. ``split_shares``: train, val, test, by patient,
    where the table has no split column. ``max_bad_share``: more unusable rows than this end the preparation.
    """

    csv: Path | None = None
    columns: TableColumns = field(default_factory=TableColumns)
    delimiter: str = ","
    fallback_encoding: str | None = None
    image: ImageOptions = field(default_factory=ImageOptions)
    stream: Stream | None = None
    max_words: int = 128
    label_names: tuple[str, ...] | None = None
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    max_bad_share: float = 0.2
    replace: bool = False

    def __post_init__(self) -> None:
        if self.stream not in (None, "image", "text", "paired"):
            raise DataError(f"stream is {self.stream!r}; it is one of image, text, paired, or left out to keep what there is")
        if self.max_words < 2:
            raise DataError(f"max_words is {self.max_words}; at least 2 are needed, the summary token and one word")
        if not 0 <= self.max_bad_share <= 1:
            raise DataError(f"max_bad_share is {self.max_bad_share}; it is a share of the rows, from 0 to 1")
        if len(self.delimiter) != 1:
            raise DataError("the delimiter has to be one character, such as a comma, a semicolon or a tab")

    @property
    def wants_image(self) -> bool:
        """Whether images are looked at."""
        return self.stream != "text"

    @property
    def wants_text(self) -> bool:
        """Whether texts are looked at."""
        return self.stream != "image"


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation did, in counts; nothing in it names a patient, a file or a text.

    ``written``: studies of each stream. ``quarantined``: rows left out, by reason code. ``shown_rows``: for each code the
    first few row numbers of the table (the header is row 1). ``notes``: what a reader should know, in sentences.
    """

    rows: int
    written: dict[Stream, int]
    splits: dict[str, int]
    num_patients: int
    quarantined: dict[str, int]
    shown_rows: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]
    seconds: float

    @property
    def studies(self) -> int:
        """All studies written."""
        return sum(self.written.values())


def prepare_table(
    root: Path,
    out: Path,
    *,
    options: TableOptions,
    tokenizer: Tokenizer,
    key: bytes,
    workers: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepareSummary:
    """Prepare the images and reports that a CSV lists; ``on_progress`` hears rows done and rows in all.

    Bad rows are left out and counted. Raises ``DataError`` if nothing is left, if more than ``max_bad_share`` of the rows
    are bad, or if table or disk fail; then there is no shard, and an older one is untouched.
    """
    start = time.monotonic()
    real_root = _real_root(root)
    table = open_table(
        _find_csv(real_root, options.csv),
        options.columns,
        delimiter=options.delimiter,
        fallback_encoding=options.fallback_encoding,
        label_names=options.label_names,
    )
    writer = ShardWriter(
        out,
        image_size=options.image.size,
        tokenizer=tokenizer,
        key=key,
        label_names=table.label_names,
        max_words=options.max_words,
        split_shares=options.split_shares,
        replace=options.replace,
    )
    tally = _Tally(table.num_rows, options.max_bad_share)
    try:
        with writer, contextlib.closing(_in_order(real_root, table, options, workers)) as items:
            for item in items:
                _write(writer, item, tally)
                if on_progress is not None:
                    on_progress(tally.done, table.num_rows)
            tally.check_left()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise DataError(f"the shard cannot be written: {reason}; {_disk_advice(error)}") from None
    return _summary(out, table, options, tally, time.monotonic() - start)


def site_key(path: Path) -> bytes:
    """The site's secret for hashing identifiers: read from ``path``, or made there (32 random bytes, owner only).

    Keep it out of the shard and out of backups that leave the site: with it, identifiers can be guessed and compared.
    """
    if (path.parent / "shard.json").exists():
        raise DataError("the site key must not lie in a shard; choose another place")
    if not path.exists():
        _make_key(path)
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != KEY_BYTES:
        raise DataError(f"the site key is not a file of {KEY_BYTES} bytes; restore it, or name a place where none is yet")
    if status.st_mode & 0o077:
        raise DataError("the site key can be read by others; chmod 600 it")
    return path.read_bytes()


@dataclass(frozen=True)
class _Ready:
    """A record with its image decoded and its text cleaned."""

    record: Record
    image: NDArray[np.uint8] | None
    text: str | None


class _Tally:
    """Counts while the rows go by, and says when too many were bad."""

    def __init__(self, num_rows: int, max_bad_share: float) -> None:
        self.num_rows, self.done, self._max_bad_share = num_rows, 0, max_bad_share
        self.quarantined = Counter[str]()
        self.rows: dict[str, list[int]] = {}
        self.split_of: dict[str, str] = {}

    def refuse(self, refusal: Refusal) -> None:
        """Count a row that is left out; raises once the share of bad rows can no longer be met."""
        self.quarantined[refusal.code] += 1
        shown = self.rows.setdefault(refusal.code, [])
        if len(shown) < SHOWN_ROWS:
            shown.append(refusal.row)
        num_bad = sum(count for code, count in self.quarantined.items() if code not in NOT_BAD)
        if num_bad > self._max_bad_share * self.num_rows:
            raise DataError(
                f"{num_bad} of the first {self.done} rows cannot be used, more than {self._max_bad_share:.0%} of all "
                f"{self.num_rows}; {self._worst()}; mend the table, or allow a larger share"
            )

    def check_left(self) -> None:
        """Raise if no row was good."""
        if self.quarantined.total() == self.done:
            raise DataError(f"none of the {self.done} rows can be used; {self._worst()}")

    def _worst(self) -> str:
        if not self.quarantined:
            return "the table has no rows below its header"
        code, count = self.quarantined.most_common(1)[0]
        return f"most often ({count} times) {code}: {REASONS[code]}"


def _write(writer: ShardWriter, item: _Ready | Refusal, tally: _Tally) -> None:
    tally.done += 1
    if isinstance(item, _Ready):
        record = item.record
        known = tally.split_of.setdefault(record.patient, record.split) if record.split else None
        if known == record.split:
            writer.add(
                patient=record.patient,
                study=record.study,
                image=item.image,
                text=item.text,
                labels=record.labels,
                view=record.view,
                split=record.split,
            )
            return
        item = Refusal(record.row, "split_conflict")
    writer.quarantine(item.code)
    tally.refuse(item)


def _in_order(root: Path, table: Table, options: TableOptions, workers: int) -> Generator[_Ready | Refusal, None, None]:
    """Rows in the table's order, decoded by ``workers`` threads that run a little ahead of the writer."""
    ahead: deque[Future[_Ready | Refusal]] = deque()
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="prepare") as pool:
        try:
            for row in table_records(table):
                ahead.append(pool.submit(_read, root, row, options))
                if len(ahead) >= 8 * max(1, workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:  # after an error: do not decode what nobody will write
                future.cancel()


def _read(root: Path, row: Record | Refusal, options: TableOptions) -> _Ready | Refusal:
    if isinstance(row, Refusal):
        return row
    try:
        text = _read_text(row) if options.wants_text else None
        image = row.image if options.wants_image else None
        _check_streams(image is not None, text is not None, options.stream)
        return _Ready(row, None if image is None else read_image(read_inside(root, image), options.image), text)
    except RefusedError as refused:
        return Refusal(row.row, refused.code)


def _read_text(row: Record) -> str | None:
    if row.text is None:
        return None
    text = clean(row.text)
    if not has_words(text):
        raise RefusedError("text_empty")
    return text


def _check_streams(has_image: bool, has_text: bool, stream: Stream | None) -> None:
    if not has_image and not has_text and stream in (None, "paired"):
        raise RefusedError("no_image_no_text")
    if not has_image and stream in ("image", "paired"):
        raise RefusedError("no_image")
    if not has_text and stream in ("text", "paired"):
        raise RefusedError("no_text")


def _real_root(root: Path) -> Path:
    try:
        real = root.resolve(strict=True)
    except OSError:
        real = None
    if real is None or not real.is_dir():
        raise DataError("the root folder is not there; give the folder that holds the table and the images")
    return real


def _find_csv(root: Path, given: Path | None) -> Path:
    if given is not None:
        for candidate in (given, root / given):
            if candidate.is_file():
                return candidate
        raise DataError("the given CSV file is not there, neither as it stands nor below the root folder")
    tables = sorted(root.glob("*.csv"))
    if len(tables) != 1:
        raise DataError(f"the root folder holds {len(tables)} CSV files; name the one to use with --csv")
    return tables[0]


def _summary(out: Path, table: Table, options: TableOptions, tally: _Tally, seconds: float) -> PrepareSummary:
    shard = Shard.open(out, verify=False)
    return PrepareSummary(
        rows=tally.done,
        written=shard.stream_counts,
        splits=dict(shard.manifest.splits),
        num_patients=len(np.unique(shard.patient)),
        quarantined=dict(sorted(tally.quarantined.items())),
        shown_rows={code: tuple(rows) for code, rows in sorted(tally.rows.items())},
        notes=tuple(_notes(table, options, shard)),
        seconds=seconds,
    )


def _notes(table: Table, options: TableOptions, shard: Shard) -> Iterator[str]:
    columns = table.columns
    if not table.has(columns.patient):
        yield "The table has no patient column: each row counts as a patient of its own, and splits may share patients."
    if table.has(columns.split):
        absent = [name for name, count in shard.manifest.splits.items() if not count]
        yield "Splits are the table's own" + (f"; it has nothing in {' and '.join(absent)}." if absent else ".")
    else:
        yield f"Splits are drawn by patient from the site key: {', '.join(f'{share:.0%}' for share in options.split_shares)}."
    if not shard.label_names:
        yield "No findings were found: this shard cannot be used to evaluate classification."


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)  # whole or not at all; whoever comes second reads the first one's
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _disk_advice(error: OSError) -> str:
    return "free some space, or choose another place" if error.errno == errno.ENOSPC else "check the place and its permissions"
