from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import report_values

from fedmix.errors import RunError
from fedmix.report.files import write_json
from fedmix.report.summary import build_report, parse_report, read_report


def test_report_has_exactly_the_blocks_that_the_design_names() -> None:
    report = build_report(**report_values())
    assert list(report) == [
        "schema", "run", "sites", "evaluation", "baselines", "communication", "privacy", "timing",
    ]  # fmt: skip
    assert report["schema"] == 1
    assert set(report["timing"]) == {"wall_s", "local_train_s", "aggregate_s", "evaluate_s", "overhead_ratio"}
    assert report["evaluation"]["retrieval"]["image_to_text"]["r@10"] > 0


def test_report_keeps_numbers_that_the_schema_does_not_name_in_evaluation_run_and_sites() -> None:
    values = report_values()
    values["evaluation"]["leakage"] = {"relink_r@1": 0.01}
    values["sites"][0]["train_s"] = 12.5
    report = build_report(**values)
    assert report["evaluation"]["leakage"] == {"relink_r@1": 0.01}
    assert report["sites"][0]["train_s"] == 12.5


def test_report_survives_the_way_through_its_file(tmp_path: Path) -> None:
    report = build_report(**report_values())
    write_json(tmp_path / "report.json", report)
    again = read_report(tmp_path)
    assert again.model_dump(mode="json", by_alias=True, exclude_unset=True) == report


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_report_refuses_a_number_that_is_not_finite_and_names_it(value: float) -> None:
    values = report_values()
    values["evaluation"]["classification"]["zero_shot"]["per_label"]["nodule"] = value
    with pytest.raises(RunError, match=r"evaluation\.classification\.zero_shot\.per_label\.nodule is NaN or infinite"):
        build_report(**values)


@pytest.mark.parametrize("schema", [2, None, "1"])
def test_report_refuses_a_schema_it_does_not_know(schema: Any) -> None:
    with pytest.raises(RunError, match="this fedmix reads 1"):
        parse_report(build_report(**report_values()) | {"schema": schema})


def test_report_refuses_a_key_it_does_not_know_outside_the_open_blocks() -> None:
    with pytest.raises(RunError, match="extras"):
        parse_report(build_report(**report_values()) | {"extras": 1})
    with pytest.raises(RunError, match="wall"):
        build_report(**report_values(timing=report_values()["timing"] | {"wall": 1.0}))


def test_report_refuses_a_recall_in_percent() -> None:
    values = report_values()
    values["evaluation"]["retrieval"]["image_to_text"]["r@10"] = 44.2
    with pytest.raises(RunError, match="less than or equal to 1"):
        build_report(**values)


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(RunError, match=r"b\[1\] cannot be written as JSON"):
        write_json(path, {"b": [0.0, float("nan")]})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_who_is_reading_the_old_file_never_sees_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with path.open() as reader:
        write_json(path, {"a": 2})
        assert json.loads(reader.read()) == {"a": 1}
    assert json.loads(path.read_text()) == {"a": 2}


def test_half_a_character_does_not_keep_a_report_from_being_written(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"a": "\ud800"})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": "?"}


def test_missing_report_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="--resume"):
        read_report(tmp_path)
