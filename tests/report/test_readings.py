"""The probe's other readings on the page: what is drawn, what is said, and what an older run leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import report_values

from fedmix.report.html import write_report
from fedmix.report.readings import Readings, readings
from fedmix.report.summary import Classification

REASON = "not enough data: 7 patients, at least 20 are needed"


def values(**changes: Any) -> dict[str, Any]:
    def block(auroc: float, **more: Any) -> dict[str, Any]:
        return {"macro_auroc": auroc, "ci95": [auroc - 0.02, auroc + 0.02], "num_test": 500} | more

    return {
        "linear_probe": block(0.86),
        "label_shares": {
            "1_percent": block(0.65, num_train=10, draws=[0.62, 0.65, 0.68]),
            "10_percent": block(0.8, num_train=100, draws=[0.79, 0.8, 0.81]),
            "100_percent": block(0.86, num_train=1000, draws=[0.86]),
        },
        "subgroups": {
            "view": {
                "AP": block(0.81, difference=-0.06, difference_ci95=[-0.09, -0.02], num_patients=310),
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
    shares, views = readings(Classification.model_validate(values())).panels
    assert [one.name for one in shares.whiskers] == ["1 % (10)", "10 % (100)", "100 % (1,000)"]
    assert [len(one.dots) for one in shares.whiskers] == [3, 3, 0]
    assert [(one.name, one.text) for one in views.whiskers] == [("AP (500)", "0.810"), ("PA (500)", "0.870")]
    assert shares.line == pytest.approx(shares.whiskers[-1].x)
    assert views.whiskers[0].x < views.line < views.whiskers[1].x
    assert "seeds" not in shares.description + views.description


def test_groups_that_are_behind_or_too_small_and_calibration_are_said() -> None:
    missing, behind, calibration = readings(Classification.model_validate(values())).notes
    assert missing == f"Not shown by view: lateral (8): {REASON}."
    assert "AP (\N{MINUS SIGN}0.060, \N{MINUS SIGN}0.090 to \N{MINUS SIGN}0.020)" in behind
    assert "PA" not in behind
    assert "expected error 0.024; calibrated probabilities on as many studies would give 0.015 to 0.021" in calibration
    assert "always saying how frequent a finding is gives 0.122" in calibration


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
