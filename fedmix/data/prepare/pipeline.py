"""A site's files -> a prepared shard: reads in threads, writes in the data set's order, leaves out and counts what is bad.

A preparation that was killed goes on behind the last row it had finished, and ends with the bytes of one that was not.

Threads read reports and wait for the worker processes that decode pictures, of which only finished squares come back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedmix.data.characteristics import UNKNOWN
from fedmix.data.deidentification import Deidentification
from fedmix.data.layouts.records import TRAIN_OR_VAL, Record, Refusal, Source
from fedmix.data.prepare.decoding import decoding
from fedmix.data.prepare.options import PrepareOptions, PrepareSummary
from fedmix.data.prepare.parts import of_part
from fedmix.data.prepare.reading import Outcome, read_study
from fedmix.data.prepare.resuming import mark_of_row, mark_of_settings
from fedmix.data.prepare.tally import Tally, TooMuchLeftOutError
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.errors import DataError

if TYPE_CHECKING:
    from fedmix.data.tokenizer import Tokenizer

ROWS_AHEAD = 8  # per worker: enough that none waits for the writer, few enough that little is held in memory


def prepare(
    source: Source,
    out: Path,
    *,
    options: PrepareOptions,
    tokenizer: Tokenizer,
    key: bytes,
    workers: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> PrepareSummary:
    """Prepare the studies of a data set; ``on_progress`` hears rows done and rows in all.

    Bad rows are left out and counted. Raises ``DataError`` if nothing is left, if more than ``max_bad_share`` of the rows
    are bad, or if table or disk fail; then there is no shard, and an older one is untouched. Unless it was the data set that
    was not fit, what was finished stays beside ``out`` for the next call; that one raises ``DataError`` where its options, key
    or tokenizer are others or the data set has changed, until ``options.fresh`` says to start over.
    """
    start = time.monotonic()
    if source.join is not None and not options.wants_image:
        raise DataError("DICOM files hold no reports; for a shard of texts alone prepare their table with the layout table")
    if options.part is not None:
        source = of_part(source, options.part, key)
    writer = ShardWriter(
        out,
        image_size=options.image.size,
        tokenizer=tokenizer,
        key=key,
        label_names=source.label_names,
        max_words=options.max_words,
        split_shares=options.split_shares,
        keeps_characteristics=options.keeps_characteristics,
        replace=options.replace,
        mark=mark_of_settings(source, options, tokenizer=tokenizer, key=key),
        fresh=options.fresh,
    )
    is_joined = source.join is not None and options.stream != "image"
    tally = Tally(source.num_rows, options.max_bad_share, key=key, is_joined=is_joined)
    rows = source.records()
    try:
        with writer:
            num_before = _go_on(writer, tally, source, rows, key)
            if on_progress is not None and num_before:
                on_progress(num_before, source.num_rows)
            try:
                with contextlib.closing(_in_order(source, rows, options, workers, key)) as outcomes:
                    for mark, outcome in () if writer.is_finished else outcomes:
                        _write(writer, mark, outcome, tally)
                        if on_progress is not None:
                            on_progress(tally.done, source.num_rows)
                tally.check_left()
            except TooMuchLeftOutError:
                writer.discard()
                raise
            writer.describe(_deidentification(options, tally))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        raise DataError(f"the shard cannot be written: {reason}; {_disk_advice(error)}") from None
    return _summary(out, source, options, tally, num_before, time.monotonic() - start)


def _go_on(writer: ShardWriter, tally: Tally, source: Source, rows: Iterator[Record | Refusal], key: bytes) -> int:
    """Count what an interrupted preparation has done, and leave ``rows`` at the first that it has not; how many it had done."""
    for mark, note in writer.rows_done():
        row = next(rows, None)
        if row is None or mark_of_row(source, row, key) != mark:
            raise DataError(
                f"the data set has changed since its preparation was interrupted, in or before row {note['row']}; "
                "bring it back to go on, or start over with --fresh"
            )
        tally.count(note)
    return tally.done


def _write(writer: ShardWriter, mark: str, outcome: Outcome, tally: Tally) -> None:
    note = tally.add(outcome)
    for one in outcome.ready:
        writer.add(
            patient=_given(one.record.patient),
            study=_given(one.record.study),
            image=one.image,
            text=one.text,
            labels=one.record.labels,
            view=one.view,
            lang="" if one.record.report is None else one.record.report.lang,
            characteristics=one.characteristics,
            split=None if one.record.split == TRAIN_OR_VAL else one.record.split,
            never_test=one.record.split == TRAIN_OR_VAL,
        )
    for code in outcome.left_out:
        writer.quarantine(code)
    writer.end_row((mark, note))


def _given(identifier: str | None) -> str:
    assert identifier is not None, "a record without identifiers is completed when its files are read"
    return identifier


def _in_order(
    source: Source, rows: Iterator[Record | Refusal], options: PrepareOptions, workers: int, key: bytes
) -> Generator[tuple[str, Outcome], None, None]:
    """Rows in the data set's order with their marks, read by ``workers`` threads that run a little ahead of the writer."""
    ahead: deque[Future[tuple[str, Outcome]]] = deque()
    with (
        decoding(source, options, workers) as decode,
        ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="prepare") as pool,
    ):

        def read(row: Record | Refusal) -> tuple[str, Outcome]:
            mark = mark_of_row(source, row, key)  # before its files are opened: a change in between is to be noticed
            return mark, read_study(source, row, options, decode)

        try:
            for row in rows:
                ahead.append(pool.submit(read, row))
                if len(ahead) >= ROWS_AHEAD * max(1, workers):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:  # after an error: do not decode what nobody will write
                future.cancel()


