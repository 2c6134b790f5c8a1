"""Further held-out sets and pairs of one finding alone: the same numbers in the page, in Markdown and in the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic_run import evaluation, report_values

from fedmix.report.card import results
from fedmix.report.further import by_finding, further_sets
from fedmix.report.html import write_report
from fedmix.report.summary import Report, build_report, parse_report, read_report
from fedmix.report.terminal import remarks

RANKING = {"p@1": 0.41, "p@5": 0.39, "p@10": 0.37, "h@1": 0.41, "h@5": 0.8, "h@10": 0.95}
CHANCE = {"p@1": 0.2, "p@5": 0.2, "p@10": 0.2, "h@1": 0.2, "h@5": 0.67, "h@10": 0.89}
ALONE = {
    "num_each": 30,
    "available": {"Edema": 30, "Consolidation": 34},
    "image_to_text": RANKING | {"chance": CHANCE},
    "zero_shot": {"accuracy": 0.5, "per_label": {"Edema": 0.4, "Consolidation": 0.6}, "chance": 0.2},
}


def values(*, alone: dict[str, Any] = ALONE) -> dict[str, Any]:
    """A run with two further sets, one of images alone; one baseline was evaluated on both, the other on neither."""
    given = report_values()
    ours, floor, *_ = (given["evaluation"], *(one["evaluation"] for one in given["baselines"].values()))
    images = {"classification": evaluation(0.8)["classification"], "skipped": {"retrieval": "no report"}}
    ours["also"] = {"nih14": images, "openi": evaluation(0.6) | {"exclusive": alone}}
    floor["also"] = {"nih14": {"classification": evaluation(0.1)["classification"]}, "openi": evaluation(0.05)}
    return given


@pytest.fixture
def report() -> Report:
    return parse_report(build_report(**values()))


def test_each_set_has_a_table_of_the_methods_that_were_evaluated_on_it(report: Report) -> None:
    nih, openi = further_sets(report)
    floor = next(iter(report.baselines)).replace("_", " ")
    for one, name in ((nih, "nih14"), (openi, "openi")):
        assert one.name == name
        assert [row.name for row in one.grid.rows if row.kind != "reference"] == ["fedmix", floor]
    probe = evaluation(0.8)["classification"]["linear_probe"]["macro_auroc"]
    assert nih.grid.rows[0].cells[1].score.value == pytest.approx(probe)  # type: ignore[union-attr]
    assert nih.grid.notes == ("no report", "not evaluated in this run")


def test_pairs_of_one_finding_are_told_with_their_size_and_chance(report: Report) -> None:
    (ranking, accuracy) = by_finding(report.evaluation.also["openi"])
    assert ranking == (
        "Among 30 pairs of each of five findings alone, reports for an image: P@1, 5 and 10 are 41.0 %, 39.0 %, 37.0 % "
        "(20.0 %, 20.0 %, 20.0 % by chance); H@1, 5 and 10 are 41.0 %, 80.0 %, 95.0 % (20.0 %, 67.0 %, 89.0 % by chance)."
    )
    assert accuracy == "Their zero-shot accuracy is 50.0 % (20.0 % by chance): Edema 40 %, Consolidation 60 %."
    assert by_finding(report.evaluation) == []


def test_too_few_pairs_of_one_finding_are_told() -> None:
    reason = "not enough data: 3 test pairs have Edema alone, at least 10 are needed"
    found = parse_report(build_report(**values(alone={"num_each": 3, "available": {"Edema": 3}, "reason": reason})))
    assert by_finding(found.evaluation.also["openi"]) == [f"Retrieval by finding: {reason}."]


def test_every_way_of_reading_a_report_names_each_set(make_run: Callable[..., Path]) -> None:
    folder = make_run(**values())
    page = write_report(folder).read_text()
    found = read_report(folder)
    console = Console(record=True, width=90)
    console.print(*remarks(found), sep="\n")
    accuracy = "Their zero-shot accuracy is 50.0 %"
    for text, name in (
        (page, '<h3 class="later">openi</h3>'),
        (results(found), "### On openi"),
        (console.export_text(), "on openi"),
    ):
        assert name in text
        assert accuracy in text.replace("\N{NO-BREAK SPACE}", " ")
    assert "also/nih14/classification/linear_probe/macro_auroc" in page
