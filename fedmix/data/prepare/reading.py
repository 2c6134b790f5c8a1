"""One study's files -> what a shard holds of it, or the reason codes why not. Nothing here knows what comes before or after.

A study gives one row: its first usable image by the data set's order, with its report; further images are counted, since a
report that stands beside two images would be its own wrong answer in contrast. Where only images are wanted, each is a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedmix.data import phi
from fedmix.data.characteristics import NOT_SAID, Characteristics
from fedmix.data.layouts.paths import read_first
from fedmix.data.layouts.records import Record, Refusal, Report, Source
from fedmix.data.pictures import Decode, Decoded, check_view
from fedmix.data.prepare.options import NOT_BAD, PrepareOptions
from fedmix.data.quarantine import RefusedError
from fedmix.data.reports import clean, decode, has_words, pick

if TYPE_CHECKING:
    from fedmix.batch import Stream
    from fedmix.data.dicom import Header

MAX_REPORT_BYTES = 1024 * 1024  # a hundred times the longest radiology reports, before they are cleaned and cut


@dataclass(frozen=True, eq=False)
class Ready:
    """A study (or one of its images) with the image decoded and the text cleaned."""

    record: Record
    view: str
    image: NDArray[np.uint8] | None
    text: str | None
    characteristics: Characteristics


@dataclass
class Outcome:
    """What became of one row: studies to write, codes of what was left out, kinds of PHI that were let through."""

    row: int
    ready: list[Ready] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    phi: tuple[str, ...] = ()


def read_study(source: Source, row: Record | Refusal, options: PrepareOptions, decode: Decode) -> Outcome:
    """Open, decode and check everything of one study."""
    outcome = Outcome(row.row)
    if isinstance(row, Refusal):
        outcome.left_out.append(row.code)
        return outcome
    try:
        if source.join is None:
            _read(source, row, options, outcome, decode)
        else:
            _read_joined(source, row, options, outcome, decode)
    except RefusedError as refused:
        outcome.left_out.append(refused.code)
    return outcome


def _read(source: Source, record: Record, options: PrepareOptions, outcome: Outcome, decode: Decode) -> None:
    """Text first: it costs little, and a study that is refused for it is not decoded."""
    text = _text(source, record.report, options, outcome) if options.wants_text else None
    images = _images(source, record, options, outcome, decode) if options.wants_image else []
    _finish(record, images, text, options, outcome)


def _read_joined(source: Source, record: Record, options: PrepareOptions, outcome: Outcome, decode: Decode) -> None:
    """Image first: whose report belongs to it, only the file says."""
    assert source.join is not None
    images = _images(source, record, options, outcome, decode)
    if not images:
        return
    named = source.join(record, images[0].header)
    text = _text(source, named.report, options, outcome) if options.wants_text else None
    _finish(named, images, text, options, outcome)


def _finish(record: Record, images: list[Decoded], text: str | None, options: PrepareOptions, outcome: Outcome) -> None:
    missing = _missing(bool(images), text is not None, options.stream)
    if missing is not None:
        outcome.left_out += [] if outcome.left_out else [missing]  # why an image or report is not there has been said
        return
    if not images:
        outcome.ready.append(Ready(record, "unknown", None, text, _characteristics(record, None, options)))
    outcome.ready += [
        Ready(record, decoded.view, decoded.image, text, _characteristics(record, decoded.header, options))
        for decoded in images
    ]


def _characteristics(record: Record, header: Header | None, options: PrepareOptions) -> Characteristics:
    """What the file says, or else the table; nothing goes further than here unless the site asks for it."""
    if not options.keeps_characteristics:
        return NOT_SAID
    return record.characteristics if header is None else Characteristics(header.sex, header.age_band)


def _text(source: Source, report: Report | None, options: PrepareOptions, outcome: Outcome) -> str | None:
    if report is None:
        return None
    whole = _whole(source, report)
    if whole is None:
        outcome.left_out.append("report_missing")
        return None
    text = clean(pick(whole, options.sections))
    if not text and report.sections is not None:
        return None  # the data set keeps the sections apart and has none of the wanted
    if not has_words(text):
        raise RefusedError("text_empty")
    found = phi.kinds(text)
    if found and options.phi == "quarantine":
        raise RefusedError(found[0])
    outcome.phi = found
    return text


def _whole(source: Source, report: Report) -> Any:
    """The report as it is stored: its sections or its text, or None where there is no file."""
    if report.sections is not None:
        return report.sections
    if report.text is not None:
        return report.text
    try:
        data = read_first(source.reports_root or source.root, report.places)
    except RefusedError as refused:
        if refused.code == "file_missing":
            return None
        raise
    if len(data) > MAX_REPORT_BYTES:
        raise RefusedError("file_too_large")
    return decode(data, fallback=source.fallback_encoding)


def _images(source: Source, record: Record, options: PrepareOptions, outcome: Outcome, decode: Decode) -> list[Decoded]:
    """The usable images of a study, no more than the first where it may also have a report."""
    found: list[Decoded] = []
    codes: list[str] = []
    for picture in record.pictures:
        try:
            check_view(picture.view, options.views_of(source))
            if found and options.stream != "image":
                raise RefusedError("image_extra")
            found.append(decode(picture))
        except RefusedError as refused:
            codes.append(refused.code)
    bad = [code for code in codes if code not in NOT_BAD]
    if bad and not found:  # a report whose image is damaged is no report without an image
        codes.remove(bad[-1])
        outcome.left_out += codes
        raise RefusedError(bad[-1])
    outcome.left_out += codes
    return found


def _missing(has_image: bool, has_text: bool, stream: Stream | None) -> str | None:
    """What keeps a study out of a shard of this stream, as a reason code."""
    if not has_image and not has_text and stream in (None, "paired"):
        return "no_image_no_text"
    if not has_image and stream in ("image", "paired"):
        return "no_image"
    return "no_text" if not has_text and stream in ("text", "paired") else None
