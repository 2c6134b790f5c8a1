"""Three hospitals and a coordinator, each by its own commands alone: simulations/hospitals.sh, as a person watches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from little import ROOT, processes_of


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_three_hospitals_train_one_model_as_one_process_would(tmp_path: Path) -> None:
    work = tmp_path / "hospitals"
    environment = {**os.environ, "FEDMIX_BIN": str(Path(sys.executable).parent), "COLUMNS": "100"}
    shown = subprocess.run(
        [str(ROOT / "simulations/hospitals.sh"), str(work)], env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stdout[-3000:] + shown.stderr[-3000:]
    assert "The weights are equal to the bit" in shown.stdout
    report = json.loads((work / "server/runs/smoke/report.json").read_text())
    assert report["run"]["state"] == "completed"
    assert {site["name"]: site["bytes_up"] > 0 for site in report["sites"]} == {"north": True, "south": True, "west": True}
    assert shown.stdout.count("and every head that the peer wrote down is in it") == 3
    assert processes_of(work, "flower|flwr|fedmix") == []
