"""What a site may decide about its shard, and what the preparation tells it in the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fedmix.data import phi
from fedmix.data.images import ImageOptions
from fedmix.data.reports.sections import DEFAULT_SECTIONS, check_wanted
from fedmix.errors import DataError

if TYPE_CHECKING:
    from fedmix.batch import Stream
    from fedmix.data.layouts.records import Source

Views = Literal["frontal", "frontal-or-unknown", "all"]
VIEWS_TAKEN: dict[Views, frozenset[str]] = {
    "frontal": frozenset({"PA", "AP"}),
    "frontal-or-unknown": frozenset({"PA", "AP", "unknown"}),
    "all": frozenset({"PA", "AP", "lateral", "unknown"}),
}
# Left out and counted, yet nothing is wrong with them.
NOT_BAD = frozenset(
    {"no_image", "no_text", "view_lateral", "view_unknown", "image_extra", "report_missing", "not_dicom", "other_part"}
)


@dataclass(frozen=True)
class PrepareOptions:
    """How studies become a shard.

    ``stream``: "image" drops the texts, "text" the images, "paired" keeps only studies with both, None keeps every study
    with what it has. ``sections``: which of a report's go in, or ("whole",). ``max_words``: longer texts are cut. ``phi``:
    what happens to a study whose text still holds dates, numbers or names: it is left out, or only counted. ``views``: None
    leaves it to the layout. ``takes_unmarked``: DICOM images that do not say whether anything is burned in.
    ``takes_captures``: DICOM secondary captures. ``split_shares``: train, val, test, by patient, where the data set has no
    splits. ``max_bad_share``: more unusable rows than this end the preparation. ``replace``: an older shard may be replaced.
    ``fresh``: start over, where an interrupted preparation could be gone on with. ``part``: (k, n) keeps, of the patients
    outside the official test split, those of the k-th of n parts, counted from 1 (``fedmix.data.prepare.parts``).
    ``keeps_characteristics``: sex and age band go in, as far as the data set says them (PS3.15: Retain Patient
    Characteristics).
    """

    image: ImageOptions = field(default_factory=ImageOptions)
    stream: Stream | None = None
    sections: tuple[str, ...] = DEFAULT_SECTIONS
    max_words: int = 128
    phi: phi.Policy = "quarantine"
    views: Views | None = None
    takes_unmarked: bool = True
    takes_captures: bool = False
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    max_bad_share: float = 0.2
    replace: bool = False
    fresh: bool = False
    part: tuple[int, int] | None = None
    keeps_characteristics: bool = False

    def __post_init__(self) -> None:
        if self.stream not in (None, "image", "text", "paired"):
            raise DataError(f"stream is {self.stream!r}; it is one of image, text, paired, or left out to keep what there is")
        if self.max_words < 2:
            raise DataError(f"max_words is {self.max_words}; at least 2 are needed, the summary token and one word")
        if not 0 <= self.max_bad_share <= 1:
            raise DataError(f"max_bad_share is {self.max_bad_share}; it is a share of the rows, from 0 to 1")
        if self.phi not in phi.POLICIES:
            raise DataError(f"phi is {self.phi!r}; it is one of {', '.join(phi.POLICIES)}")
        if self.views is not None and self.views not in VIEWS_TAKEN:
            raise DataError(f"views is {self.views!r}; it is one of {', '.join(VIEWS_TAKEN)}")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise DataError(f"part {self.part[0]} of {self.part[1]} does not exist; give one such as 1/3, 2/3 or 3/3")
        check_wanted(self.sections)

    def views_of(self, source: Source) -> frozenset[str]:
        """The views that are taken of a source: what was asked for, or what the source is for."""
        return VIEWS_TAKEN[self.views or ("frontal" if source.frontal_only else "all")]

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

    ``rows``: of the data set's table. ``written``: studies of each stream. ``quarantined``: what was left out, by reason code.
    ``shown_rows``: for each code the first few row numbers (the header is row 1). ``phi``: texts that were kept in spite of
    what the gate found, by kind. ``notes``: what a reader should know, in sentences.
    """

    rows: int
    written: dict[Stream, int]
    splits: dict[str, int]
    num_patients: int
    quarantined: dict[str, int]
    shown_rows: dict[str, tuple[int, ...]]
    phi: dict[str, int]
    notes: tuple[str, ...]
    seconds: float

    @property
    def studies(self) -> int:
        """All studies written."""
        return sum(self.written.values())
