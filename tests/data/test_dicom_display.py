"""From stored value to grey: against pydicom's own helpers where these are right, by hand where they are not."""

import numpy as np
import pytest
from pydicom import uid
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from radiographs import bare, dataset, file_of, marked, table

from fedmix.data import dicom
from fedmix.data.quarantine import RefusedError

RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)  # every value of 12 bits once


def by_pydicom(pixels, dark, bright, **tags):
    built = dataset(pixels, **tags)
    with np.errstate(over="ignore"):  # in its sigmoid
        shown = apply_voi_lut(apply_modality_lut(pixels, built), built).astype(float)
    return np.rint(255 * ((shown - dark) / (bright - dark)).clip(0, 1))


@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(2048, 4096), (1000, 500), (1000, 2), (4000, 900), (-50, 700)])
@pytest.mark.parametrize(
    "rescale", [{}, {"RescaleSlope": 2, "RescaleIntercept": -1024}, {"RescaleSlope": 0.5, "RescaleIntercept": 0}]
)
def test_windows_are_those_of_pydicom(function, centre, width, rescale):
    tags = {"WindowCenter": centre, "WindowWidth": width, "VOILUTFunction": function, **rescale}
    slope, intercept = rescale.get("RescaleSlope", 1), rescale.get("RescaleIntercept", 0)
    wanted = by_pydicom(RAMP, intercept, 4095 * slope + intercept, **tags)
    assert np.abs(dicom.read_pixels(file_of(RAMP, **tags)) - wanted).max() <= 1  # a tie may round either way


def test_the_first_of_several_windows_is_taken():
    first = dicom.read_pixels(file_of(RAMP, WindowCenter=1000, WindowWidth=500))
    several = file_of(
        RAMP, WindowCenter=[1000, 3000], WindowWidth=[500, 200], WindowCenterWidthExplanation=["NORMAL", "HARDER"]
    )
    assert np.array_equal(dicom.read_pixels(several), first)


def test_a_window_is_cut_at_its_ends_by_hand():
    shown = dicom.read_pixels(file_of(RAMP, WindowCenter=2000, WindowWidth=201)).ravel()
    assert shown[1899] == 0
    assert shown[2100] == 255
    assert shown[2000] == round(255 * (0.5 + 0.5 / 200))
    assert set(np.unique(np.diff(shown.astype(int)))) <= {0, 1, 2}


def test_a_negative_slope_does_not_turn_a_window_over():
    """pydicom would: it takes the end of the range that comes first for the dark one."""
    falling = {"RescaleSlope": -1, "RescaleIntercept": 4095, "WindowCenter": 2048, "WindowWidth": 4096}
    shown = dicom.read_pixels(file_of(RAMP, **falling)).ravel()
    assert shown[0] == 255
    assert shown[-1] == 0
    plain = dicom.read_pixels(file_of(4095 - RAMP, WindowCenter=2048, WindowWidth=4096)).ravel()
    assert np.array_equal(shown, plain)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_voi_tables_are_those_of_pydicom(bits):
    curve = (np.linspace(0, 1, 200) ** 2 * ((1 << bits) - 1)).astype(np.uint16)
    tags = {"VOILUTSequence": table(1000, bits, curve)}
    wanted = by_pydicom(RAMP, 0, (1 << bits) - 1, **tags)
    assert np.abs(dicom.read_pixels(file_of(RAMP, **tags)) - wanted).max() <= 1


def test_a_voi_table_of_8_bits_may_have_more_than_256_entries():
    """pydicom's apply_voi counts its entries in 8 bits."""
    curve = np.repeat(np.arange(256, dtype=np.uint16), 16)
    shown = dicom.read_pixels(file_of(RAMP, VOILUTSequence=table(0, 8, curve)))
    assert np.array_equal(shown.ravel(), curve)


def test_a_voi_table_comes_before_a_window_and_fills_the_screen_whatever_depth_it_claims():
    curve = np.arange(4096, dtype=np.uint16)
    plain = dicom.read_pixels(file_of(RAMP, VOILUTSequence=table(0, 12, curve)))
    assert (plain.min(), plain.max()) == (0, 255)
    both = file_of(RAMP, VOILUTSequence=table(0, 16, curve), WindowCenter=5, WindowWidth=2)
    assert np.array_equal(dicom.read_pixels(both), plain)


