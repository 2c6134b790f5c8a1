from __future__ import annotations

from typing import Any

import pytest
from synthetic_run import evaluation, report_values

from fedmix.report import measures
from fedmix.report.measures import BITS, IMAGE_TO_TEXT, LINEAR_PROBE, PSNR, TEXT_TO_IMAGE, ZERO_SHOT, Cell, Grid, Row
from fedmix.report.summary import Report, build_report, parse_report


def report(**changes: Any) -> Report:
    return parse_report(build_report(**report_values(**changes)))


def rows(grid: Grid) -> dict[str, Row]:
    return {row.name: row for row in grid.rows}


def cell(grid: Grid, name: str, column: int) -> Cell:
    found = rows(grid)[name].cells[column]
    assert found is not None
    return found


def test_headline_has_this_run_first_then_baselines_then_guesses_without_a_model() -> None:
    names = [row.name for row in measures.headline(report()).rows]
    assert names == ["fedmix", "random init", "fedavg all", "raw pixels", "mean image", "interpolation", "unigram"]


def test_guesses_fill_only_the_column_they_can_answer() -> None:
    grid = measures.headline(report())
    filled = {row.name: [position for position, found in enumerate(row.cells) if found] for row in grid.rows[3:]}
    assert filled == {"raw pixels": [LINEAR_PROBE], "mean image": [PSNR], "interpolation": [PSNR], "unigram": [BITS]}


def test_best_is_the_highest_value_except_for_bits_where_it_is_the_lowest() -> None:
    values = report_values()
    values["baselines"]["fedavg_all"]["evaluation"]["language"]["bits_per_token"] = 1.5
    values["evaluation"]["regeneration"]["baselines"]["interpolation"]["psnr_db"] = 30.0
    grid = measures.headline(report(**values))
    best = [[row.name for row in grid.rows if (found := row.cells[column]) and found.is_best] for column in range(6)]
    assert best == [["fedmix"]] * 4 + [["interpolation"], ["fedavg all"]]


def test_two_values_that_read_alike_are_both_best() -> None:
    values = report_values()
    values["evaluation"]["language"]["bits_per_token"] = 2.001
    values["baselines"]["fedavg_all"]["evaluation"]["language"]["bits_per_token"] = 2.004
    grid = measures.headline(report(**values))
    assert cell(grid, "fedmix", BITS).is_best
    assert cell(grid, "fedavg all", BITS).is_best


def test_a_number_with_nothing_beside_it_is_not_best() -> None:
    values = report_values(baselines={})
    assert not cell(measures.headline(report(**values)), "fedmix", ZERO_SHOT).is_best


def test_null_is_a_dash_that_points_to_the_reason_given() -> None:
    grid = measures.headline(report())
    found = cell(grid, "fedavg all", TEXT_TO_IMAGE)
    assert found.text == "–"  # noqa: RUF001
    assert grid.notes[(found.note or 0) - 1] == "the gallery held fewer than ten reports"


@pytest.mark.parametrize("place", ["retrieval", None])
def test_absent_part_has_the_reason_of_the_evaluation_or_says_it_was_not_evaluated(place: str | None) -> None:
    values = report_values()
    del values["evaluation"]["retrieval"]
    values["evaluation"]["skipped"] = {"retrieval": "no pairs"} if place else {}
    grid = measures.headline(report(**values))
    note = cell(grid, "fedmix", IMAGE_TO_TEXT).note or 0
    assert grid.notes[note - 1] == ("no pairs" if place else measures.NOT_EVALUATED)
    assert cell(grid, "fedmix", TEXT_TO_IMAGE).note == note


def test_column_shows_gallery_and_chance_once_where_all_methods_share_them() -> None:
    assert measures.headline(report()).settings[IMAGE_TO_TEXT] == "of 500; chance 2.0 %"
    values = report_values()
    values["baselines"]["random_init"]["evaluation"]["retrieval"]["image_to_text"] |= {"gallery": 100, "chance": {}}
    grid = measures.headline(report(**values))
    assert grid.settings[IMAGE_TO_TEXT] == ""
    assert cell(grid, "random init", IMAGE_TO_TEXT).setting == "of 100; chance 10.0 %"


def test_every_column_says_what_it_was_measured_on() -> None:
    values = report_values(baselines={})
    ours = values["evaluation"]
    for direction in ours["retrieval"].values():
        direction["num_queries"] = 1000
    ours["regeneration"]["num_images"] = 152
    ours["language"] |= {"num_texts": 834, "num_tokens": 5970}
    ours["classification"]["zero_shot"]["num_train"] = 0
    assert measures.headline(report(**values)).settings == (
        "1,000 studies",
        "1,000 studies, trained on 1,000",
        "1,000 queries, each in a gallery of 500; chance 2.0 %",
        "1,000 queries, each in a gallery of 500; chance 2.0 %",
        "152 images, 75 % hidden",
        "5,970 tokens of 834 reports, 15 % hidden",
    )


def test_what_has_no_meaning_for_a_method_is_a_dash_with_a_word_on_it() -> None:
    text = measures.as_markdown(measures.headline(report()))
    (unigram,) = [line for line in text.splitlines() if "unigram" in line]
    assert unigram.count("| \N{EN DASH} ") == 5
    assert text.endswith("A dash without a number: does not apply.\n")
    assert "does not apply" not in measures.as_markdown(measures.compare_table([report()]))


def test_recovered_gap_by_hand() -> None:
    baselines = {name: {"evaluation": evaluation(0.5)} for name in ("best_site", "centralised")}
    values = report_values(baselines=baselines)
    for found, psnr, bits in ((values["evaluation"], 21.0, 3.0), (baselines["best_site"]["evaluation"], 20.0, 4.0)):
        found["regeneration"]["psnr_db"], found["language"]["bits_per_token"] = psnr, bits
    pooled = baselines["centralised"]["evaluation"]
    pooled["regeneration"]["psnr_db"], pooled["language"]["bits_per_token"] = 24.0, 2.0
    pooled["classification"]["zero_shot"]["macro_auroc"] = 0.4
    gaps = {measure.title: gap for measure, gap in measures.recovered_gap(report(**values))}
    assert gaps["PSNR"] == pytest.approx(0.25)
    assert gaps["Bits per token"] == pytest.approx(0.5)
    assert gaps["Zero-shot AUROC"] is None, "pooling was worse than the best site: the ratio would mean nothing"


def test_recovered_gap_needs_both_baselines() -> None:
    assert measures.recovered_gap(report()) == []


def test_comparison_has_a_row_for_each_run_and_its_markdown_cannot_be_broken_by_a_name() -> None:
    odd = report(run=report_values()["run"] | {"name": "a|b\n<i>"})
    text = measures.as_markdown(measures.compare_table([report(), odd]))
    lines = text.splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| a\\|b &lt;i> |")
    assert "**" in lines[2]


def test_every_number_lists_each_path_once_with_a_value_for_each_method() -> None:
    names, table = measures.every_number(report())
    found = dict(table)
    assert names == ("fedmix", "random init", "fedavg all")
    assert found["regeneration/with_report/gain_psnr_db"] == ["0.42", "0.42", "0.42"]
    assert found["classification/raw_pixels/macro_auroc"] == ["0.661", "–", "–"]  # noqa: RUF001
    assert len(found) == len(table)
