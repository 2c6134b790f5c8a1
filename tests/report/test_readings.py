"""The probe's other readings on the page: what is drawn, what is said, and what an older run leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import report_values

from fedmix.report import charts
from fedmix.report.evaluated import Evaluation
from fedmix.report.html import write_report
from fedmix.report.readings import Readings, other_ways, readings
from fedmix.report.summary import read_report
from fedmix.report.terminal import remarks

REASON = "not enough data: 7 patients, at least 20 are needed"


def values(**changes: Any) -> dict[str, Any]:
    def block(auroc: float, **more: Any) -> dict[str, Any]:
        return {"macro_auroc": auroc, "ci95": [auroc - 0.02, auroc + 0.02], "num_test": 500} | more

    return {
        "linear_probe": block(0.86, num_test=508),
        "label_shares": {
            "1_percent": block(0.65, num_train=10, draws=[0.62, 0.65, 0.68]),
            "10_percent": block(0.8, num_train=100, draws=[0.79, 0.8, 0.81]),
            "100_percent": block(0.86, num_train=1000, draws=[0.86]),
        },
        "subgroups": {
            "view": {
                "AP": block(0.81, difference=-0.06, difference_ci95=[-0.09, -0.02], num_patients=310,
                            num_labels_scored=6, num_labels_compared=3),
                "PA": block(0.87, difference=0.06, difference_ci95=[0.02, 0.09], num_patients=180),
                "lateral": {"macro_auroc": None, "ci95": None, "difference": None, "reason": REASON, "num_test": 8},
            }
        },
        "calibration": {
            "ece": 0.024, "ece_if_calibrated": [0.015, 0.021], "brier": 0.058, "brier_ci95": [0.054, 0.063],
            "brier_of_prevalence": 0.122, "bins": [{"mean_probability": 0.1, "share_present": 0.2, "count": 9}],
        },
    } | changes  # fmt: skip


def test_shares_and_subgroups_are_drawn_with_their_sizes_and_single_draws() -> None:
    shares, views = readings(Evaluation.model_validate({"classification": values()})).panels
    assert [one.name for one in shares.whiskers] == ["1 % (10)", "10 % (100)", "100 % (1,000)"]
    assert [len(one.dots) for one in shares.whiskers] == [3, 3, 0]
    assert [(one.name, one.text) for one in views.whiskers] == [("AP", "0.810"), ("PA", "0.870")]
    assert [one.under for one in views.whiskers] == ["500 studies, 6 findings", "500 studies"]
    assert views.whiskers[1].y + charts.UNDER_HEIGHT < views.height - charts.BOTTOM
    assert "AP 0.810 (500 studies, 6 findings)" in views.description
    assert shares.line == pytest.approx(shares.whiskers[-1].x)
    assert views.whiskers[0].x < views.line < views.whiskers[1].x
    assert "seeds" not in shares.description + views.description


def test_groups_that_are_behind_or_too_small_and_calibration_are_said() -> None:
    missing, compared, behind, calibration = readings(Evaluation.model_validate({"classification": values()})).notes
    assert missing == f"Not shown by view: lateral: {REASON}."
    assert compared == (
        "By view, difference from all other test patients on the findings that both have: AP \N{MINUS SIGN}0.060, "
        "\N{MINUS SIGN}0.090 to \N{MINUS SIGN}0.020 (on 3 findings); PA +0.060, +0.020 to +0.090."
    )
    assert "AP (\N{MINUS SIGN}0.060, \N{MINUS SIGN}0.090 to \N{MINUS SIGN}0.020)" in behind
    assert "PA" not in behind
    assert "expected error 0.024; calibrated probabilities on as many studies would give 0.015 to 0.021" in calibration
    assert "always saying how frequent a finding is gives 0.122" in calibration


def test_a_group_that_is_everybody_is_said_and_not_drawn() -> None:
    everybody = {"shard 2": {"macro_auroc": 0.86, "ci95": [0.8, 0.9], "num_test": 508, "difference": None}}
    found = readings(Evaluation.model_validate({"classification": values(subgroups={"site": everybody})}))
    assert [panel.title for panel in found.panels] == ["Linear probe AUROC by share of the labels"]
    assert found.notes[0] == "By site there is nothing to compare: all 508 test studies are of shard 2."


def test_subgroups_that_were_not_measured_have_their_reason_and_calibration_its_sizes() -> None:
    sizes = values()["calibration"] | {"num_labels_scored": 15, "num_test": 152}
    changed = {"classification": values(subgroups={}, calibration=sizes)}
    skipped = {"classification/subgroups": "the held-out set does not say which view"}
    *_, why, calibration = readings(Evaluation.model_validate(changed | {"skipped": skipped})).notes
    assert why == "No subgroups: the held-out set does not say which view."
    assert calibration.startswith("Calibration over 15 findings of 152 test studies: expected error 0.024")


def test_sex_and_age_band_are_told_in_words_on_the_page(make_run: Callable[..., Path]) -> None:
    behind = values()["subgroups"]["view"]["AP"]
    groups = {"sex": {"F": behind}, "age_band": {"80+": behind}}
    found = readings(Evaluation.model_validate({"classification": values(subgroups=groups)}))
    assert [panel.title for panel in found.panels[1:]] == ["Linear probe AUROC by sex", "Linear probe AUROC by age band"]
    assert found.notes[0].startswith("By sex, difference from all other test patients")
    (behind_note,) = [note for note in found.notes if note.startswith("Served less well")]
    assert "sex F (" in behind_note
    assert "age band 80+ (" in behind_note
    changed = report_values()
    changed["evaluation"]["classification"] |= values(subgroups=groups)
    source = write_report(make_run(**changed)).read_text()
    assert "Linear probe AUROC by age band" in source
    assert "By age band, difference" in source


def test_the_page_holds_them_and_an_older_run_has_no_such_section(make_run: Callable[..., Path]) -> None:
    assert readings(None) == Readings()
    assert "Labels, subgroups" not in write_report(make_run()).read_text()
    changed = report_values()
    changed["evaluation"]["classification"] |= values()
    changed["evaluation"]["classification"]["subgroups"]["<script>"] = {"<b>": values()["linear_probe"]}
    source = write_report(make_run(**changed)).read_text()
    assert "Labels, subgroups and calibration" in source
    assert "<script" not in source
    assert "<b>:" not in source


def asked(**skipped: str) -> Evaluation:
    """An evaluation with everything that learns from labels or reads reports' sentences, but for what is skipped."""
    shares = {
        "1_percent": {"macro_auroc": None, "ci95": None, "reason": "not enough data: 7 labelled studies", "num_train": 7},
        "100_percent": {
            "macro_auroc": 0.909, "ci95": [0.9, 0.92], "num_train": 1000, "draws": [0.909],
            "gain_over_probe": 0.015, "gain_over_probe_ci95": [0.006, 0.022],
        },
    }  # fmt: skip
    sentences = {
        "macro_auroc": 0.836, "ci95": [0.82, 0.85], "num_labels_scored": 9, "fixed_prompts": 0.835,
        "gain_over_fixed": 0.001, "gain_over_fixed_ci95": [-0.002, 0.004],
    }  # fmt: skip
    found = {"fine_tune": shares, "prompt_tune": shares, "mined_prompts": sentences}
    found = {name: block for name, block in found.items() if name not in skipped}
    return Evaluation.model_validate(
        {"classification": values() | found, "skipped": {f"classification/{name}": why for name, why in skipped.items()}}
    )


