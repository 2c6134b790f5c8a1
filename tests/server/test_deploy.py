"""The ServerApp under a SuperLink, and what it is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from little import DirectGrid, World, everyone

from fedmix.errors import RunError
from fedmix.federation.update import digest
from fedmix.report.history import EVENTS
from server import deploy
from server.home import RUNS
from server.store import RunStore


@pytest.mark.parametrize("name", ["", "..", "../other", "/etc", "a/b", ".hidden", "a" * 81])
def test_a_run_is_named_and_never_a_path(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="should name a run folder"):
        deploy.run_folder({"run": name}, {RUNS: str(tmp_path)})


def test_a_run_that_is_not_there_and_a_server_that_was_not_told_where_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="FEDMIX_RUNS is not set"):
        deploy.run_folder({"run": "demo"}, {})
    with pytest.raises(RunError, match=r"no run 'demo' with a config\.yaml"):
        deploy.run_folder({"run": "demo"}, {RUNS: str(tmp_path)})
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/config.yaml").touch()
    assert deploy.run_folder({"run": "demo"}, {RUNS: str(tmp_path)}) == tmp_path / "demo"


def test_rows_are_shown_and_kept_as_they_come(tmp_path: Path) -> None:
    shown: list[Mapping[str, Any]] = []
    tell = deploy.teller(tmp_path, shown.append)
    rows = [{"event": "site", "round": 1}, {"event": "dropped", "round": 1, "site": "north", "why": "late\n"}]
    for number, row in enumerate(rows, 1):
        tell(row)
        assert [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()] == rows[:number]
    assert shown == rows


def context(name: str) -> Context:
    return Context(run_id=7, node_id=1, node_config={}, state=RecordDict(), run_config={"run": name})


def test_the_app_begins_a_run_folder_that_holds_a_config_and_takes_up_one_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = World(tmp_path / "here", everyone(tmp_path, rounds=1))
    expected = here.run()
    capsys.readouterr()
    monkeypatch.setenv(RUNS, str(tmp_path))
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(here.experiment.to_yaml())
    for _ in range(2):
        deploy.app(here.grid(), context("there"))
    lines = capsys.readouterr().out.splitlines()
    assert sum('"event": "round"' in line for line in lines) == 1  # the second time there was nothing left to do
    committed = RunStore(folder, here.experiment, resume=True).latest()
    assert committed is not None
    assert digest(committed.parameters) == digest(expected.parameters)


def test_a_run_that_fails_says_so_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "here", everyone(tmp_path))
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "config.yaml").write_text(world.experiment.to_yaml().replace("seed: 3", "seed: 4"))
    monkeypatch.setenv(RUNS, str(tmp_path))
    with pytest.raises(RunError, match="was given another experiment"):
        deploy.app(DirectGrid(world.places, {}), context("there"))
    manifest = (folder / "manifest.json").read_text()
    assert '"failed"' in manifest
    assert "was given another experiment" in manifest
