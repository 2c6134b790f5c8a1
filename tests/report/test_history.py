from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import SITES, metrics_rows, row

from fedmix.errors import RunError
from fedmix.report.history import Entry, History, Point, StageSpan, read_history, thin


def site_row(number: int, site: str, values: dict[str, Any]) -> dict[str, Any]:
    return row("site", "masked", number, site, 0.0, values)


def written(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows) + tail)
    return path


def test_stages_span_the_rounds_that_were_run(tmp_path: Path) -> None:
    history = read_history(written(tmp_path / "metrics.jsonl", metrics_rows(25)))
    assert history.stages == (StageSpan("masked", 1, 20), StageSpan("aligned", 21, 25))
    assert history.objectives() == ["mvm", "mlm", "contrast", "match"]


def test_a_round_repeated_after_a_resume_counts_once_and_the_later_row_wins(tmp_path: Path) -> None:
    rows = [site_row(1, "a", {"train/mvm/loss": 3.0}), site_row(1, "a", {"train/mvm/loss": 1.0})]
    history = read_history(written(tmp_path / "metrics.jsonl", rows))
    assert history.site_curves("train/mvm/loss") == {"a": [Point(1, 1.0)]}


def test_half_a_last_line_is_dropped_and_half_a_line_elsewhere_is_an_error(tmp_path: Path) -> None:
    rows = [site_row(1, "a", {"train/mvm/loss": 3.0})]
    assert len(read_history(written(tmp_path / "torn.jsonl", rows, '{"time": 1')).entries) == 1
    with pytest.raises(RunError, match=r"broken\.jsonl line 1"):
        read_history(written(tmp_path / "broken.jsonl", [], '{"time": 1\n' + json.dumps(rows[0]) + "\n"))


def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    rows = [site_row(1, "a", {"train/mvm/loss": float("nan")}), site_row(2, "a", {"train/mvm/loss": 1.0})]
    history = read_history(written(tmp_path / "metrics.jsonl", rows))
    assert history.site_curves("train/mvm/loss") == {"a": [Point(2, 1.0)]}


def test_stream_curve_is_the_mean_over_all_its_examples() -> None:
    values = (("a", 2.0, 100.0), ("b", 5.0, 300.0), ("c", 9.0, 100.0))
    entries = [Entry("site", "s", 1, site, {"train/mvm/loss": loss, "data/image": count}) for site, loss, count in values]
    curves = History(tuple(entries)).stream_curves("train/mvm/loss", {"a": "image", "b": "image", "c": "paired"})
    assert curves == {"image": [Point(1, (2.0 * 100 + 5.0 * 300) / 400)], "paired": [Point(1, 9.0)]}


def test_central_curves_leave_out_how_long_an_evaluation_took() -> None:
    entries = [
        Entry("evaluation", "s", number, None, {"retrieval/r@10": number / 10, "time/evaluate_s": 3.0}) for number in (1, 2)
    ]
    assert History(tuple(entries)).central_curves() == {"retrieval/r@10": [Point(1, 0.1), Point(2, 0.2)]}


def test_streams_are_read_from_what_sites_trained_on(tmp_path: Path) -> None:
    assert read_history(written(tmp_path / "metrics.jsonl", metrics_rows())).streams() == SITES


def test_absences_count_only_rounds_of_stages_the_site_takes_part_in(tmp_path: Path) -> None:
    absences = read_history(written(tmp_path / "metrics.jsonl", metrics_rows())).absences()
    assert absences == {site: int(site == "east") for site in SITES}


def test_thin_keeps_the_mean_the_limit_and_the_last_round() -> None:
    points = [Point(number, float(number)) for number in range(1, 1001)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert thinned[-1].round == 1000
    assert sum(point.value for point in thinned) / 100 == pytest.approx(500.5)
    assert thin(points[:7], 100) == points[:7]


def test_no_file_is_an_empty_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "metrics.jsonl") == History()
