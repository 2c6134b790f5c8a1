"""Single findings: a bar rests on enough studies, and what has none is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from synthetic_run import report_values

from fedmix.report.evaluated import Classification
from fedmix.report.findings import Findings, findings, notes
from fedmix.report.html import write_report


def cases(positive: int, negative: int = 100) -> dict[str, int]:
    return {"positive": positive, "negative": negative}


def rare(**changes: Any) -> dict[str, Any]:
    """Five findings: two with enough studies, two with too few, one that no study has."""
    return {
        "macro_auroc": 0.8,
        "per_label": {"Edema": 0.7, "Pleural_Thickening": 0.73, "Fibrosis": 0.993, "No Finding": 0.9, "Hernia": None},
        "num_per_label": {
            "Edema": cases(1200), "Pleural_Thickening": cases(5), "Fibrosis": cases(1), "No Finding": cases(100, 4),
            "Hernia": cases(0),
        },
        "num_test": 152,
    } | changes  # fmt: skip


def test_a_finding_with_hardly_any_study_has_no_bar_and_is_named_with_its_number() -> None:
    found = findings(Classification.model_validate({"linear_probe": rare()}))
    (panel,) = found.panels
    assert [(bar.name, bar.size) for bar in panel.bars] == [("Pleural Thickening", " (5)"), ("Edema", " (1,200)")]
    assert panel.macro is not None
    assert panel.macro.text == "0.800"
    assert "Edema (1,200) 0.700" in panel.description
    assert found.notes == (
        "Linear probe AUROC: the mean is over 4 of 5 findings, 152 test studies. Not enough data to stand alone, with fewer "
        "than 5 studies with or without it, yet part of the mean: No Finding (4) and Fibrosis (1). No AUROC, for want of any "
        "study with or without the finding: Hernia.",
    )


def test_two_readings_of_the_same_findings_share_a_sentence() -> None:
    (told,) = notes(Classification.model_validate({"linear_probe": rare(), "zero_shot": rare(macro_auroc=0.7)}))
    assert told.startswith("Zero-shot AUROC and Linear probe AUROC: the mean is over 4 of 5 findings")


def test_an_older_run_without_counts_has_all_its_bars_and_no_sentence() -> None:
    found = findings(Classification.model_validate({"linear_probe": rare(num_per_label={})}))
    assert [bar.size for bar in found.panels[0].bars] == [""] * 4
    assert found.notes == ()
    assert findings(None) == Findings(absence="No finding was evaluated on its own.")


def test_where_no_finding_has_enough_studies_there_is_the_sentence_alone() -> None:
    few = rare(per_label={"Fibrosis": 0.993}, num_per_label={"Fibrosis": cases(1)})
    found = findings(Classification.model_validate({"linear_probe": few}))
    assert found.panels == ()
    assert "Fibrosis (1)" in found.notes[0]
    assert not found.absence


def test_the_page_and_both_cards_say_over_how_many_findings_a_mean_is(make_run: Callable[..., Path]) -> None:
    changed = report_values()
    changed["evaluation"]["classification"]["linear_probe"] = rare()
    folder = make_run(**changed)
    page = write_report(folder).read_text()
    assert "Pleural Th… (5)" in page or "Pleural Thickening (5)" in page
    for text in (page, (folder / "report.md").read_text(), (folder / "model_card.md").read_text()):
        assert "the mean is over 4 of 5 findings" in text
