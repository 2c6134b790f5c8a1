"""What is read of a header: the allow-listed tags, and the view without guessing."""

from dataclasses import asdict, replace

import pytest
from pydicom import uid
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from radiographs import LOSSLESS, bare, file_of, marked, open_data

from fedmix.data import dicom
from fedmix.data.quarantine import RefusedError


def header(**tags):
    with disable_value_validation():
        return dicom.read_header(file_of(marked(), **tags))


def codes(**values):
    item = Dataset()
    for keyword, value in values.items():
        setattr(item, keyword, value)
    return Sequence([item])


def test_a_header_holds_the_allowed_tags_and_nothing_else():
    read = header(
        PatientAge="062Y", PatientSex="F", PatientBirthDate="19600101", StudyDescription="CANARY", ImageLaterality="R"
    )
    values = asdict(read)
    assert len(values) == 26
    assert not any("CANARY" in str(value) for name, value in values.items() if name not in ("patient_id", "accession_number"))
    assert "1960" not in str(values)
    assert (read.patient_id, read.accession_number, read.study_instance_uid) == ("CANARY-ID", "CANARY-ACC", "1.2.3")
    assert (read.sop_class, read.modality, read.body_part, read.sex, read.laterality) == (
        uid.DigitalXRayImageStorageForPresentation,
        "DX",
        "CHEST",
        "F",
        "R",
    )
    assert (read.rows, read.columns, read.bits_allocated, read.bits_stored, read.high_bit) == (60, 80, 16, 12, 11)
    assert (read.samples, read.frames, read.is_signed, read.photometric) == (1, 1, False, "MONOCHROME2")


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_every_encoding_has_the_same_header(syntax):
    plain = dicom.read_header(file_of(marked()))
    other = dicom.read_header(file_of(marked(), syntax=syntax))
    assert replace(other, transfer_syntax=plain.transfer_syntax) == plain
    deflated_as_inflated = uid.ExplicitVRLittleEndian if syntax == uid.DeflatedExplicitVRLittleEndian else syntax
    assert other.transfer_syntax == deflated_as_inflated


@pytest.mark.parametrize("implicit", [True, False])
def test_a_bare_file_says_as_much(implicit):
    plain = dicom.read_header(file_of(marked()))
    read = dicom.read_header(bare(marked(), implicit=implicit))
    assert read.transfer_syntax == (uid.ImplicitVRLittleEndian if implicit else uid.ExplicitVRLittleEndian)
    assert replace(read, transfer_syntax=plain.transfer_syntax) == plain


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "AP"}, "AP"),
        ({"ViewPosition": "LL"}, "lateral"),
        ({"ViewPosition": "LATERAL"}, "lateral"),
        ({"ViewPosition": "RL"}, "lateral"),
        ({"ViewPosition": "LARGE LATERAL"}, "lateral"),
        ({"ViewPosition": "pa "}, "PA"),
        ({"ViewPosition": "PA", "ViewCodeSequence": codes(CodeMeaning="lateral")}, "PA"),  # the first that says anything
        ({"ViewCodeSequence": codes(CodeMeaning="postero-anterior")}, "PA"),
        ({"ViewCodeSequence": codes(CodeMeaning="Antero-Posterior")}, "AP"),
        ({"ViewCodeSequence": codes(CodeValue="272479007", CodeMeaning="de face")}, "PA"),
        ({"ViewCodeSequence": codes(CodeValue="R-10206")}, "AP"),
        ({"ViewCodeSequence": codes(CodeMeaning="left lateral")}, "lateral"),
        ({"ViewPosition": "LAO", "ViewCodeSequence": codes(CodeMeaning="oblique")}, "unknown"),
        ({"PatientOrientation": ["A", "F"]}, "lateral"),
        ({"PatientOrientation": ["P", "F"]}, "lateral"),
        ({"PatientOrientation": ["L", "F"]}, "unknown"),  # frontal, but from which side?
        ({"ViewPosition": ["PA", "AP"]}, "unknown"),
        ({}, "unknown"),
    ],
    ids=str,
)
def test_the_view_is_read_in_order_and_never_guessed(tags, view):
    assert dicom.view_of(header(**{"ViewPosition": None, **tags})) == view


@pytest.mark.parametrize(
    ("age", "band"),
    [
        ("062Y", "60-79"),
        ("000Y", "0-17"),
        ("018M", "0-17"),
        ("018Y", "18-39"),
        ("200W", "0-17"),
        ("089Y", "80+"),
        ("120Y", "80+"),
        ("121Y", "unknown"),
        ("411Y", "unknown"),
        ("62", "unknown"),  # years or months?
        (["062Y", "063Y"], "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_ages_are_kept_as_bands(age, band):
    assert header(PatientAge=age).age_band == band


@pytest.mark.parametrize(
    ("age", "birth", "study", "band"),
    [
        (None, "19800502", "20200501", "18-39"),
        (None, "19800501", "20200501", "40-59"),
        ("411Y", "19800501", "20200501", "40-59"),
        ("030Y", "19800501", "20200501", "18-39"),  # what the age itself says comes first
        (None, "19800501", None, "unknown"),
        (None, None, "20200501", "unknown"),
        (None, "20300101", "20200501", "unknown"),
        (None, "SPRING", "20200501", "unknown"),
    ],
)
def test_where_the_age_is_not_said_it_follows_from_two_dates_that_are_not_kept(age, birth, study, band):
    read = header(PatientAge=age, PatientBirthDate=birth, StudyDate=study)
    assert read.age_band == band
    assert not [date for date in (birth, study) if date and date in str(asdict(read))]


@pytest.mark.parametrize(("said", "sex"), [("F", "F"), ("m ", "M"), ("O", "unknown"), ("", "unknown"), (None, "unknown")])
def test_a_sex_is_one_of_the_list(said, sex):
    assert header(PatientSex=said).sex == sex


@pytest.mark.parametrize(("name", "value"), [("sex", "MUELLER"), ("age_band", "83"), ("age_band", "")])
def test_a_header_with_a_sex_or_band_of_its_own_is_none(name, value):
    read = replace(header(), **{name: value})
    with pytest.raises(ValueError, match="not a header"):
        dicom.Header.from_bytes(read.to_bytes())


def test_a_header_travels_as_json_and_nothing_else_becomes_one():
    read = header(ViewCodeSequence=codes(CodeMeaning="lateral"), PatientOrientation=["L", "F"])
    assert dicom.Header.from_bytes(read.to_bytes()) == read
    for wrong in (b"{}", b"[1]", b"", read.to_bytes().replace(b"60", b'"60"'), read.to_bytes()[:-1] + b', "more": 1}'):
        with pytest.raises((ValueError, AttributeError)):
            dicom.Header.from_bytes(wrong)


def test_overlong_text_is_cut_and_what_is_no_image_still_has_a_header():
    assert len(header(PatientID="7" * 5000).patient_id) == 64
    report = dicom.read_header(file_of(marked(), SOPClassUID=uid.BasicTextSRStorage, Modality="SR", Rows=None))
    assert (report.modality, report.rows) == ("SR", 0)
    with pytest.raises(RefusedError, match="neither a CR image nor"):
        dicom.check(report, dicom.Gates())


@pytest.mark.data
def test_real_headers_say_what_their_table_says():
    folder = open_data()
    rows = [line.split(",") for line in (folder / "dicom.csv").read_text().splitlines()[1:]]
    for name, modality, view, _, photometric, *_ in rows:
        read = dicom.read_header((folder / name).read_bytes())
        assert (read.modality, read.photometric) == (modality, photometric)
        assert dicom.view_of(read) == (view or "unknown")
