"""What a site looks at before a prepared shard is trained on: a contact sheet and a page of counts, for the site alone.

::

    FOLDER/ sheet.png   some 48 images, evenly drawn, each with its row and view
            index.html  the same images, counts, lengths of reports, what was left out and how to mend it

Neither holds a report's text, an identifier, a hash of one or the name of a file, but both hold patients' images: the folder
is made for its owner only, lies outside the shard, and nothing of fedmix sends it anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmix.data.inspection import Declaration, declaration
from fedmix.data.quarantine import MENDING, REASONS
from fedmix.data.shard import Shard
from fedmix.disk import reason_of
from fedmix.errors import DataError
from fedmix.report.contact_sheet import Square, contact_sheet, drawn_squares
from fedmix.report.files import write_text
from fedmix.report.pages import environment

NUM_BINS = 12


@dataclass(frozen=True)
class Finding:
    """How many studies have a finding, have it not, or do not say."""

    name: str
    present: int
    absent: int
    unknown: int


@dataclass(frozen=True)
class Bin:
    """Texts of ``first`` to ``last`` token ids, and their share of the fullest bin."""

    first: int
    last: int
    count: int
    share: float


@dataclass(frozen=True)
class Lengths:
    """Token ids of the texts; ``num_cut``: texts that fill all that was allowed, so that most of these were cut."""

    bins: tuple[Bin, ...]
    median: int
    longest: int
    num_cut: int
    allowed: int


@dataclass(frozen=True)
class LeftOut:
    """A reason why rows or files were left out."""

    code: str
    count: int
    reason: str
    mending: str


@dataclass(frozen=True)
class Preview:
    """Everything the page shows."""

    num_studies: int
    num_images: int
    fingerprint: str
    said: Declaration
    squares: tuple[Square, ...]
    findings: tuple[Finding, ...]
    lengths: Lengths | None
    left_out: tuple[LeftOut, ...]


def check_place(folder: Path, shard: Path | None = None) -> None:
    """Raise ``DataError`` where a preview must not be written: in a shard, be it there or about to be (``shard``)."""
    place = folder.resolve()
    around = (place, *place.parents)
    if any((outer / "shard.json").exists() for outer in around) or (shard is not None and shard.resolve() in around):
        raise DataError("the preview must not lie in a shard, which may leave the site; choose another place")
    if folder.exists() and not folder.is_dir():
        raise DataError("the preview's place is a file; name a folder")


def write_preview(shard: Shard, folder: Path) -> Path:
    """Write ``index.html`` and ``sheet.png`` into ``folder``, made for its owner only if it is not there; returns the page."""
    check_place(folder, shard.path)
    preview = look_at(shard)
    page = environment().get_template("preview.html.j2").render(preview=preview)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sheet = folder / "sheet.png"
        sheet.unlink(missing_ok=True)  # an older shard's images must not stand beside this one's counts
        if preview.squares:
            contact_sheet(preview.squares).save(sheet, format="PNG", optimize=True)
        write_text(folder / "index.html", page)
    except OSError as error:
        raise DataError(f"the preview cannot be written: {reason_of(error)}; check the place and its permissions") from None
    return folder / "index.html"


def look_at(shard: Shard) -> Preview:
    """What the page shows of a shard."""
    counts = shard.manifest.quarantine
    return Preview(
        num_studies=shard.num_studies,
        num_images=shard.manifest.num_images,
        fingerprint=shard.fingerprint,
        said=declaration(shard),
        squares=tuple(drawn_squares(shard)),
        findings=_findings(shard),
        lengths=_lengths(shard),
        left_out=tuple(
            LeftOut(code, counts[code], REASONS.get(code, "not known here"), MENDING.get(code, ""))
            for code in sorted(counts, key=lambda code: (-counts[code], code))
        ),
    )


def _findings(shard: Shard) -> tuple[Finding, ...]:
    """The most frequent first."""
    columns = [(shard.labels == value).sum(axis=0).tolist() for value in (1, 0, -1)]
    found = [Finding(*row) for row in zip(shard.label_names, *columns, strict=True)]
    return tuple(sorted(found, key=lambda finding: (-finding.present, finding.name)))


def _lengths(shard: Shard) -> Lengths | None:
    lengths = np.diff(shard.offsets)[shard.has_text]
    if not len(lengths):
        return None
    allowed, longest = shard.manifest.max_words, int(lengths.max())
    width = -(-longest // NUM_BINS)
    counts = np.bincount((lengths - 1) // width).tolist()
    return Lengths(
        bins=tuple(
            Bin(number * width + 1, (number + 1) * width, count, count / max(counts)) for number, count in enumerate(counts)
        ),
        median=int(np.median(lengths)),
        longest=longest,
        num_cut=int((lengths >= allowed).sum()),
        allowed=allowed,
    )