def test_what_learns_from_labels_is_told_beside_the_probe_and_what_was_not_asked_for_is_silent() -> None:
    mined, tuned, prompts = other_ways(asked())
    assert (
        "tells 9 findings apart at a macro AUROC of 0.836; fixed prompts reach 0.835 on them (+0.001, \N{MINUS SIGN}0.002"
        in mined
    )
    assert tuned == (
        "Fine-tuned end to end, it reaches a macro AUROC of 0.909 on 100 % (1,000) of the labels "
        "(+0.015, +0.006 to +0.022 over a linear probe)."
    )
    assert prompts.startswith("With tuned prompts on the frozen model, it reaches")
    assert other_ways(Evaluation.model_validate({"classification": values()})) == []
    assert other_ways(Evaluation()) == []
    refused = other_ways(asked(fine_tune="the encoder has no weights to train further"))
    assert "Fine-tuned end to end: nothing, for the encoder has no weights to train further." in refused


def test_the_page_the_terminal_and_the_card_tell_it(make_run: Callable[..., Path]) -> None:
    changed = report_values()
    changed["evaluation"]["classification"] |= asked().model_dump(by_alias=True, exclude_unset=True)["classification"]
    folder = make_run(**changed)
    page = write_report(folder).read_text()
    assert "Fine-tuning AUROC by share of the labels" in page
    assert "Tuned prompts AUROC by share of the labels" in page
    for text in (page, (folder / "report.md").read_text(), (folder / "model_card.md").read_text()):
        assert "Fine-tuned end to end, it reaches a macro AUROC of 0.909" in text.replace("\N{NO-BREAK SPACE}", " ")
    said = " ".join(remark.plain for remark in remarks(read_report(folder)))
    assert "Fine-tuned end to end" in said
    assert "Asked in sentences of reports" in said
