import gzip
from pathlib import Path

import pytest
import radiographs
from trees import encoded, picture, prepared, texts, write_file, write_table

from fedmix.data.layouts.mimic import FINDINGS
from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.data.prepare import PrepareOptions
from fedmix.errors import DataError

METADATA = (
    "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
    "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
)
REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with ?pleural effusion

 COMPARISON:  ___

 FINDINGS:

 The lungs are clear.  There is no effusion
 or pneumothorax.

 IMPRESSION:

 No acute process since ___.
"""
LEARNT = "The lungs are clear. There is no effusion or pneumothorax. No acute process since ___."


def image_id(number: int) -> str:
    return "-".join([f"{number:08x}"] * 5)


def folder(subject: int, study: int) -> str:
    return f"files/p{str(subject)[:2]}/p{subject}/s{study}"


# (subject, study, image, ViewPosition, ViewCodeSequence meaning)
IMAGES = [
    (10000032, 50414267, 1, "LATERAL", "lateral"),
    (10000032, 50414267, 2, "PA", "postero-anterior"),
    (10000032, 50414267, 3, "AP", "antero-posterior"),
    (10000032, 53189527, 4, "", "antero-posterior"),
    (10000764, 57375967, 5, "LL", "left lateral"),
    (10000898, 50771383, 6, "AP RLD", "antero-posterior"),
    (10000898, 54205396, 7, "AP", ""),
]
SPLITS = {10000032: "train", 10000764: "validate", 10000898: "test"}


@pytest.fixture
def jpg(tmp_path: Path) -> Path:
    root = tmp_path / "mimic-cxr-jpg"
    rows = [
        [image_id(image), subject, study, "CHEST (PA AND LAT)", view, 3056, 2544, 21800506, 213014.531, "", code, "Erect"]
        for subject, study, image, view, code in IMAGES
    ]
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, rows)
    rows = [[image_id(image), study, subject, SPLITS[subject]] for subject, study, image, _, _ in IMAGES]
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", rows)
    values = dict.fromkeys(FINDINGS, "") | {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"}
    rows = [[10000032, 50414267, *values.values()], [10000764, 57375967, *[""] * 14], [10000764, 50414267, *["1.0"] * 14]]
    write_table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ("subject_id", "study_id", *FINDINGS), rows)
    for subject, study, image, _, _ in IMAGES:
        write_file(root / folder(subject, study) / f"{image_id(image)}.jpg", picture(kind="JPEG", brightness=200 + image))
    for subject, study in ((10000032, 50414267), (10000764, 57375967)):
        write_file(root / f"{folder(subject, study)}.txt", REPORT)
    write_file(root / f"{folder(10000898, 54205396)}.txt", " \n")
    return root


def test_a_study_is_its_first_frontal_image_with_its_report_labels_and_official_split(jpg: Path) -> None:
    summary, shard = prepared("mimic-cxr-jpg", jpg, stream="paired")
    assert (summary.studies, shard.split, shard.view) == (1, ["train"], ["PA"])
    assert texts(shard, 1) == encoded(LEARNT)
    labels = dict(zip(shard.label_names, shard.labels[0].tolist(), strict=True))
    assert {name: value for name, value in labels.items() if value >= 0} == {"Edema": 1, "Fracture": 0}
    assert summary.quarantined == {
        "image_extra": 1,
        "report_missing": 2,
        "text_empty": 1,
        "view_lateral": 2,
        "view_unknown": 1,
    }


def test_images_alone_are_one_row_each_and_views_come_from_position_then_code(jpg: Path) -> None:
    summary, shard = prepared("mimic-cxr-jpg", jpg, stream="image")
    assert shard.view == ["PA", "AP", "AP", "AP"]  # of images 2, 3, 4 and 7: "AP RLD" lies on the side and is none
    assert shard.split == ["train", "train", "train", "test"]
    assert summary.num_patients == 2
    assert summary.quarantined == {"view_lateral": 2, "view_unknown": 1}


def test_reports_alone_come_without_a_look_at_images(jpg: Path) -> None:
    for path in jpg.rglob("*.jpg"):
        path.unlink()
    summary, shard = prepared("mimic-cxr-jpg", jpg, stream="text")
    assert texts(shard, 2) == encoded(LEARNT, LEARNT)
    assert shard.split == ["train", "val"]
    assert summary.quarantined == {"report_missing": 2, "text_empty": 1}


def test_reports_may_lie_elsewhere(jpg: Path, tmp_path: Path) -> None:
    for path in jpg.rglob("*.txt"):
        path.unlink()
    write_file(tmp_path / "mimic-cxr-reports" / f"{folder(10000032, 50414267)}.txt", REPORT)
    assert prepared("mimic-cxr-jpg", jpg, source={"reports": tmp_path / "mimic-cxr-reports"}, stream="text")[0].studies == 1
    (tmp_path / "mimic-cxr-reports").rename(jpg / "mimic-cxr-reports")
    assert prepared("mimic-cxr-jpg", jpg, "other", stream="text")[0].studies == 1


def test_without_the_official_tables_splits_are_drawn_and_that_is_said(jpg: Path) -> None:
    for name in ("split", "chexpert"):
        (jpg / f"mimic-cxr-2.0.0-{name}.csv.gz").unlink()
    summary, shard = prepared("mimic-cxr-jpg", jpg, stream="image")
    assert shard.label_names == ()
    assert any("no -split table" in note for note in summary.notes)
    assert any("no -chexpert table" in note for note in summary.notes)
    assert any("drawn by patient" in note for note in summary.notes)


@pytest.mark.parametrize(
    "row",
    [
        ["../../../../etc/passwd", 10000032, 50414267],
        [image_id(1), "../10000032", 50414267],
        [image_id(1), 10000032, "/50414267"],
        [image_id(1).upper().replace("0", "F"), 10000032, 50414267],
    ],
)
def test_identifiers_that_are_none_never_become_a_path(jpg: Path, row: list[object]) -> None:
    rows = [[*row, *[""] * 9], [image_id(2), 10000032, 50414267, "", "PA", *[""] * 7]]
    write_table(jpg / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, rows)
    summary, _ = prepared("mimic-cxr-jpg", jpg, stream="image")
    assert (summary.studies, summary.quarantined) == (1, {"path_unexpected": 1})


def test_an_unpacked_table_and_chosen_findings_are_fine(jpg: Path) -> None:
    packed = jpg / "mimic-cxr-2.0.0-metadata.csv.gz"
    rows = [[image_id(2), 10000032, 50414267, "", "PA", *[""] * 7]]
    packed.unlink()
    write_table(jpg / "mimic-cxr-2.0.0-metadata.csv", METADATA, rows)
    _, shard = prepared("mimic-cxr-jpg", jpg, source={"label_names": ("Fracture", "Edema")})
    assert (shard.label_names, shard.labels.tolist()) == (("Fracture", "Edema"), [[0, 1]])
    with pytest.raises(DataError, match="no finding named 'Oedema'"):
        open_source("mimic-cxr-jpg", jpg, SourceOptions(label_names=("Oedema",)))


def test_the_root_of_another_release_is_refused(jpg: Path) -> None:
    write_table(jpg / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,patient", [["JANE DOE", 1]])
    with pytest.raises(DataError, match="none named 'subject_id', 'study_id', 'ViewPosition'") as caught:
        open_source("mimic-cxr-jpg", jpg, SourceOptions())
    assert "JANE" not in str(caught.value)
    with pytest.raises(DataError, match=r"has no cxr-study-list.csv \(or cxr-study-list.csv.gz\)"):
        open_source("mimic-cxr", jpg, SourceOptions())


def test_a_site_with_only_the_reports_of_mimic_cxr_prepares_them(tmp_path: Path) -> None:
    root = tmp_path / "mimic-cxr"
    rows = [[10000032, 50414267, "files/p10/p10000032/s50414267.txt"], [10000764, 57375967, "../../etc/passwd"]]
    write_table(root / "cxr-study-list.csv.gz", "subject_id,study_id,path", rows)
    write_file(root / "files/p10/p10000032/s50414267.txt", REPORT)
    summary, shard = prepared("mimic-cxr", root, stream="text", sections=("impression", "findings"))
    assert summary.quarantined == {"report_missing": 1}  # the column path is not even read
    assert texts(shard, 1) == encoded("No acute process since ___. The lungs are clear. There is no effusion or pneumothorax.")
    assert shard.manifest.languages == {"en": 1}


def test_dicom_files_plain_or_packed_say_their_view_themselves(tmp_path: Path) -> None:
    root = tmp_path / "mimic-cxr"
    pixels = radiographs.marked(40, 40)
    names = [f"{folder(10000032, 50414267)}/{image_id(number)}.dcm" for number in (1, 2)]
    rows = [[10000032, 50414267, image_id(number), name] for number, name in enumerate(names, start=1)]
    write_table(root / "cxr-record-list.csv.gz", "subject_id,study_id,dicom_id,path", rows)
    write_file(root / names[0], radiographs.file_of(pixels, ViewPosition="LATERAL"))
    write_file(root / f"{names[1]}.gz", gzip.compress(radiographs.file_of(pixels, ViewPosition="AP")))
    write_file(root / f"{folder(10000032, 50414267)}.txt", REPORT)
    summary, shard = prepared("mimic-cxr", root, stream="paired")
    assert (shard.view, summary.quarantined) == (["AP"], {"view_lateral": 1})
    assert texts(shard, 1) == encoded(LEARNT)


def test_parts_share_no_patient_outside_the_test_split_and_all_hold_the_whole_test_split(tmp_path: Path) -> None:
    root = tmp_path / "mimic-cxr-jpg"
    studies = [(10000000 + number, 50000000 + number, number) for number in range(60)]
    rows = [[image_id(image), subject, study, "", "PA", *[""] * 7] for subject, study, image in studies]
    write_table(root / "mimic-cxr-2.0.0-metadata.csv.gz", METADATA, rows)
    rows = [[image_id(image), study, subject, "test" if image < 6 else "train"] for subject, study, image in studies]
    write_table(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", rows)
    for subject, study, image in studies:
        write_file(root / folder(subject, study) / f"{image_id(image)}.jpg", picture(kind="JPEG"))
        write_file(root / f"{folder(subject, study)}.txt", REPORT)
    made = [
        prepared("mimic-cxr-jpg", root, stream, part=(number, 3), stream=stream)
        for number, stream in enumerate(("paired", "image", "text"), 1)
    ]
    trains = [set(shard.patient[shard.select("train")].tolist()) for _, shard in made]
    tests = [shard.patient[shard.select("test")].tolist() for _, shard in made]
    assert sum(map(len, trains)) == len(set().union(*trains)) == 54
    assert min(map(len, trains)) > 5
    assert tests == [tests[0]] * 3
    assert len(tests[0]) == 6
    assert [summary.quarantined["other_part"] for summary, _ in made] == [54 - len(train) for train in trains]
    (root / "mimic-cxr-2.0.0-split.csv.gz").unlink()
    with pytest.raises(DataError, match="no splits; put the tables of its splits into ROOT, or leave --part out"):
        prepared("mimic-cxr-jpg", root, "other", part=(1, 3))


@pytest.mark.parametrize("part", [(0, 3), (4, 3), (1, 0)])
def test_a_part_that_there_is_not_is_refused(part: tuple[int, int]) -> None:
    with pytest.raises(DataError, match="does not exist; give one such as 1/3"):
        PrepareOptions(part=part)