def test_modality_tables_come_first_and_may_begin_below_zero():
    signed = RAMP.astype(np.int16) - 2048
    falling = np.arange(4095, -1, -1).astype(np.uint16)
    tags = {"ModalityLUTSequence": table(-2048, 12, falling), "WindowCenter": 2048, "WindowWidth": 4096}
    shown = dicom.read_pixels(file_of(signed, **tags))
    assert np.array_equal(shown, dicom.read_pixels(file_of(4095 - RAMP, WindowCenter=2048, WindowWidth=4096)))


def test_a_table_of_65536_entries_counts_them_as_0():
    deep = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    curve = np.arange(65536).astype(np.uint16)
    sequence = table(0, 16, curve)
    assert sequence[0].LUTDescriptor[0] == 0
    shown = dicom.read_pixels(file_of(deep, bits=16, VOILUTSequence=sequence))
    assert np.array_equal(shown, np.rint(deep / 65535 * 255))


def test_tables_are_read_in_implicit_and_big_endian_files():
    sequence = table(1000, 12, (np.linspace(0, 1, 200) ** 2 * 4095).astype(np.uint16))
    plain = dicom.read_pixels(file_of(RAMP, VOILUTSequence=sequence))
    assert np.array_equal(dicom.read_pixels(bare(RAMP, VOILUTSequence=sequence)), plain)
    swapped = table(1000, 12, (np.linspace(0, 1, 200) ** 2 * 4095).astype(np.uint16).byteswap())
    assert np.array_equal(dicom.read_pixels(file_of(RAMP, VOILUTSequence=swapped, syntax=uid.ExplicitVRBigEndian)), plain)


def test_monochrome1_is_inverted_after_the_window_and_not_before():
    tags = {"WindowCenter": 1000, "WindowWidth": 501}
    plain = dicom.read_pixels(file_of(RAMP, **tags)).astype(int)
    inverted = dicom.read_pixels(file_of(RAMP, PhotometricInterpretation="MONOCHROME1", **tags))
    assert np.abs(255 - plain - inverted).max() <= 1
    curve = table(0, 8, np.repeat(np.arange(256, dtype=np.uint16), 16))
    shown = dicom.read_pixels(file_of(RAMP, PhotometricInterpretation="MONOCHROME1", VOILUTSequence=curve)).ravel()
    assert np.array_equal(shown, 255 - RAMP.ravel() // 16)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count(photometric):
    picture = marked()
    padded = picture.copy()
    padded[:, :20] = 4095
    cropped = dicom.read_pixels(file_of(picture[:, 20:], PhotometricInterpretation=photometric))
    shown = dicom.read_pixels(file_of(padded, PhotometricInterpretation=photometric, PixelPaddingValue=4095))
    assert not shown[:, :20].any()
    assert np.array_equal(shown[:, 20:], cropped)
    padded[:, :20] = np.arange(4090, 4095)[None].repeat(4, 1)
    limits = {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4090}
    assert np.array_equal(dicom.read_pixels(file_of(padded, PhotometricInterpretation=photometric, **limits)), shown)


def test_padding_below_zero_is_found_in_signed_pixels():
    signed = marked().astype(np.int16) - 2000
    signed[:, :20] = -2048
    built = file_of(signed, PixelPaddingValue=-2048)
    assert not dicom.read_pixels(built)[:, :20].any()
    assert dicom.read_pixels(built)[:, 20:].max() == 255


def test_without_a_window_percentiles_decide_and_one_odd_pixel_does_not():
    picture = marked()
    odd = picture.copy()
    odd[0, 0], odd[1, 1] = 0, 4095
    assert np.abs(dicom.read_pixels(file_of(odd)).astype(int) - dicom.read_pixels(file_of(picture)))[2:].max() <= 1


@pytest.mark.parametrize(
    "tags",
    [
        {"VOILUTSequence": table(0, 3, np.arange(10).astype(np.uint16))},
        {"VOILUTSequence": table(0, 12, np.full(10, 7, np.uint16))},
        {"VOILUTSequence": table(0, 12, np.arange(10).astype(np.uint16), LUTDescriptor=[4096, 0, 12])},
        {"WindowCenter": 100, "WindowWidth": -5},
    ],
)
def test_a_table_or_window_that_means_nothing_is_refused(tags):
    with pytest.raises(RefusedError) as caught:
        dicom.read_pixels(file_of(RAMP, **tags))
    assert caught.value.code == "dicom_display"
