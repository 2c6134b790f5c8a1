from pathlib import Path

import numpy as np
import pytest
from trees import encoded, picture, prepared, texts, write_file, write_table

from fedmix.data.layouts.padchest import TABLE

HEADER = (
    ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,Projection,"
    "MethodProjection,Pediatric,Modality_DICOM,Manufacturer_DICOM,PhotometricInterpretation_DICOM,PixelRepresentation_DICOM,"
    "PixelAspectRatio_DICOM,SpatialResolution_DICOM,BitsStored_DICOM,WindowCenter_DICOM,WindowWidth_DICOM,Rows_DICOM,"
    "Columns_DICOM,XRayTubeCurrent_DICOM,Exposure_DICOM,ExposureInuAs_DICOM,ExposureTime,RelativeXRayExposure_DICOM,ReportID,"
    "Report,MethodLabel,Labels,Localizations,LabelsLocalizationsBySentence,labelCUIS,LocalizationsCUIS"
)
REPORT = "sin hallazgos patologicos valorables."


def row(image: str, **cells: object) -> list[object]:
    given = {
        "ImageID": image,
        "ImageDir": 0,
        "StudyID": "s1",
        "PatientID": "p1",
        "PatientBirth": 2052,
        "Projection": "PA",
        "PhotometricInterpretation_DICOM": "MONOCHROME2",
        "Report": REPORT,
        "Labels": "['normal']",
        **cells,
    }
    return [given.get(name, "") for name in HEADER.split(",")]


def tree(tmp_path: Path, rows: list[list[object]]) -> Path:
    root = tmp_path / "padchest"
    write_table(root / TABLE, HEADER, rows)
    return root


def test_a_study_is_its_frontal_image_with_a_spanish_report_and_listed_findings(tmp_path: Path) -> None:
    rows = [
        row("1_side.png", Projection="L", Labels="['cardiomegaly ', 'pleural  effusion']"),
        row("1_front.png", Projection="AP_horizontal", Labels="['cardiomegaly ', 'pleural  effusion']"),
        row("2_front.png", ImageDir="13.0", StudyID="s2", PatientID="p2", Labels="", Report="nan"),
        row("3_rib.png", Projection="COSTAL", StudyID="s3", PatientID="p3"),
    ]
    root = tree(tmp_path, rows)
    write_file(root / "0/1_front.png", picture(dtype=np.uint16))
    write_file(root / "13/2_front.png", picture(dtype=np.uint16))
    summary, shard = prepared("padchest", root)
    assert (shard.view, summary.written) == (["AP", "PA", "unknown"], {"image": 1, "text": 1, "paired": 1})
    assert texts(shard, 1) == encoded(REPORT)
    assert shard.label_names == ("cardiomegaly", "normal", "pleural effusion")
    assert shard.labels.tolist() == [[1, 0, 1], [-1, -1, -1], [0, 1, 0]]
    assert summary.quarantined == {"view_lateral": 1, "view_unknown": 1}
    assert shard.lang == ["es" if has_text else "" for has_text in shard.has_text]
    assert shard.manifest.languages == {"es": 2}


def test_sex_and_age_band_follow_from_the_table_where_they_are_asked_for(tmp_path: Path) -> None:
    told = [("F", 1960, 20140915), ("M", "1924.0", "20140915.0"), ("", "", 20140915), ("O", 2052, 20140915), ("M", 1960, "")]
    rows = [
        row(f"{number}.png", StudyID=f"s{number}", PatientSex_DICOM=sex, PatientBirth=birth, StudyDate_DICOM=taken)
        for number, (sex, birth, taken) in enumerate(told)
    ]
    root = tree(tmp_path, rows)
    for number in range(len(rows)):
        write_file(root / f"{number}.png", picture())
    _, shard = prepared("padchest", root, keeps_characteristics=True)
    assert shard.sex == ["F", "M", "unknown", "unknown", "M"]
    assert shard.age_band == ["40-59", "80+", "unknown", "unknown", "unknown"]
    _, shard = prepared("padchest", root, "usual")
    assert set(shard.sex + shard.age_band) == {"unknown"}


def test_monochrome1_files_are_negatives_and_come_out_positive(tmp_path: Path) -> None:
    rows = [
        row("a.png", StudyID="s1"),
        row("b.png", StudyID="s2", PhotometricInterpretation_DICOM="MONOCHROME1"),
    ]
    root = tree(tmp_path, rows)
    for name in ("a.png", "b.png"):
        write_file(root / name, picture(dtype=np.uint16))
    _, shard = prepared("padchest", root, stream="image")
    normal, turned = (shard.image(number).astype(int) for number in range(2))
    assert normal[8, 2] > normal[8, 12]
    assert np.abs(normal + turned - 255).max() <= 1


def test_missing_and_broken_files_are_counted(tmp_path: Path) -> None:
    root = tree(tmp_path, [row("gone.png"), row("half.png", StudyID="s2"), row("good.png", StudyID="s3")])
    write_file(root / "images/half.png", picture()[:50])
    write_file(root / "images/good.png", picture())
    summary, _ = prepared("padchest", root)
    assert summary.quarantined == {"file_missing": 1, "image_broken": 1}


@pytest.mark.parametrize(
    "cell",
    [
        "__import__('os').system('true')",
        "['a' for a in 'b']",
        "{'a': 1}",
        "[1, 2]",
        "'normal'",
        "[" * 3000,
        "['" + "x" * 5000 + "']",
        "['" + "x" * 90 + "']",
        "['seen on 12/03/2019']",
        "['a\\x1b[31m']",
        "[",
    ],
    ids=range(11),
)
def test_a_list_of_findings_is_read_as_a_literal_or_refused(tmp_path: Path, cell: str) -> None:
    root = tree(tmp_path, [row("a.png", Labels=cell), row("b.png", StudyID="s2")])
    write_file(root / "b.png", picture())
    summary, shard = prepared("padchest", root)
    assert summary.quarantined == {"label_unreadable": 1}
    assert shard.label_names == ("normal",)


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        ({"ImageID": "../a.png"}, "path_parent"),
        ({"ImageDir": "../0"}, "path_parent"),
        ({"ImageDir": "/etc"}, "path_absolute"),
        ({"ImageID": "a.png/../../b.png"}, "path_parent"),
        ({"ImageID": "a.dcm"}, "path_unexpected"),
        ({"ImageDir": "1000"}, "path_unexpected"),
        ({"PatientID": ""}, "patient_missing"),
    ],
)
def test_cells_that_lead_elsewhere_are_refused(tmp_path: Path, cells: dict[str, object], code: str) -> None:
    root = tree(tmp_path, [row("a.png", **cells), row("b.png", StudyID="s2")])
    write_file(root / "b.png", picture())
    assert prepared("padchest", root)[0].quarantined == {code: 1}
