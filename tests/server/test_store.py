"""The run folder: a round is committed whole or not at all, and what a kill leaves half-written is never read."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from little import ROOT, values

from fedmix import config
from fedmix.errors import RunError
from fedmix.federation.update import digest
from server import store as store_module
from server.store import NUM_CHECKPOINTS, Committed, RunStore, row_of


def experiment(folder: Path, **changes: object) -> config.Experiment:
    return config.build(values(folder, **changes))


def committed(round_number: int) -> Committed:
    generator = torch.Generator().manual_seed(round_number)
    parameters = {"a.weight": torch.randn(40, 30, generator=generator), "b": torch.tensor(float(round_number))}
    return Committed(
        round_number,
        parameters,
        {"velocity/a.weight": torch.full((40, 30), 0.5)},
        {"bytes_up/north": 7.0 * round_number},
        {"strikes": {"north": round_number}},
        {"a.weight": 0.25},
    )


def run_of(folder: Path, rounds: int) -> RunStore:
    """A run with so many committed rounds, each with its row."""
    store = RunStore(folder / "run", experiment(folder), resume=False)
    for number in range(1, rounds + 1):
        store.append([row_of("round", stage="s", round_number=number, site=None, values={})])
        store.commit(committed(number))
    return store


def resumed(folder: Path) -> RunStore:
    return RunStore(folder / "run", experiment(folder), resume=True)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


def test_a_committed_round_is_read_back_to_the_bit(tmp_path: Path) -> None:
    run_of(tmp_path, 3)
    found = resumed(tmp_path).latest()
    assert found is not None
    assert found.round_number == 3
    assert digest(found.parameters) == digest(committed(3).parameters)
    assert digest(found.outer) == digest(committed(3).outer)
    assert found.totals["bytes_up/north"] == 21.0
    assert (found.screening, found.second_moments) == (committed(3).screening, committed(3).second_moments)
    assert found.parameters["b"].shape == ()


def test_the_newest_checkpoints_are_kept_and_older_ones_dropped(tmp_path: Path) -> None:
    run_of(tmp_path, 5)
    assert checkpoints(tmp_path) == ["round-00004", "round-00005"]
    assert NUM_CHECKPOINTS == 2


def test_a_run_without_a_committed_round_begins_at_the_beginning(tmp_path: Path) -> None:
    run_of(tmp_path, 0)
    assert resumed(tmp_path).latest() is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("member", ["model.safetensors", "outer.safetensors"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], member: str, tmp_path: Path
) -> None:
    run_of(tmp_path, 3)
    damage(tmp_path / "run" / "checkpoints" / "round-00003" / member)
    store = resumed(tmp_path)
    found = store.latest()
    assert found is not None
    assert found.round_number == 2
    assert store.damaged == ("round-00003",)
    assert [row["round"] for row in store._rows()] == [1, 2]  # round 3 is about to happen again
    store.commit(committed(3))
    assert resumed(tmp_path).latest() is not None
    assert checkpoints(tmp_path) == ["round-00002", "round-00003"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"round": 3}', '{"model_sha256": 3}'])
def test_a_checkpoint_without_its_facts_is_passed_over(text: str, tmp_path: Path) -> None:
    run_of(tmp_path, 3)
    (tmp_path / "run" / "checkpoints" / "round-00003" / "round.json").write_text(text)
    found = resumed(tmp_path).latest()
    assert found is not None
    assert found.round_number == 2


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    run_of(tmp_path, 3)
    for name in checkpoints(tmp_path):
        flip_a_bit(tmp_path / "run" / "checkpoints" / name / "model.safetensors")
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged; start anew in another folder with --out"):
        resumed(tmp_path)


def test_a_checkpoint_cut_short_by_a_kill_is_ignored_and_removed(tmp_path: Path) -> None:
    run_of(tmp_path, 2)
    partial = tmp_path / "run" / "checkpoints" / ".round-00003.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    found = resumed(tmp_path).latest()
    assert found is not None
    assert found.round_number == 2
    assert checkpoints(tmp_path) == ["round-00001", "round-00002"]


@pytest.mark.parametrize("moment", range(14))
def test_commit_is_all_or_nothing_wherever_it_is_cut_short(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever call to the disk is the last that happens, the folder holds round 2 or round 3, whole."""
    store = run_of(tmp_path, 2)
    left = [moment]

    class Killed(BaseException):
        pass

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **options)

        return call

    for owner, name in (
        (store_module, "save_file"),
        (store_module, "flush"),
        (store_module.os, "rename"),
        (store_module.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    finished = True
    try:
        store.commit(committed(3))
    except Killed:
        finished = False
    monkeypatch.undo()
    found = resumed(tmp_path).latest()
    assert found is not None
    assert found.round_number in ((3,) if finished else (2, 3))
    assert digest(found.parameters) == digest(committed(found.round_number).parameters)
    assert finished == (moment >= 12)


def test_a_full_disk_is_one_sentence_and_the_round_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = run_of(tmp_path, 2)

    def full(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(store_module, "flush", full)
    with pytest.raises(RunError, match=r"checkpoint of round 3: No space left on device; the round before it is kept"):
        store.commit(committed(3))
    monkeypatch.undo()
    found = resumed(tmp_path).latest()
    assert found is not None
    assert found.round_number == 2


# ---- metrics.jsonl


def test_rows_of_rounds_that_were_lost_are_dropped_and_a_torn_line_with_them(tmp_path: Path) -> None:
    store = run_of(tmp_path, 2)
    store.append([row_of("site", stage="s", round_number=3, site="north", values={"train/mvm/loss": 1.0})])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "site", "round": 3, "si')
    resumed(tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1, 2]


def test_a_row_names_time_event_stage_round_site_and_numbers(tmp_path: Path) -> None:
    store = run_of(tmp_path, 0)
    store.append([row_of("site", stage="paired", round_number=4, site="west", values={"train/mvm/loss": torch.tensor(2.5)})])  # type: ignore[dict-item]
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row.pop("time") > 1.7e9
    assert row == {"event": "site", "stage": "paired", "round": 4, "site": "west", "values": {"train/mvm/loss": 2.5}}
    assert store.has_row("site", 4)
    assert not store.has_row("site", 3)
    assert not store.has_row("round", 4)


# ---- manifest and identity


def test_the_manifest_says_what_is_needed_to_believe_or_repeat_a_run(tmp_path: Path) -> None:
    store = run_of(tmp_path, 1)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest == store.manifest
    assert manifest["state"] == "running"
    assert manifest["cause"] is None
    assert manifest["seed"] == 3
    assert manifest["fingerprint"] == experiment(tmp_path).fingerprint()
    assert manifest["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", manifest["commit"])
    assert (manifest["commit"] is not None) == (ROOT / ".git").exists()
    assert {"fedmix", "flwr", "torch", "numpy", "python"} <= set(manifest["versions"])
    assert manifest["hardware"]["cores"] >= 1
    assert config.load(tmp_path / "run" / "config.yaml") == experiment(tmp_path)
    store.finish("failed", "no site left")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["state"], manifest["cause"]) == ("failed", "no site left")
    assert manifest["finished"] >= manifest["started"]
    resumed(tmp_path)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["state"], manifest["cause"]) == ("running", None)


def test_two_runs_of_one_experiment_have_different_ids_and_a_resumed_run_keeps_its_own(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", 1)
    second = run_of(tmp_path / "b", 1)
    assert first.run_id != second.run_id
    assert first.run_id.startswith("little-")
    assert resumed(tmp_path / "a").run_id == first.run_id


def test_wall_time_goes_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(store_module.time, "time", lambda: clock[0])
    store = run_of(tmp_path, 0)
    clock[0] += 60
    store.commit(committed(1))
    clock[0] += 5000  # killed, and taken up the next day
    again = resumed(tmp_path)
    clock[0] += 7
    assert again.wall_s == 67.0


# ---- who may begin, and where


def test_a_folder_with_a_run_is_not_begun_again(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    with pytest.raises(RunError, match=r"already holds a run; go on with --resume, choose another folder with --out"):
        run_of(tmp_path, 0)


def test_a_run_that_failed_before_its_first_round_does_not_keep_its_folder(tmp_path: Path) -> None:
    store = run_of(tmp_path, 0)
    store.append([row_of("round", stage="s", round_number=1, site=None, values={})])
    store.finish("failed", "a shard is missing")
    again = run_of(tmp_path, 0)
    assert again.run_id != store.run_id
    assert again.manifest["state"] == "running"
    assert not again.has_row("round", 1)


def test_a_failed_run_with_a_committed_round_keeps_its_folder(tmp_path: Path) -> None:
    run_of(tmp_path, 1).finish("failed", "no site left")
    with pytest.raises(RunError, match="already holds a run"):
        run_of(tmp_path, 0)


def test_a_run_killed_while_it_began_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("half")
    assert run_of(tmp_path, 1).latest() is not None


def test_nothing_to_resume_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to resume; start it without --resume"):
        resumed(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null"])
def test_a_damaged_manifest_is_said(text: str, tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    (tmp_path / "run" / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json is damaged; start the run anew in another folder"):
        resumed(tmp_path)


def test_a_changed_experiment_is_not_resumed(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    with pytest.raises(RunError, match=r"the experiment has changed since the run in .* began"):
        RunStore(tmp_path / "run", experiment(tmp_path, seed=4), resume=True)


def test_what_does_not_decide_the_weights_may_change_and_is_written_down(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    changed = experiment(tmp_path, evaluation={"every": 1}, federation={"workers": 1, "deadline_s": 5.0})
    RunStore(tmp_path / "run", changed, resume=True)
    assert config.load(tmp_path / "run" / "config.yaml") == changed


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/fedmix/run")):
        with pytest.raises(RunError, match=r"cannot write the run folder .*; choose another with --out"):
            RunStore(folder, experiment(tmp_path), resume=False)


def test_a_folder_in_use_by_another_process_is_refused_and_free_again_when_that_is_killed(tmp_path: Path) -> None:
    run_of(tmp_path, 1)
    holding = (
        "import fcntl, os, sys, time; handle = os.open(sys.argv[1], os.O_RDWR); "
        "fcntl.lockf(handle, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holding, str(tmp_path / "run" / ".lock")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    with other:
        # This process held the lock through a store that is gone by now.
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="is going on in another process; wait for it, or stop it first"):
            resumed(tmp_path)
        other.send_signal(signal.SIGKILL)
    assert resumed(tmp_path).latest() is not None
