"""A coordinator's plan and run, without a SuperLink: what may be run, what is followed, and how its end is told."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from little import values, write_config

from fedmix import config
from fedmix.deployment import plan as plans
from fedmix.errors import ConfigError, RunError
from fedmix.report.history import EVENTS
from server import coordinator, deploy, planning, running, standing
from server.control import FlowerRun
from server.home import PLAN, Home, Settings

SITES = ("north", "south", "west")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    coordinator.init(made, Settings(host="localhost", listen="127.0.0.1", port=9443, control_port=9444, health_port=9445))
    return made


def agreed(home: Home, out: Path) -> planning.Agreed:
    experiment = config.load(write_config(out.parent, values(Path("phantoms"))))
    return planning.make_plan(home, experiment, SITES, out=out, valid_days=30)


def test_a_plan_is_run_as_it_was_made_and_with_the_coordinators_own_paths(home: Home, tmp_path: Path) -> None:
    made = agreed(home, tmp_path / "plan.yaml")
    assert planning.read_plan(home, tmp_path / "plan.yaml") == made
    assert made.experiment.data.cache.is_absolute()
    assert made.experiment.fingerprint() == made.plan.fingerprint
    assert made.plan.coordinator == "localhost:9443"


def test_a_plan_that_was_changed_is_of_another_coordinator_or_of_other_code_is_not_run(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plan.yaml"
    made = agreed(home, path)
    (tmp_path / "longer.yaml").write_text(path.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"was not made in .*, or was changed since"):
        planning.read_plan(home, tmp_path / "longer.yaml")
    plans.write(made.plan.model_copy(update={"valid_until": datetime.date(2020, 1, 1)}), tmp_path / "old.yaml")
    with pytest.raises(ConfigError, match="valid until 2020-01-01"):
        planning.read_plan(home, tmp_path / "old.yaml")
    monkeypatch.setattr(plans, "lock_hash", lambda: "0" * 64)
    with pytest.raises(ConfigError, match="libraries installed here have changed"):
        planning.read_plan(home, path)
    monkeypatch.setattr(plans, "code_hash", lambda: "0" * 64)
    with pytest.raises(ConfigError, match="another version of fedmix"):
        planning.read_plan(home, path)


def test_a_run_of_sites_that_are_not_registered_is_refused_before_anything_is_asked(home: Home, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="north, south, west not registered"):
        running.run(home, agreed(home, tmp_path / "plan.yaml"), resume=False, view=None)  # type: ignore[arg-type]


def test_a_run_folder_belongs_to_one_plan_and_is_taken_up_only_when_told(home: Home, tmp_path: Path) -> None:
    one, folder = agreed(home, tmp_path / "plan.yaml"), home.runs / "little"
    with pytest.raises(RunError, match="no run to resume"):
        running._prepare(folder, one, home, resume=True, is_active=False)
    running._prepare(folder, one, home, resume=False, is_active=False)
    assert plans.digest(folder / PLAN) == one.digest
    assert config.load(folder / "config.yaml").fingerprint() == one.plan.fingerprint
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="go on with --resume"):
        running._prepare(folder, one, home, resume=False, is_active=False)
    running._prepare(folder, one, home, resume=True, is_active=False)
    (folder / PLAN).write_text("another")
    with pytest.raises(RunError, match="follows another plan"):
        running._prepare(folder, one, home, resume=True, is_active=False)


def test_rows_are_shown_once_and_a_torn_one_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = running._Tail(path)
    assert tail.rows() == []
    path.write_text('{"round": 1}\n{"rou')
    assert tail.rows() == [{"round": 1}]
    with path.open("a") as file:
        file.write('nd": 2}\n')
    assert tail.rows() == [{"round": 2}]
    assert tail.rows() == []


def test_a_runs_end_is_told_in_its_own_words_if_it_had_any(tmp_path: Path) -> None:
    ended = FlowerRun(1, "little", "finished:failed", "round 1 failed")
    assert running._cause(tmp_path, ended) == "round 1 failed; go on with --resume"
    assert running._cause(tmp_path, FlowerRun(1, "little", "finished:stopped", "")) == deploy.STOPPED
    assert running._cause(tmp_path, FlowerRun(1, "little", "finished:failed", "")) == f"{running.DIED}; go on with --resume"
    (tmp_path / "manifest.json").write_text(json.dumps({"state": "failed", "cause": "site north: policy"}))
    assert running._cause(tmp_path, ended) == "site north: policy"


def test_a_coordinator_that_does_not_serve_still_tells_how_its_runs_stand(home: Home) -> None:
    folder = home.runs / "little"
    (folder / "checkpoints" / "round-00003").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"state": "running", "cause": None}))
    (folder / EVENTS).write_text(
        json.dumps({"event": "dropped", "round": 4, "site": "north", "why": "no reply before the deadline"}) + "\n"
    )
    found = standing.standing(home)
    assert not found.is_healthy
    assert found.runs == (standing.RunStanding("little", "stopped", 3, "round 4, north: no reply before the deadline"),)
