"""Sex and age band of a study's patient: all that a shard may keep of either, and only where the site asks for it.

Whatever a header or a table writes becomes one of these few words where it is read; what cannot be read is unknown, never a
guess. An age is not kept: the oldest band begins at 80, so that nobody over 89 is told from others (HIPAA Safe Harbor,
45 CFR 164.514(b)(2)(i)(C)).
"""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass

UNKNOWN = "unknown"
SEXES = ("F", "M", UNKNOWN)
AGE_BANDS = ("0-17", "18-39", "40-59", "60-79", "80+", UNKNOWN)
MAX_AGE = 120  # years; more is a typing error

_FIRST_YEARS = (0, 18, 40, 60, 80)  # of the bands
_SEX_NAMES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_AGE = re.compile(r"([0-9]{1,3})(?:\.[0-9]*)?([DWMY]?)")
_A_YEAR = {"D": 365, "W": 52, "M": 12, "Y": 1, "": 1}
_DATE = re.compile(r"([0-9]{4})([0-9]{4})?(?:\.0)?")


@dataclass(frozen=True)
class Characteristics:
    """``sex``: one of ``SEXES``. ``age_band``: one of ``AGE_BANDS``, of the age when the study was taken."""

    sex: str = UNKNOWN
    age_band: str = UNKNOWN


NOT_SAID = Characteristics()


def sex_named(name: str) -> str:
    """What a sex is called here; "unknown" for other, blank and whatever is not understood."""
    return _SEX_NAMES.get(name.strip().lower(), UNKNOWN)


def band_of(years: int) -> str:
    """The band of an age in whole years."""
    return AGE_BANDS[bisect(_FIRST_YEARS, years) - 1] if 0 <= years <= MAX_AGE else UNKNOWN


def band_named(age: str) -> str:
    """The band of an age as text: years ("57", "57.0"), or a number with its unit as DICOM has it ("057Y", "018M")."""
    match = _AGE.fullmatch(age.strip().upper())
    return band_of(int(match[1]) // _A_YEAR[match[2]]) if match else UNKNOWN


def band_between(birth: str, study: str) -> str:
    """The band of the age at a study, of two dates YYYYMMDD; where one is a year alone the age may be a year too high."""
    born, taken = _DATE.fullmatch(birth.strip()), _DATE.fullmatch(study.strip())
    if not born or not taken:
        return UNKNOWN
    is_before_birthday = bool(born[2] and taken[2] and taken[2] < born[2])
    return band_of(int(taken[1]) - int(born[1]) - is_before_birthday)
