"""Counts while the rows of a data set go by: what was left out and why, and when that is too much."""

from __future__ import annotations

from collections import Counter

from fedmix.data.prepare.options import NOT_BAD
from fedmix.data.prepare.reading import Outcome
from fedmix.data.quarantine import REASONS
from fedmix.errors import DataError

SHOWN_ROWS = 5  # row numbers kept per reason code, for whoever goes looking


class Tally:
    """Counts by reason code, and the split of every patient seen so far."""

    def __init__(self, num_rows: int, max_bad_share: float) -> None:
        self.num_rows, self.done, self.written, self._max_bad_share = num_rows, 0, 0, max_bad_share
        self.quarantined, self.phi = Counter[str](), Counter[str]()
        self.rows: dict[str, list[int]] = {}
        self._split_of: dict[str, str] = {}
        self._studies: set[tuple[str | None, str | None]] = set()
        self._num_bad_rows = 0

    def add(self, outcome: Outcome) -> None:
        """Count a row; raises once the share of bad rows can no longer be met."""
        self.done += 1
        self.written += len(outcome.ready)
        self.quarantined.update(outcome.left_out)
        self.phi.update(outcome.phi if outcome.ready else ())
        for code in set(outcome.left_out):
            shown = self.rows.setdefault(code, [])
            if len(shown) < SHOWN_ROWS:
                shown.append(outcome.row)
        self._num_bad_rows += not NOT_BAD.issuperset(outcome.left_out)
        if self._num_bad_rows > self._max_bad_share * self.num_rows:
            raise DataError(
                f"{self._num_bad_rows} of the first {self.done} rows cannot be used, more than {self._max_bad_share:.0%} of "
                f"all {self.num_rows}; {self._worst()}; mend the data, or allow a larger share"
            )

    def keeps_split(self, patient: str, split: str) -> bool:
        """Whether a patient belongs to this split: to the first that was given."""
        return self._split_of.setdefault(patient, split) == split

    def keep_first(self, outcome: Outcome) -> None:
        """Leave out what has a study before it: where each file is a record, a report comes with one image only."""
        for one in tuple(outcome.ready):
            study = (one.record.patient, one.record.study)
            if study in self._studies:
                outcome.ready.remove(one)
                outcome.left_out.append("image_extra")
            self._studies.add(study)

    def check_left(self) -> None:
        """Raise if no row was good."""
        if not self.written:
            raise DataError(f"none of the {self.done} rows can be used; {self._worst()}")

    def _worst(self) -> str:
        if not self.quarantined:
            return "the table has no rows below its header"
        code, count = max(self.quarantined.items(), key=lambda item: (item[0] not in NOT_BAD, item[1]))
        return f"most often ({count} times) {code}: {REASONS[code]}"
