"""What headers and tables write of sex and age, and the few words that a shard may keep of it."""

from __future__ import annotations

import pytest

from fedmix.data.characteristics import AGE_BANDS, MAX_AGE, band_between, band_named, band_of, sex_named


@pytest.mark.parametrize(
    ("name", "sex"),
    [
        *(("F", "F"), ("female", "F"), (" Female ", "F"), ("M", "M"), ("m", "M"), ("MALE", "M")),
        *((name, "unknown") for name in ("", "O", "Unknown", "U", "nan", "0", "MUELLER", "FM")),
    ],
)
def test_a_sex_is_one_of_three_words(name: str, sex: str) -> None:
    assert sex_named(name) == sex


@pytest.mark.parametrize(
    ("age", "band"),
    [
        *(("0", "0-17"), ("17", "0-17"), ("18", "18-39"), ("39", "18-39"), ("40", "40-59"), ("59.0", "40-59")),
        *(("60", "60-79"), ("79.9", "60-79"), ("80", "80+"), ("89", "80+"), ("120", "80+"), (" 57 ", "40-59")),
        *(("058Y", "40-59"), ("058y", "40-59"), ("018M", "0-17"), ("240M", "18-39"), ("003W", "0-17"), ("005D", "0-17")),
        *(
            (age, "unknown")
            for age in ("", "121", "411", "999Y", "1060", "-5", "nan", "forty", "58 Y", "58X", "Y", "40-59", "٤٠")
        ),
    ],
)
def test_an_age_becomes_its_band_or_is_not_known(age: str, band: str) -> None:
    assert band_named(age) == band


@pytest.mark.parametrize(
    ("birth", "study", "band"),
    [
        ("19800501", "20200430", "18-39"),
        ("19800501", "20200501", "40-59"),
        ("1980", "20200101", "40-59"),  # by years alone
        ("1980.0", "20200101.0", "40-59"),
        ("19800501", "2020", "40-59"),
        ("20200501", "20200501", "0-17"),
        ("20200502", "20200501", "unknown"),
        ("2052", "20140101", "unknown"),
        ("1850", "20140101", "unknown"),
        ("", "20140101", "unknown"),
        ("1960", "", "unknown"),
        ("1960-05-01", "20140101", "unknown"),
        ("none", "nan", "unknown"),
    ],
)
def test_an_age_follows_from_two_dates(birth: str, study: str, band: str) -> None:
    assert band_between(birth, study) == band


def test_bands_cover_all_ages_and_nobody_over_89_is_told_from_others() -> None:
    bands = [band_of(years) for years in range(MAX_AGE + 1)]
    assert list(dict.fromkeys(bands)) == [band for band in AGE_BANDS if band != "unknown"]
    assert len(set(bands[80:])) == 1
    assert (band_of(-1), band_of(MAX_AGE + 1)) == ("unknown", "unknown")
