"""Stored value -> grey on a screen, as a table over all values a pixel can have.

The steps are those of PS3.3 C.11: modality table or rescale, VOI table or the first window, inversion for MONOCHROME1 after
that. pydicom's helpers do the same to every pixel; they are not used because a VOI table of 8 bits with more than 256
entries wraps around in them, and a negative rescale slope turns a window's white into black. Where a file says nothing of
what to show, percentiles of its pixels do, whatever its bits, so that 8- and 12-bit copies of an image come out alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from fedmix.data.dicom.header import Header
from fedmix.data.images import HIGH_PERCENTILE, LOW_PERCENTILE
from fedmix.data.quarantine import RefusedError

DISPLAY_TAGS = (
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "ModalityLUTSequence",
    "RescaleIntercept",
    "RescaleSlope",
    "VOILUTSequence",
    "WindowCenter",
    "WindowWidth",
    "VOILUTFunction",
)

Values = NDArray[np.float64]  # one for each pattern of stored bits


class Shown(NamedTuple):
    """Values with the two that are to be darkest and brightest; what lies beyond is cut."""

    values: Values
    dark: float
    bright: float


def grey_table(dataset: Dataset, header: Header, count: Callable[[], NDArray[np.int64]]) -> NDArray[np.uint8]:
    """[2 ** bits_stored]: how bright each pattern of stored bits is shown. ``count``: how many pixels have each pattern.

    Padding is black. Raises RefusedError: a table, slope or window that means nothing, or an image of one value.
    """
    stored = stored_values(header)
    is_padding = _padding(dataset, header, stored)
    values, dark, bright = _shown(dataset, header, stored, lambda: np.where(is_padding, 0, count()))
    if header.photometric == "MONOCHROME1" or header.presentation == "INVERSE":  # both say the same, and often together
        dark, bright = bright, dark
    table: NDArray[np.uint8] = np.rint(255 * ((values - dark) / (bright - dark)).clip(0, 1)).astype(np.uint8)
    table[is_padding] = 0
    return table


def stored_values(header: Header) -> NDArray[np.int64]:
    """The numbers that patterns of stored bits stand for."""
    patterns = np.arange(1 << header.bits_stored)
    return patterns - ((patterns >> header.bits_stored - 1) << header.bits_stored) if header.is_signed else patterns


def _shown(dataset: Dataset, header: Header, stored: NDArray[np.int64], count: Callable[[], NDArray[np.int64]]) -> Shown:
    values = _modality(dataset, header, stored)
    table = _table_item(dataset, "VOILUTSequence")
    if table is not None:
        looked_up = _look_up(values, table, header)
        return _between(looked_up, looked_up.min(), looked_up.max())  # some makers declare 16 bits and fill 12
    centre, width = (_first_number(dataset, keyword) for keyword in ("WindowCenter", "WindowWidth"))
    if centre is not None and width is not None:
        return _window(values, centre, width, str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper())
    return _percentiles(values, count())


def _modality(dataset: Dataset, header: Header, stored: NDArray[np.int64]) -> Values:
    """PS3.3 C.11.1: the modality table, else slope and intercept, else the stored values."""
    table = _table_item(dataset, "ModalityLUTSequence")
    if table is not None:
        return _look_up(stored.astype(np.float64), table, header)
    slope, intercept = (_first_number(dataset, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    if slope == 0:
        raise RefusedError("dicom_display")
    return stored.astype(np.float64) * (1.0 if slope is None else slope) + (intercept or 0.0)


def _window(values: Values, centre: float, width: float, function: str) -> Shown:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "LINEAR" and width >= 1:
        centre, width = centre - 0.5, max(width - 1, 1e-6)  # a width of 1 is a threshold
    elif function not in ("LINEAR_EXACT", "SIGMOID") or width <= 0:
        raise RefusedError("dicom_display")
    if function == "SIGMOID":
        return Shown(1 / (1 + np.exp((-4 * (values - centre) / width).clip(-700, 700))), 0.0, 1.0)
    return _between(values, centre - width / 2, centre + width / 2)


def _percentiles(values: Values, counts: NDArray[np.int64]) -> Shown:
    """Stretch between two percentiles, as other 16-bit images are; between the ends where nearly all pixels are alike."""
    order = np.argsort(values, kind="stable")
    cumulative = np.cumsum(counts[order])
    if not cumulative[-1]:
        raise RefusedError("image_blank")
    at = np.searchsorted(cumulative, np.array([LOW_PERCENTILE, HIGH_PERCENTILE]) / 100 * cumulative[-1])
    low, high = values[order[at]]
    if low == high:
        present = values[counts > 0]
        low, high = present.min(), present.max()
    if low == high:
        raise RefusedError("image_blank")
    return _between(values, low, high)


def _between(values: Values, dark: float, bright: float) -> Shown:
    if not np.isfinite([dark, bright]).all() or dark >= bright:
        raise RefusedError("dicom_display")
    return Shown(values, float(dark), float(bright))


def _table_item(dataset: Dataset, keyword: str) -> Dataset | None:
    """The first table of a sequence that has one."""
    items = dataset.get(keyword) or []
    first: Dataset | None = next(iter(items), None)
    return first if first is not None and "LUTDescriptor" in first and "LUTData" in first else None


def _look_up(values: Values, item: Dataset, header: Header) -> Values:
    """PS3.3 C.11.1.1: entries from the first value on; values before and behind take the first and last entry."""
    count, first, bits = (int(number) for number in item.LUTDescriptor)  # some makers write them as text
    count = count & 0xFFFF or 1 << 16  # 0 stands for 65,536
    if header.is_signed and first > 0x7FFF:
        first -= 1 << 16
    entries = _entries(item.LUTData, count, header)
    if not 8 <= bits <= 16 or len(entries) < count:
        raise RefusedError("dicom_display")
    looked_up: Values = entries[np.clip(values - first, 0, count - 1).astype(np.int64)].astype(np.float64)
    return looked_up


def _entries(data: Any, count: int, header: Header) -> NDArray[np.int64]:
    if not isinstance(data, bytes):
        return np.atleast_1d(np.asarray(data, np.int64)) & 0xFFFF
    if len(data) < 2 * count:  # two entries of 8 bits in a word
        return np.frombuffer(data, np.uint8).astype(np.int64)
    is_big = header.transfer_syntax == "1.2.840.10008.1.2.2"
    return np.frombuffer(data[: 2 * count], ">u2" if is_big else "<u2").astype(np.int64)


def _first_number(dataset: Dataset, keyword: str) -> float | None:
    """The first of a list: others are alternatives for a reader to choose. None where there is nothing."""
    value: Any = dataset.get(keyword)
    if isinstance(value, MultiValue):
        value = next(iter(value), None)
    if value is None or value == "":
        return None
    number = float(value)
    if not np.isfinite(number):
        raise RefusedError("dicom_display")
    return number


def _padding(dataset: Dataset, header: Header, stored: NDArray[np.int64]) -> NDArray[np.bool_]:
    """PS3.3 C.7.5.1.1.2: which stored values stand for no image; both ends of the range belong to it."""
    value, limit = (_first_number(dataset, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if value is None:
        return np.zeros(len(stored), np.bool_)
    ends = sorted(_as_stored(int(end), header) for end in (value, value if limit is None else limit))
    return (stored >= ends[0]) & (stored <= ends[1])


def _as_stored(number: int, header: Header) -> int:
    """A tag that was written as signed for unsigned pixels, or the other way round, means the same 16 bits."""
    number &= 0xFFFF
    return number - (1 << 16) if header.is_signed and number > 0x7FFF else number
