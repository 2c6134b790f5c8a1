"""A study: which cells it has, what a seed and a regime change, and that a killed one ends as if it had never been."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from little import ROOT, Silent, command, fedmix, values, write_config

from fedmix import config
from fedmix.errors import ConfigError, RunError
from simulations import progress, study
from simulations.cells import Cell, cells_of
from simulations.cost import step_costs
from simulations.study import run_study

SCARCE = {"data.sites.west.phantom.studies": 12, "stages": {"paired": {"rounds": 1}}}


def wanted(folder: Path, **changes: Any) -> dict[str, Any]:
    regimes = {"plentiful": {}, "scarce": SCARCE}
    return values(folder, study={"seeds": [1, 2], "regimes": regimes}, baselines={"random_init": {}, "one_shot": {}}) | changes


def cells(folder: Path, **changes: Any) -> list[Cell]:
    return cells_of(config.build(wanted(folder, **changes)), folder / "out")


# ---- cells


def test_every_regime_meets_every_seed_and_a_seed_s_regimes_come_together(tmp_path: Path) -> None:
    found = cells(tmp_path)
    assert [cell.name for cell in found] == ["plentiful/seed-1", "scarce/seed-1", "plentiful/seed-2", "scarce/seed-2"]
    assert [cell.folder for cell in found[:2]] == [tmp_path / "out/plentiful/seed-1", tmp_path / "out/scarce/seed-1"]
    assert [cell.experiment.seed for cell in found] == [1, 1, 2, 2]
    assert all(cell.experiment.study is None for cell in found)


def test_a_regime_fills_a_section_that_the_others_leave_out(tmp_path: Path) -> None:
    lie = {"attack": {"site": "west", "kind": "scale", "strength": 5.0}}
    honest, lied = (cell.experiment for cell in cells(tmp_path, study={"seeds": [1], "regimes": {"honest": {}, "lied": lie}}))
    assert honest.attack is None
    assert lied.attack is not None
    assert (lied.attack.kind, lied.attack.strength) == ("scale", 5.0)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_regime_of_the_configs_that_come_with_fedmix_can_be_run(path: Path, tmp_path: Path) -> None:
    experiment = config.load(path, ["study.seeds=[1]"] if "\nstudy:" in path.read_text() else [])
    if experiment.study is not None:
        assert len(cells_of(experiment, tmp_path)) == len(experiment.study.regimes)


def test_a_regime_overrides_a_site_and_a_stage_by_name_and_nothing_else(tmp_path: Path) -> None:
    plentiful, scarce = (cell.experiment for cell in cells(tmp_path)[:2])
    assert [site.phantom.studies for site in plentiful.data.sites if site.phantom] == [24, 24, 24]
    assert [site.phantom.studies for site in scarce.data.sites if site.phantom] == [24, 24, 12]
    assert [stage.rounds for stage in plentiful.stages] == [1, 2]
    assert [stage.rounds for stage in scarce.stages] == [1, 1]
    one, other = (experiment.model_dump(mode="json") for experiment in (plentiful, scarce))
    assert one["model"] == other["model"]
    assert one["data"]["held_out"] == other["data"]["held_out"]


def test_a_seed_draws_other_studies_at_the_sites_and_the_same_held_out_ones(tmp_path: Path) -> None:
    found = {cell.name: cell.experiment.data for cell in cells(tmp_path)}
    drawn = {name: [site.phantom.seed for site in data.sites if site.phantom] for name, data in found.items()}
    assert drawn["plentiful/seed-1"] == drawn["scarce/seed-1"]
    assert not set(drawn["plentiful/seed-1"]) & set(drawn["plentiful/seed-2"])
    assert len({data.held_out.model_dump_json() for data in found.values()}) == 1
    assert all(data.held_out.phantom and data.held_out.phantom.seed == 9 for data in found.values())


def test_a_regime_that_does_not_fit_is_said_before_anything_is_drawn(tmp_path: Path) -> None:
    for overrides, said in (
        ({"data.sites.west.phantom.study": 3}, "study.regimes.odd: unknown key .*phantom.study"),
        ({"data.sites.nowhere.phantom.studies": 3}, "'nowhere' is neither a name nor a position"),
        ({"stages": [{"name": "unpaired", "rounds": 1, "streams": ["image"]}]}, "paired_only: no stage has a paired site"),
    ):
        with pytest.raises(ConfigError, match=said):
            cells(tmp_path, study={"seeds": [1], "regimes": {"odd": overrides}}, baselines={"paired_only": {}})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "phantoms").exists()


def test_a_cell_is_done_only_if_it_was_completed_as_it_is_asked_for_now(tmp_path: Path) -> None:
    cell = cells(tmp_path)[0]
    assert not cell.is_done
    cell.folder.mkdir(parents=True)
    (cell.folder / "report.json").write_text("{}")
    (cell.folder / "config.yaml").write_text(cell.experiment.to_yaml())
    for state, done in (("running", False), ("failed", False), ("completed", True)):
        (cell.folder / "manifest.json").write_text(json.dumps({"state": state}))
        assert cell.is_done is done
    moved = (
        cells(tmp_path)[0].experiment.to_yaml().replace(str(tmp_path / "out"), "/elsewhere").replace("workers: 0", "workers: 2")
    )
    (cell.folder / "config.yaml").write_text(moved)
    assert cell.is_done, "where a folder lies and how many workers it had changes no result"
    assert not cells(tmp_path, baselines={"random_init": {}, "one_shot": {}, "centralised": {}})[0].is_done
    (cell.folder / "manifest.json").write_text(
        json.dumps({"state": "completed", "warm_start": {"image": "another file's hash"}})
    )
    assert not cell.is_done
    (cell.folder / "manifest.json").write_text(json.dumps({"state": "completed", "warm_start": {}}))
    (cell.folder / "report.json").unlink()
    assert not cell.is_done


def test_a_study_s_folder_is_neither_overwritten_nor_invented(tmp_path: Path) -> None:
    experiment, view = config.build(wanted(tmp_path)), Silent()
    out = tmp_path / "out"
    with pytest.raises(RunError, match="holds no study to resume"):
        run_study(experiment, out, engine_name="inprocess", resume=True, view=view)
    out.mkdir()
    (out / "config.yaml").write_text("name: other")
    with pytest.raises(RunError, match="already holds a study; go on with --resume"):
        run_study(experiment, out, engine_name="inprocess", resume=False, view=view)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="holds a single run, not a study"):
        run_study(experiment, out, engine_name="inprocess", resume=True, view=view)
    assert (out / "config.yaml").read_text() == "name: other"


# ---- what is left, and what it costs


def test_the_time_left_is_told_from_examples_and_pairs_count_three(tmp_path: Path) -> None:
    cell = cells(tmp_path)[0]
    unpaired, paired, once = 1 * 2 * 4 * 2, 2 * 2 * 4 * 1 * 3, progress.EVALUATION_COST
    assert progress.costs_of(cell.experiment) == {
        "fedmix": unpaired + paired + once,
        "random_init": once,
        "one_shot": unpaired + paired + once,
    }


def test_progress_says_which_cell_which_method_and_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    found, view = cells(tmp_path), Silent()
    telling = progress.Progress(found, found[1:], view)
    telling.hear(found[1], {"method": "fedmix"})
    now[0] += 60
    telling.hear(found[1], {"method": "random_init"})
    telling.hear(found[1], {"row": {"event": "dropped", "round": 2, "why": "no reply before the deadline"}})
    telling.hear(found[1], {"failed": "the disk is full"})
    telling.end(found[1])
    assert view.said[0] == "[1 of 4 cells]  scarce/seed-1: fedmix (1 of 3 methods)"
    # Of three cells of three methods that all cost nearly the same, one method took a minute: eight are left.
    assert view.said[1] == "[1 of 4 cells, about 8 min left]  scarce/seed-1: random_init (2 of 3 methods)"
    assert view.said[2] == "scarce/seed-1, random_init: round 2 dropped, no reply before the deadline"
    assert view.said[3].endswith("scarce/seed-1: failed")
    assert telling.causes == {"scarce/seed-1": "the disk is full"}


def test_as_many_cells_run_at_once_as_the_cores_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.os, "sched_getaffinity", lambda process: set(range(8)))
    for federation, engine_name, at_once in (
        ({}, "inprocess", 8),
        ({"threads_per_site": 2}, "inprocess", 4),
        ({"threads_per_site": 2, "workers": 3}, "inprocess", 1),
        ({"processes_per_site": 4}, "inprocess", 2),
        ({}, "ray", 1),
    ):
        experiment = config.build(wanted(tmp_path, federation=federation))
        assert study._at_once(experiment, engine_name) == at_once  # type: ignore[arg-type]


def test_a_step_is_measured_once_for_each_kind_of_step(tmp_path: Path) -> None:
    experiment = config.build(wanted(tmp_path))
    found = step_costs([experiment, experiment])
    assert sorted(key.split("/")[0] for key in found) == ["image", "paired", "text"]
    assert all(0 < seconds < 5 for seconds in found.values())
    wider = experiment.model_copy(update={"model": experiment.model.model_copy(update={"width": 32})})
    assert not step_costs([wider]).keys() & found.keys()


# ---- whole studies


def results(folder: Path) -> dict[str, Any]:
    """What a study found, times apart."""
    cells = json.loads((folder / "study.json").read_text())["cells"]
    for cell in cells:
        for method in cell["methods"].values():
            del method["core_s"]
    return {f"{cell['regime']}/{cell['seed']}": cell for cell in cells}


@pytest.mark.slow
@pytest.mark.timeout(900)  # four studies; on a busy machine each takes minutes
def test_a_killed_study_ends_as_one_that_never_was(tmp_path: Path) -> None:
    plan = wanted(tmp_path, baselines={"one_shot": {}, "best_site": {}, "centralised_steps": {}})
    plan["study"]["regimes"] = {"main": {}}
    path = write_config(tmp_path, plan)
    whole = fedmix("simulate", path, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "2 of 2 runs complete: 1 regime, 2 seeds." in whole.stdout

    out = tmp_path / "killed"
    with subprocess.Popen(command("simulate", path, "--out", out), stdout=subprocess.DEVNULL, cwd=ROOT) as run:
        deadline = time.monotonic() + 120
        while not list(out.glob("*/seed-*/baselines/one_shot/checkpoints/round-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)  # the study's process alone: its cells must not go on
    time.sleep(1.0)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    time.sleep(1.0)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before, "a cell outlived its study"
    partly = fedmix("compare", out)
    assert partly.returncode == 0, partly.stderr
    assert "0 of 2 runs" in partly.stdout

    again = fedmix("simulate", path, "--out", out, "--resume")
    assert again.returncode == 0, again.stderr
    assert results(out) == results(tmp_path / "whole")
    left = [path for pattern in ("*/*/.phantoms", "*/*/sites", "*/*/baselines/*/sites") for path in out.glob(pattern)]
    assert not left, "a finished cell keeps no phantoms and no optimiser states"

    # Nothing is done twice; a damaged cell alone is done again.
    shutil.rmtree(out / "main/seed-2")
    kept = {path: path.stat().st_mtime_ns for path in out.glob("main/*/report.json")}
    third = fedmix("simulate", path, "--out", out, "--resume")
    assert third.returncode == 0, third.stderr
    assert "1 of 2 cells are completed and kept" in third.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert results(out) == results(tmp_path / "whole")


@pytest.mark.e2e
def test_a_cell_that_fails_is_named_and_the_others_are_finished(tmp_path: Path) -> None:
    shard = tmp_path / "gone"
    plan = wanted(tmp_path, baselines={})
    plan["study"] = {
        "seeds": [1],
        "regimes": {"fine": {}, "broken": {"data": {"sites": {"west": {"phantom": None, "shard": str(shard)}}}}},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    answer = fedmix("simulate", path, "--out", tmp_path / "out")
    assert answer.returncode == 1
    assert "1 of 2 cells failed (broken/seed-1: site west: there is no shard at" in answer.stderr
    compared = fedmix("compare", tmp_path / "out", "--out", tmp_path / "page.html")
    assert compared.returncode == 0, compared.stderr
    assert "1 of 2 runs complete, 1 failed: 2 regimes, 1 seed each." in compared.stdout
    assert "1 failed" in (tmp_path / "page.html").read_text()