def _summary(
    out: Path, source: Source, options: PrepareOptions, tally: Tally, num_before: int, seconds: float
) -> PrepareSummary:
    shard = Shard.open(out, verify=False)
    before = (f"Went on behind {num_before} rows that an interrupted preparation had done.",) if num_before else ()
    return PrepareSummary(
        rows=tally.done,
        written=shard.stream_counts,
        splits=dict(shard.manifest.splits),
        num_patients=len(np.unique(shard.patient)),
        quarantined=dict(sorted(tally.quarantined.items())),
        shown_rows={code: tuple(rows) for code, rows in sorted(tally.rows.items())},
        phi=dict(sorted(tally.phi.items())),
        notes=(*before, *source.notes, *_notes(source, options, tally, shard)),
        seconds=seconds,
    )


def _notes(source: Source, options: PrepareOptions, tally: Tally, shard: Shard) -> Iterator[str]:
    if not source.has_patients:
        yield "The table has no patient column: each row counts as a patient of its own, and splits may share patients."
    if source.has_splits:
        absent = [name for name, count in shard.manifest.splits.items() if not count]
        yield "Splits are the data set's own" + (f"; it has nothing in {' and '.join(absent)}." if absent else ".")
    else:
        yield f"Splits are drawn by patient from the site key: {', '.join(f'{share:.0%}' for share in options.split_shares)}."
    if tally.phi:
        yield f"{max(tally.phi.values())} or more texts with dates, numbers or names were kept, as --phi count asks."
    if options.keeps_characteristics:
        known = [shard.num_studies - said.count(UNKNOWN) for said in (shard.sex, shard.age_band)]
        yield f"Sex is kept of {known[0]} and the age band of {known[1]} studies, as --keep-characteristics asks."
    if not shard.label_names:
        yield "No findings were found: this shard cannot be used to evaluate classification."


def _deidentification(options: PrepareOptions, tally: Tally) -> Deidentification:
    said = Deidentification(
        burned_in_not_stated="kept" if options.takes_unmarked else "left out",
        texts="left out where the gate found something" if options.phi == "quarantine" else "searched and kept",
        texts_kept_with=dict(sorted(tally.phi.items())),
    )
    return said.keeping_characteristics() if options.keeps_characteristics else said


def _disk_advice(error: OSError) -> str:
    return (
        "free some space and start again, or choose another place"
        if error.errno == errno.ENOSPC
        else "check the place and its permissions"
    )
