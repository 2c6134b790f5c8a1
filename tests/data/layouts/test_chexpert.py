from pathlib import Path

import numpy as np
import pytest
from trees import picture, prepared, write_file, write_table

from fedmix.data.layouts.chexpert import FINDINGS

HEADER = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def row(path: str, side: str = "Frontal", projection: str = "AP", **findings: object) -> list[object]:
    given = {name.replace("_", " "): value for name, value in findings.items()}
    return [
        path,
        given.pop("Sex", "Female"),
        given.pop("Age", 68),
        side,
        projection,
        *(given.get(name, "") for name in FINDINGS),
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    release = tmp_path / "data" / "CheXpert-v1.0-small"
    train = [
        row("CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", Edema="-1.0", Fracture="1.0"),
        row("CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg", "Lateral", "", Edema="-1.0", Fracture="1.0"),
        row("CheXpert-v1.0-small/train/patient00001/study2/view1_frontal.jpg", projection="PA", No_Finding="1.0"),
        row("CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg", projection="LL"),
        row("CheXpert-v1.0-small/train/patient00003/study1/view1_lateral.jpg", "Lateral", ""),
    ]
    valid = [row("CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg", Edema="0.0")]
    write_table(release / "train.csv", HEADER, train)
    write_table(release / "valid.csv", HEADER, valid)
    for path, *_ in (*train, *valid):
        write_file(release.parent / str(path), picture(kind="JPEG"))
    return release


@pytest.mark.parametrize("above", [False, True])
def test_frontal_images_come_with_labels_and_official_splits_from_either_folder(root: Path, above: bool) -> None:
    summary, shard = prepared("chexpert", root.parent if above else root, f"../shard{above}")
    assert (shard.view, shard.split) == (["AP", "PA", "AP"], ["train", "train", "val"])
    assert summary.quarantined == {"view_lateral": 2, "view_unknown": 1}
    known = [{n: v for n, v in zip(FINDINGS, row, strict=True) if v >= 0} for row in shard.labels.tolist()]
    assert known == [{"Fracture": 1}, {"No Finding": 1}, {"Edema": 0}]  # uncertain and blank are both not known
    assert any("nothing in test" in note for note in summary.notes)


def test_a_frontal_image_that_is_called_lateral_is_taken_only_where_unknown_views_are(root: Path) -> None:
    _, shard = prepared("chexpert", root, views="frontal-or-unknown")
    assert shard.view == ["AP", "PA", "unknown", "AP"]


def test_sex_and_age_band_are_those_of_the_table_where_they_are_asked_for(root: Path) -> None:
    rows = [
        row("train/patient00001/study1/view1_frontal.jpg", Sex="Male", Age=90),
        row("train/patient00001/study2/view1_frontal.jpg", Age=18),
        row("train/patient00002/study1/view1_frontal.jpg", Sex="Unknown", Age=0),
    ]
    write_table(root / "train.csv", HEADER, rows)
    _, shard = prepared("chexpert", root, keeps_characteristics=True)
    assert (shard.sex, shard.age_band) == (["M", "F", "unknown", "F"], ["80+", "18-39", "unknown", "60-79"])
    _, shard = prepared("chexpert", root, "usual")
    assert set(shard.sex + shard.age_band) == {"unknown"}


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", "CheXpert-v1.0-medium/", ""])
def test_the_folder_in_the_path_differs_between_releases(root: Path, prefix: str) -> None:
    rows = [row(f"{prefix}train/patient00001/study2/view1_frontal.jpg")]
    write_table(root / "train.csv", HEADER, rows)
    assert prepared("chexpert", root)[0].studies == 2


def test_paths_that_are_none_of_chexperts_are_refused(root: Path) -> None:
    poison = {
        "../train/patient00001/study1/view1_frontal.jpg": "path_parent",
        "x/../train/patient00001/study1/view1_frontal.jpg": "path_parent",
        "/train/patient00001/study1/view1_frontal.jpg": "path_absolute",
        "C:/train/patient00001/study1/view1_frontal.jpg": "path_absolute",
        "train\\patient00001\\study1\\view1_frontal.jpg": "path_backslash",
        "a/train/patient00001/study1/view1_frontal.jpg\x00": "path_control",
        "a/b/train/patient00001/study1/view1_frontal.jpg": "path_unexpected",
        "a/train/patient00001/study1/view1_frontal.png": "path_unexpected",
        "a/test/patient00001/study1/view1_frontal.jpg": "path_unexpected",
        "train.csv": "path_unexpected",
    }
    write_table(root / "train.csv", HEADER, [row(path) for path in poison])
    summary, _ = prepared("chexpert", root)
    counts = {code: list(poison.values()).count(code) for code in set(poison.values())}
    assert (summary.studies, summary.quarantined) == (1, counts)


def test_a_label_that_is_no_number_costs_its_row(root: Path) -> None:
    write_table(root / "train.csv", HEADER, [row("a/train/patient00001/study1/view1_frontal.jpg", Edema="yes")])
    summary, shard = prepared("chexpert", root)
    assert summary.quarantined == {"label_unreadable": 1}
    assert shard.images.shape == (1, 16, 16)
    assert shard.images.dtype == np.uint8
