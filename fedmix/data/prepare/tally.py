"""Counts while the rows of a data set go by: what was left out and why, and when that is too much.

What is to be remembered of a row is a note, plain values without identifiers, so that the counts of a preparation that was
interrupted are had again from its notes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedmix.data.keys import hash_of
from fedmix.data.prepare.options import NOT_BAD
from fedmix.data.prepare.reading import Outcome, Ready
from fedmix.data.quarantine import REASONS
from fedmix.errors import DataError

SHOWN_ROWS = 5  # row numbers kept per reason code, for whoever goes looking


class TooMuchLeftOutError(DataError):
    """As the data set is, it makes no shard; what was done of it is worth nothing."""


class Tally:
    """Counts by reason code, and the split of every patient seen so far.

    ``key``: the site's; patients and studies are remembered by their hashes. ``is_joined``: each file is a record, and of
    those of one study only the first is kept.
    """

    def __init__(self, num_rows: int, max_bad_share: float, *, key: bytes, is_joined: bool) -> None:
        self.num_rows, self.done, self.written, self._max_bad_share = num_rows, 0, 0, max_bad_share
        self._key, self._is_joined = key, is_joined
        self.quarantined, self.phi = Counter[str](), Counter[str]()
        self.rows: dict[str, list[int]] = {}
        self._split_of: dict[str, str] = {}
        self._studies: set[str] = set()
        self._num_bad_rows = 0

    def add(self, outcome: Outcome) -> dict[str, Any]:
        """Leave out what may not stand beside what was kept before, and count the row; its note.

        Raises once the share of bad rows can no longer be met.
        """
        self._leave_out(outcome, "image_extra", [one for one in outcome.ready if not self._is_first(one)])
        self._leave_out(outcome, "split_conflict", [one for one in outcome.ready if not self._keeps_split(one)])
        given = [one for one in outcome.ready if one.record.split is not None]
        note = {
            "row": outcome.row,
            "written": len(outcome.ready),
            "left_out": outcome.left_out,
            "phi": list(outcome.phi) if outcome.ready else [],
            "splits": {self._patient(one): one.record.split for one in given},
            "studies": [self._study(one) for one in outcome.ready] if self._is_joined else [],
        }
        self.count(note)
        return note

    def count(self, note: Mapping[str, Any]) -> None:
        """Count a row by its note."""
        self.done += 1
        self.written += note["written"]
        self.quarantined.update(note["left_out"])
        self.phi.update(note["phi"])
        self._studies.update(note["studies"])
        self._split_of.update(note["splits"])
        for code in set(note["left_out"]):
            shown = self.rows.setdefault(code, [])
            if len(shown) < SHOWN_ROWS:
                shown.append(note["row"])
        self._num_bad_rows += not NOT_BAD.issuperset(note["left_out"])
        if self._num_bad_rows > self._max_bad_share * self.num_rows:
            raise TooMuchLeftOutError(
                f"{self._num_bad_rows} of the first {self.done} rows cannot be used, more than {self._max_bad_share:.0%} of "
                f"all {self.num_rows}; {self._worst()}; mend the data, or allow a larger share"
            )

    def check_left(self) -> None:
        """Raise if no row was good."""
        if not self.written:
            raise TooMuchLeftOutError(f"none of the {self.done} rows can be used; {self._worst()}")

    def _leave_out(self, outcome: Outcome, code: str, ones: list[Ready]) -> None:
        for one in ones:
            outcome.ready.remove(one)
            outcome.left_out.append(code)

    def _is_first(self, one: Ready) -> bool:
        """Whether no study stands before it: a report comes with one image only."""
        return not self._is_joined or self._study(one) not in self._studies

    def _keeps_split(self, one: Ready) -> bool:
        """Whether its patient belongs to this split: to the first that was given."""
        return one.record.split is None or self._split_of.get(self._patient(one), one.record.split) == one.record.split

    def _patient(self, one: Ready) -> str:
        return hash_of(self._key, "patient", one.record.patient or "")

    def _study(self, one: Ready) -> str:
        return hash_of(self._key, "study", f"{one.record.patient}\0{one.record.study}")

    def _worst(self) -> str:
        if not self.quarantined:
            return "the table has no rows below its header"
        code, count = max(self.quarantined.items(), key=lambda item: (item[0] not in NOT_BAD, item[1]))
        return f"most often ({count} times) {code}: {REASONS[code]}"
