"""A run that is killed, again and again, ends in the same bytes as one that never was (trust.md, R1)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from little import ROOT, World, command, fedmix, values

from fedmix import config
from fedmix.federation.update import digest
from server.store import RunStore

pytestmark = pytest.mark.e2e


def smoke(folder: Path) -> Path:
    """The smoke run with a few rounds more, so that there is something to kill."""
    wanted: dict[str, Any] = yaml.safe_load((ROOT / "configs/smoke.yaml").read_text())
    wanted["data"]["cache"] = str(folder / "phantoms")
    wanted["stages"][0]["rounds"], wanted["stages"][1]["rounds"] = 3, 4
    wanted["baselines"] = {}
    path = folder / "smoke.yaml"
    path.write_text(yaml.safe_dump(wanted))
    return path


def killed(arguments: list[str], when: Callable[[], bool]) -> bool:
    """Start a command and kill all of its processes once ``when``; False if it ended before."""
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    ) as run:
        while not when() and run.poll() is None:
            time.sleep(0.002)
        ended = run.poll() is not None
        os.killpg(run.pid, signal.SIGKILL)
        assert run.stderr is not None
        err = run.stderr.read()
    assert not ended or run.returncode == 0, err
    return not ended


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            assert line == path.read_text().splitlines()[-1]  # torn by the kill
    return found


def last_round(folder: Path) -> int:
    return max((row["round"] for row in rows(folder) if row["event"] == "round"), default=0)


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl tells, times apart."""
    return [
        (
            row["event"],
            row["stage"],
            row["round"],
            row["site"],
            {name: value for name, value in row["values"].items() if not name.startswith("time/")},
        )
        for row in rows(folder)
    ]


def ordered(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sites of a round report in the order in which they finish."""
    return sorted(found, key=lambda row: (row[2], row[0], row[3] or ""))


def test_a_run_killed_at_many_points_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = smoke(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fedmix("simulate", path, "--out", whole).returncode == 0
    arguments = command("simulate", path, "--out", broken)
    chance = random.Random(20)
    num_kills = 0
    # After a round was told; some random moments after that, in the middle of the next; and once everything is trained.
    for wanted_round, delay in ((1, 0.0), (2, 0.05), (3, chance.uniform(0.0, 0.5)), (5, chance.uniform(0.0, 0.5)), (7, 0.3)):
        moment: list[float] = []

        def has_come(goal: int = wanted_round, later: float = delay, seen: list[float] = moment) -> bool:
            if not seen and last_round(broken) >= goal:
                seen.append(time.monotonic() + later)
            return bool(seen) and time.monotonic() >= seen[0]

        num_kills += killed(arguments, has_come)
        if "--resume" not in arguments:
            arguments.append("--resume")
    assert num_kills >= 4
    partial = broken / "checkpoints/.round-00099.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    last = fedmix("simulate", path, "--out", broken, "--resume")
    assert last.returncode == 0, last.stderr
    assert not partial.exists()
    for name in ("model/model.safetensors", "checkpoints/round-00007/model.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    for name in ("bytes_up/west", "examples/west", "bytes_full_fp32"):
        totals = [
            json.loads((folder / "checkpoints/round-00007/round.json").read_text())["totals"] for folder in (whole, broken)
        ]
        assert totals[0][name] == totals[1][name]
    # No row is lost and none is there twice, the points of the learning curve included.
    assert ordered(told(broken)) == ordered(told(whole))
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, broken)]
    assert reports[0]["evaluation"] == reports[1]["evaluation"]
    assert reports[0]["sites"] == reports[1]["sites"]


def started(folder: Path, wanted: dict[str, Any]) -> int:
    """A forked process that begins or takes up a run, sites and all; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            World(folder, wanted, resume=(folder / "run/manifest.json").exists()).run()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int | None:
    """Exit code of a process, or None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def test_two_hundred_kills_at_any_moment_cost_no_bit_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL in training, between writes, within them: the process is this one's fork, so a start takes no time."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    wanted = values(tmp_path)
    for stage in wanted["stages"]:
        stage["rounds"] = 6
    whole = World(tmp_path / "whole", wanted)
    goal = digest(whole.run().parameters)
    rows_of_the_whole = ordered(told(whole.store.folder))
    chance, num_kills, num_runs = random.Random(7), 0, 0
    while num_kills < 200:
        num_runs += 1
        folder = tmp_path / f"run-{num_runs}"
        while True:
            pid = started(folder, wanted)
            time.sleep(chance.uniform(0.0, 0.25))
            if (code := ended(pid)) is not None:
                assert code == 0
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            num_kills += 1
        store = RunStore(folder / "run", config.build(wanted), resume=True)
        committed = store.latest()
        assert committed is not None
        assert committed.round_number == 12
        assert digest(committed.parameters) == goal
        assert ordered(told(folder / "run")) == rows_of_the_whole
        shutil.rmtree(folder)
    assert num_runs > 1


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
def test_a_damaged_checkpoint_costs_one_round_and_no_bit(damage: str, tmp_path: Path) -> None:
    path = smoke(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fedmix("simulate", path, "--out", whole).returncode == 0
    # Killed in round 7, when its site may already have finished it.
    assert killed(command("simulate", path, "--out", broken), lambda: last_round(broken) >= 6)
    newest = sorted((broken / "checkpoints").glob("round-*"))[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    if damage == "one bit":
        data[-1000] ^= 4
    newest.write_bytes(data if damage == "one bit" else data[: len(data) // 2])
    resumed = fedmix("simulate", path, "--out", broken, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (broken / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()
    assert ordered(told(broken)) == ordered(told(whole))
