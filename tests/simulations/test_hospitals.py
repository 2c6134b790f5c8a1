"""Three hospitals and a coordinator, each by its own commands alone: simulations/hospitals.sh, as a person watches it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from alone import Traffic, alone, can_be_alone
from little import ROOT, processes_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], Traffic | None]:
    """The folder, what was said, and what happened on the network that they had for themselves, where there can be one."""
    work = tmp_path_factory.mktemp("work") / "hospitals"
    options = {"env": {**os.environ, "FEDMIX_BIN": str(Path(sys.executable).parent), "COLUMNS": "100"}}
    command = [str(ROOT / "simulations/hospitals.sh"), str(work)]
    if can_be_alone():
        return work, *alone(command, work.with_name("traffic.json"), **options)
    return work, subprocess.run(command, capture_output=True, text=True, check=False, **options), None


def test_three_hospitals_train_one_model_as_one_process_would(
    shown: tuple[Path, subprocess.CompletedProcess[str], Traffic | None],
) -> None:
    work, ended, _ = shown
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "The weights are equal to the bit" in ended.stdout
    report = json.loads((work / "server/runs/smoke/report.json").read_text())
    assert report["run"]["state"] == "completed"
    assert {site["name"]: site["bytes_up"] > 0 for site in report["sites"]} == {"north": True, "south": True, "west": True}
    assert ended.stdout.count("and every head that the peer wrote down is in it") == 3
    assert processes_of(work, "flower|flwr|fedmix") == []


def test_nobody_listened_beyond_loopback_and_nothing_was_sent_elsewhere(
    shown: tuple[Path, subprocess.CompletedProcess[str], Traffic | None],
) -> None:
    """Not one packet for another machine, and no datagram at all: no name was asked of DNS."""
    _, _, traffic = shown
    if traffic is None:
        pytest.skip("this machine lets its user make no network namespace")
    assert traffic.listening == {"127.0.0.1"}
    assert set(traffic.counts.values()) == {0}, traffic.counts
