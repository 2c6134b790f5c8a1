"""report.md and model_card.md: the page's numbers in Markdown, and no word in them that could become more than a word."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_run import evaluation, manifest, report_values

from fedmix.report import energy, markdown
from fedmix.report.files import write_json
from fedmix.report.html import write_report

HOSTILE = "<script>alert(1)</script> [red](//evil) ![x](//evil) `a` *b* _c_ |\n# d"


def written(folder: Path) -> tuple[str, str]:
    write_report(folder)
    return (folder / "report.md").read_text(), (folder / "model_card.md").read_text()


def test_both_tell_every_methods_numbers_the_sites_and_the_record(run_dir: Path) -> None:
    for text in written(run_dir):
        assert "| fedmix | **" in text
        assert "**22.15** (22.04\N{EN DASH}22.25)" in text
        assert "| random init |" in text
        assert "Linear probe AUROC: 1,000 studies" in text
        assert "| hill | images with their reports | 2,950 | 43,200 |" in text
        assert "| aligned | 10 | image sites and paired sites | mvm 1, mlm 0.3, contrast 1 |" in text
        assert "Objectives: mvm is masked vision modelling, mlm is masked language modelling and contrast is image-text" in text
        assert "| versions / torch | 2.11.0 |" in text
        assert f"| fingerprints / config | sha256:{'5' * 64} |" in text
        assert "Energy was not estimated in this run." in text
        assert "No differential privacy bounds" in text


def test_moments_are_read_by_people_and_the_end_is_among_them(run_dir: Path) -> None:
    write_json(run_dir / "manifest.json", manifest(finished=1_763_800_312.4))
    for text in (*written(run_dir), (run_dir / "report.html").read_text()):
        assert "2025-11-22T08:26:40+00:00" in text
        assert "2025-11-22T08:31:52+00:00" in text
        assert "1763800" not in text


def test_the_card_says_what_the_model_is_for_and_what_not(run_dir: Path) -> None:
    _, card = written(run_dir)
    headings = re.findall(r"^## (.*)", card, re.MULTILINE)
    assert headings == [
        "Intended use", "Training data", "Training", "Evaluation", "Limits of the model", "Privacy", "Time and energy",
        "Limits of the run", "Record",
    ]  # fmt: skip
    assert "3 sites with images (4,650 studies), 2 sites with reports (4,850 studies) and 1 site with images" in card
    assert "All of them are synthetic phantoms." in card
    assert "Not a medical device" in card


def test_what_other_methods_were_measured_on_otherwise_is_told_of_the_first(make_run: Callable[..., Path]) -> None:
    values = report_values()
    values["baselines"]["random_init"]["evaluation"]["classification"]["linear_probe"]["num_train"] = 7
    for text in written(make_run(**values)):
        assert "Linear probe AUROC: 1,000 studies, trained on 1,000" in text


def test_a_failed_run_has_a_report_with_its_cause_and_no_card(run_dir: Path) -> None:
    (run_dir / "report.json").unlink()
    write_json(run_dir / "manifest.json", manifest("failed", cause="round 9: 0 of 2 replies"))
    write_report(run_dir)
    assert "This run failed: round 9: 0 of 2 replies" in (run_dir / "report.md").read_text()
    assert not (run_dir / "model_card.md").exists()


def test_names_from_data_stay_words_in_markdown(make_run: Callable[..., Path]) -> None:
    values = report_values()
    values["sites"][0] |= {"name": HOSTILE, "stream": HOSTILE}
    values["run"] |= {"name": HOSTILE, "seed": 3}
    values["baselines"][HOSTILE] = {"evaluation": evaluation(0.5)}
    values["energy"] = {"kwh": None, "reason": HOSTILE}
    folder = make_run(**values)
    write_json(folder / "manifest.json", manifest(commit=HOSTILE, versions={HOSTILE: HOSTILE}))
    for text in written(folder):
        assert text.count("&lt;script>alert(1)&lt;/script>") >= 6
        assert "<" not in text
        assert not re.search(r"(?<!\\)\]\(|(?<!\\)`|^# d", text, re.MULTILINE)
        tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        assert tables
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@given(st.text())
def test_words_stay_on_one_line_and_in_their_cell(words: str) -> None:
    shown = markdown.text(words)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*_\[\]~]", shown)
    assert "<" not in shown
    plain = re.sub(r"\\([\\`*_\[\]|~])", r"\1", shown).replace("&lt;", "<").replace("&amp;", "&")
    assert plain.split() == words.split()


def test_a_table_has_as_many_cells_in_each_row() -> None:
    lines = markdown.table(("a", "b"), [("x|y", "1"), ("z", "2")]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 |", "| z | 2 |"]


def test_energy_is_the_watts_of_all_cores_over_the_whole_run() -> None:
    found = energy.estimate({"cores": 2, "gpus": 0}, 1800.0, is_on_one_machine=True)
    assert found["kwh"] == pytest.approx((0.005, 0.015))
    assert "1800 s" in found["how"]
    assert "nothing was metered" in found["how"]


@pytest.mark.parametrize(
    ("hardware", "is_on_one_machine", "reason"),
    [
        ({"cores": 2, "gpus": 1}, True, "GPU"),
        ({"cores": None}, True, "number of cores"),
        ({"cores": 2, "gpus": 0}, False, "machines of their own"),
    ],
)
def test_energy_that_nobody_can_know_is_null_with_its_reason(
    hardware: dict[str, int | None], is_on_one_machine: bool, reason: str
) -> None:
    found = energy.estimate(hardware, 60.0, is_on_one_machine=is_on_one_machine)
    assert found["kwh"] is None
    assert reason in found["reason"]


def test_an_estimate_is_shown_with_how_it_was_made_on_every_page(make_run: Callable[..., Path]) -> None:
    found = energy.estimate({"cores": 2, "gpus": 0}, 1800.0, is_on_one_machine=True)
    folder = make_run(energy=found)
    for text in (*written(folder), (folder / "report.html").read_text()):
        assert "an estimated 0.005 to 0.015" in text
        assert "an assumption; nothing was metered" in text
