"""One data set as several institutes: each patient outside the official test split belongs to one of n parts, by the site key.

So the pairs of one part, the images of another and the reports of a third are of different patients, and what a federation
learns of the unpaired ones it cannot have had from the pairs. Patients of the test split are in every part: they train
nothing, and an evaluation on any of the shards is on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from fedmix.data.keys import hash_of
from fedmix.data.layouts.records import Record, Refusal, Source
from fedmix.errors import DataError


def of_part(source: Source, part: tuple[int, int], key: bytes) -> Source:
    """The data set with the patients of all parts but the k-th of n, ``part`` = (k, n), refused as ``other_part``.

    Raises ``DataError`` for a data set that does not say itself who is tested on.
    """
    if not source.has_splits:
        raise DataError(
            "parts are taken of the patients outside the official test split, and this data set has no splits; put the "
            "tables of its splits into ROOT, or leave --part out"
        )
    number, num_parts = part

    def records() -> Iterator[Record | Refusal]:
        for row in source.records():
            is_elsewhere = (
                isinstance(row, Record)
                and row.split != "test"
                and int(hash_of(key, "part", row.patient or ""), 16) % num_parts != number - 1
            )
            yield Refusal(row.row, "other_part") if is_elsewhere else row

    return replace(source, records=records)
