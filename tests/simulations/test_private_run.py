"""The whole path under differential privacy: a smoke run that reports its epsilon, and one that stops at its budget."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from little import fedmix

DP = ("stages.1.objectives.contrast=0", "stages.1.objectives.match=0", "baselines={}", "evaluation.every=0", "privacy.mode=dp")


def simulate(out: Path, *settings: str) -> tuple[int, str]:
    """Exit code and stderr of the smoke run with some settings."""
    chosen = [part for setting in (*DP, *settings) for part in ("--set", setting)]
    done = fedmix("simulate", "configs/smoke.yaml", "--out", out, *chosen)
    return done.returncode, done.stderr


@pytest.mark.e2e
def test_a_run_within_its_budget_reports_a_finite_epsilon(tmp_path: Path) -> None:
    code, errors = simulate(tmp_path / "run", "privacy.epsilon=8")
    assert code == 0, errors
    privacy = json.loads((tmp_path / "run/report.json").read_text())["privacy"]
    assert privacy["mode"] == "dp"
    assert 0 < privacy["epsilon"] <= 8
    assert math.isfinite(privacy["epsilon_rdp"])
    assert {site["name"]: site["steps"] for site in privacy["sites"]} == {"north": 4, "south": 4, "west": 8}
    assert all(7.5 < site["epsilon"] <= 8 for site in privacy["sites"])  # each has the least noise that its own plan needs
    page = (tmp_path / "run/report.html").read_text()
    assert "Privacy spent" in page
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert not any("loss" in name for row in rows for name in row)  # losses are exact facts about patients


@pytest.mark.e2e
def test_a_run_stops_at_its_budget_and_says_so(tmp_path: Path) -> None:
    code, errors = simulate(tmp_path / "run", "privacy.epsilon=2.5", "privacy.noise_multiplier=0.9", "stages.1.rounds=40")
    assert code == 1
    assert "privacy budget of this site's patients would be passed" in " ".join(errors.split())
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["state"] == "failed"
    ledger = (tmp_path / "run/sites/west/privacy.jsonl").read_text().splitlines()
    assert 0 < len(ledger) < 40
