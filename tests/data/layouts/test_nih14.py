from pathlib import Path

import pytest
from trees import picture, prepared, write_file, write_table

from fedmix.data.layouts.nih14 import FINDINGS
from fedmix.data.layouts.records import SourceOptions
from fedmix.data.layouts.registry import open_source
from fedmix.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def row(
    image: str, findings: str = "No Finding", patient: object = 1, view: str = "PA", age: object = 57, sex: str = "M"
) -> list[object]:
    return [image, findings, 0, patient, age, sex, view, 2682, 2749, 0.143, 0.143]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "nih"
    rows = [
        row("00000001_000.png", "Cardiomegaly|Emphysema"),
        row("00000001_001.png", view="AP"),
        row("00000002_000.png", "Pleural_Thickening", 2),
        row("00000003_000.png", patient=3),
    ]
    write_table(root / "Data_Entry_2017_v2020.csv", HEADER, rows)
    for number, (image, *_) in enumerate(rows):
        write_file(root / f"images_{1 + number // 2:03d}" / "images" / str(image), picture())
    write_file(root / "train_val_list.txt", "00000001_000.png\n00000001_001.png\n00000003_000.png")
    write_file(root / "test_list.txt", "00000002_000.png\n")
    write_table(root / "BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,", [])
    return root


def test_images_are_found_in_their_folders_with_findings_views_and_official_splits(root: Path) -> None:
    summary, shard = prepared("nih14", root, split_shares=(1.0, 0.0, 0.0))
    assert (summary.studies, summary.num_patients, summary.quarantined) == (4, 3, {})
    assert shard.view == ["PA", "AP", "PA", "PA"]
    assert shard.split == ["train", "train", "test", "train"]
    present = [[name for name, value in zip(FINDINGS, values, strict=True) if value] for values in shard.labels.tolist()]
    assert present == [["Cardiomegaly", "Emphysema"], [], ["Pleural_Thickening"], []]
    assert shard.labels.min() == 0  # "No Finding" says that all are absent


@pytest.mark.parametrize("column", ["Patient Gender", "Patient Sex"])
def test_sex_and_age_band_are_those_of_the_table_where_they_are_asked_for(root: Path, column: str) -> None:
    said = {
        "00000001_000.png": (17, "M"),
        "00000001_001.png": ("058Y", "F"),
        "00000002_000.png": ("411", ""),
        "00000003_000.png": ("", "U"),
    }
    rows = [row(image, patient=int(image[:8]), age=age, sex=sex) for image, (age, sex) in said.items()]
    write_table(root / "Data_Entry_2017_v2020.csv", HEADER.replace("Patient Gender", column), rows)
    summary, shard = prepared("nih14", root, keeps_characteristics=True)
    assert shard.sex == ["M", "F", "unknown", "unknown"]
    assert shard.age_band == ["0-17", "40-59", "unknown", "unknown"]
    assert "Sex is kept of 2 and the age band of 2 studies, as --keep-characteristics asks." in summary.notes
    _, shard = prepared("nih14", root, "usual")
    assert set(shard.sex + shard.age_band) == {"unknown"}


def test_a_table_without_sex_and_age_is_prepared_all_the_same(root: Path) -> None:
    header = "Image Index,Finding Labels,Patient ID,View Position"
    write_table(root / "Data_Entry_2017_v2020.csv", header, [["00000001_000.png", "No Finding", 1, "PA"]])
    summary, shard = prepared("nih14", root, keeps_characteristics=True)
    assert (summary.studies, shard.sex, shard.age_band) == (1, ["unknown"], ["unknown"])


def test_the_official_training_list_is_shared_between_train_and_val_by_patient(root: Path) -> None:
    rows = [row(f"{patient:08d}_00{image}.png", patient=patient) for patient in range(1, 121) for image in range(2)]
    write_table(root / "Data_Entry_2017_v2020.csv", HEADER, rows)
    for image, *_ in rows:
        write_file(root / "images_003/images" / str(image), picture())
    write_file(root / "train_val_list.txt", "\n".join(str(image) for image, *_ in rows[:-2]))
    write_file(root / "test_list.txt", str(rows[-2][0]) + "\n" + str(rows[-1][0]))
    summary, shard = prepared("nih14", root, split_shares=(0.5, 0.25, 0.25))
    assert summary.splits["test"] == 2
    assert 50 < summary.splits["val"] < 110  # a third of 238 by its share of train and val
    assert len(set(zip(shard.patient.tolist(), shard.split, strict=True))) == 120


def test_the_older_table_ends_its_lines_in_a_comma(root: Path) -> None:
    (root / "Data_Entry_2017_v2020.csv").unlink()
    write_table(
        root / "Data_Entry_2017.csv", HEADER + ",", [[*row("00000001_000.png"), ""], row("00000002_000.png", patient=2)]
    )
    summary, _ = prepared("nih14", root)
    assert (summary.studies, summary.quarantined) == (2, {})


def test_rows_that_say_something_else_are_left_out(root: Path) -> None:
    rows = [
        row("00000001_000.png"),
        row("00000001_001.png", "Cardiomegaly|No Finding"),
        row("00000002_000.png", "Infiltrate"),  # as the table of boxes calls it
        row("00000003_000.png", patient=" "),
        row("00000009_000.png"),
        row("../../secret.png"),
        row("secret.png"),
        row("00000001_000.png")[:-1],
    ]
    write_table(root / "Data_Entry_2017_v2020.csv", HEADER, rows)
    summary, _ = prepared("nih14", root)
    assert summary.studies == 1
    assert summary.quarantined == {
        "label_unreadable": 2,
        "patient_missing": 1,
        "path_parent": 1,
        "path_unexpected": 1,
        "row_malformed": 1,
        "split_unknown": 1,
    }


def test_half_of_the_official_lists_is_an_error_and_none_a_note(root: Path) -> None:
    (root / "test_list.txt").unlink()
    with pytest.raises(DataError, match="only one of"):
        open_source("nih14", root, SourceOptions())
    (root / "train_val_list.txt").unlink()
    assert any("not used" in note for note in prepared("nih14", root)[0].notes)
