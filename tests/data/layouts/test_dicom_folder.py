from pathlib import Path

import numpy as np
import pytest
import radiographs
from trees import encoded, picture, prepared, texts, write_file, write_table

from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.errors import DataError

PIXELS = radiographs.marked(40, 40)


def dicom(patient: str = "p1", study: str = "1.2.1", **tags: object) -> bytes:
    given = {"PatientID": patient, "StudyInstanceUID": study, "AccessionNumber": f"A{study[-1]}", **tags}
    return radiographs.file_of(PIXELS, **given)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An archive's export: nested folders, names that say nothing, and what else such a disk holds."""
    root = tmp_path / "export"
    write_file(root / "DICOM/0001/IM1", dicom(ViewPosition="LL"))
    write_file(root / "DICOM/0001/IM2", dicom())
    write_file(root / "DICOM/0001/IM3", dicom(ViewPosition="AP"))
    write_file(root / "DICOM/0002/IM1.dcm", dicom("p2", "1.2.2", ViewPosition="AP"))
    write_file(root / "DICOM/0003/IM1", dicom("p3", "1.2.3", ViewPosition=""))
    write_file(root / "DICOM/0003/IM2", dicom("p3", "1.2.3", BurnedInAnnotation="YES"))
    write_file(root / "DICOM/0003/IM3", dicom(""))
    write_file(root / "DICOMDIR", b"index of others")
    write_file(root / "README.txt", "Insert the disk.")
    write_file(root / "preview.png", picture())
    write_file(root / ".hidden/IM1", dicom("p9", "1.2.9"))
    (root / "link.dcm").symlink_to(root / "DICOM/0002/IM1.dcm")
    return root


def test_headers_say_whose_image_it_is_and_which_view(root: Path) -> None:
    summary, shard = prepared("dicom", root, stream="image")
    assert (shard.view, summary.num_patients) == (["PA", "AP", "AP"], 2)
    assert summary.quarantined == {
        "dicom_burned_in": 1,
        "not_dicom": 2,
        "patient_missing": 1,
        "view_lateral": 1,
        "view_unknown": 1,
    }
    first = shard.image(0)
    assert first is not None
    assert first[:8, :8].mean() > first[:8, 8:].mean() > first[8:, :8].mean() > first[8:, 8:].mean()  # upright, not turned


@pytest.mark.parametrize("key", ["StudyInstanceUID", "AccessionNumber"])
def test_reports_are_joined_to_the_first_frontal_image_of_their_study(root: Path, tmp_path: Path, key: str) -> None:
    names = {"StudyInstanceUID": "1.2.{}", "AccessionNumber": "A{}"}
    rows = [
        [names[key].format(1), "FINDINGS: Clear.\nIMPRESSION: Normal.", "en"],
        [names[key].format(1), "ADDENDUM: Seen again.", "en"],
        [names[key].format(7), "Of a study that is not here.", "en"],
        ["", "Of nobody.", "en"],
    ]
    write_table(tmp_path / "reports.csv.gz", [key, "report", "lang"], rows)
    write_table(tmp_path / "spoken.csv", [key, "report"], [row[:2] for row in rows])
    summary, shard = prepared("dicom", root, source={"reports": tmp_path / "reports.csv.gz"})
    assert summary.written == {"image": 1, "text": 0, "paired": 1}
    assert texts(shard, 1) == encoded("Clear. Normal.")
    assert shard.view == ["PA", "AP"]
    assert summary.quarantined["image_extra"] == 1
    assert shard.lang == ["en", ""]
    _, shard = prepared("dicom", root, "spanish", source={"reports": tmp_path / "spoken.csv", "lang": "es-MX"})
    assert shard.lang == ["es-MX", ""]


def test_a_report_in_an_odd_encoding_is_decoded_as_declared_or_refused(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "reports.csv"
    table.write_bytes("AccessionNumber,text\nA1,Coeur élargi\nA2,Normal\n".encode("cp1252"))
    summary, _ = prepared("dicom", root, "utf8", source={"reports": table}, stream="paired")
    assert (summary.studies, summary.quarantined["text_encoding"]) == (1, 2)
    declared = {"reports": table, "fallback_encoding": "cp1252"}
    _, shard = prepared("dicom", root, "cp1252", source=declared, stream="paired")
    assert texts(shard, 2) == encoded("Coeur élargi", "Normal")


def test_sex_and_age_band_are_those_of_the_header_where_they_are_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_file(root / "a.dcm", dicom(PatientSex="F", PatientAge="089Y"))
    write_file(root / "b.dcm", dicom("p2", "1.2.2", PatientSex="M", PatientBirthDate="20100101", StudyDate="20200101"))
    write_file(root / "c.dcm", dicom("p3", "1.2.3"))
    table = tmp_path / "reports.csv"
    write_table(table, ["AccessionNumber", "report"], [["A1", "Normal."]])
    _, shard = prepared("dicom", root, source={"reports": table}, keeps_characteristics=True)
    assert shard.stream_counts == {"image": 2, "text": 0, "paired": 1}
    assert (shard.sex, shard.age_band) == (["F", "M", "unknown"], ["80+", "0-17", "unknown"])
    assert shard.manifest.deidentification.actions["PatientSex"] == "K"
    _, shard = prepared("dicom", root, "usual")
    assert set(shard.sex + shard.age_band) == {"unknown"}
    assert "PatientSex" not in shard.manifest.deidentification.actions


def test_images_that_do_not_say_what_is_burned_in_follow_the_sites_option(tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_file(root / "a.dcm", dicom(BurnedInAnnotation=None))
    write_file(root / "b.dcm", dicom("p2", "1.2.2"))
    summary, shard = prepared("dicom", root, "kept")
    assert (summary.studies, shard.manifest.deidentification.burned_in_not_stated) == (2, "kept")
    summary, shard = prepared("dicom", root, "refused", takes_unmarked=False)
    assert (summary.quarantined, shard.manifest.deidentification.burned_in_not_stated) == ({"dicom_unmarked": 1}, "left out")


def test_a_file_that_harms_its_worker_costs_one_row(tmp_path: Path) -> None:
    root = tmp_path / "export"
    write_file(root / "a.dcm", dicom())
    write_file(root / "b.dcm", dicom("p2", "1.2.2")[:-200])
    write_file(root / "c.dcm", b"\0" * 128 + b"DICM" + bytes(range(256)))
    write_file(root / "d.dcm", dicom("p4", "1.2.4"))
    summary, shard = prepared("dicom", root)
    assert summary.studies == 2
    assert sum(summary.quarantined.values()) == 2
    assert np.array_equal(shard.image(0), shard.image(1))


def test_a_table_that_cannot_be_joined_is_refused_without_quoting_it(root: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "reports.csv", ["DOE JANE", "report"], [["1", "x"]])
    with pytest.raises(DataError, match="needs one named StudyInstanceUID or AccessionNumber") as caught:
        open_source("dicom", root, SourceOptions(reports=tmp_path / "reports.csv"))
    assert "JANE" not in str(caught.value)
    with pytest.raises(DataError, match="table cannot be read"):
        open_source("dicom", root, SourceOptions(reports=tmp_path / "none.csv"))


def test_texts_alone_are_no_matter_of_dicom_files(root: Path) -> None:
    with pytest.raises(DataError, match="with the layout table"):
        prepared("dicom", root, stream="text")


def test_an_encoding_that_there_is_not_is_refused() -> None:
    for name in ("klingon", "rot13", "zip"):
        with pytest.raises(DataError, match="none that Python knows"):
            SourceOptions(fallback_encoding=name)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        open_source("dicom", tmp_path / "empty", SourceOptions())
