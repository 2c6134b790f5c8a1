"""A run that is killed, again and again, ends in the same bytes as one that never was (trust.md, R1)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from deaths import DEATHS, Death, ended, forked
from flwr.app import Message
from little import ROOT, DirectGrid, World, command, fedmix, values, write_config

from fedmix import config
from fedmix.federation.update import digest
from server.store import RunStore
from server.store import _read_checkpoint as read_checkpoint

pytestmark = pytest.mark.e2e


def seven_rounds(folder: Path) -> Path:
    """The little experiment with some rounds more, so that there is something to kill."""
    wanted = values(folder)
    wanted["stages"][0]["rounds"], wanted["stages"][1]["rounds"] = 3, 4
    return write_config(folder, wanted)


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
    """What metrics.jsonl tells but for times, and for what a server sends again because it does not remember who holds it."""
    return [
        (
            row["event"],
            row["stage"],
            row["round"],
            row["site"],
            {
                name: value
                for name, value in row["values"].items()
                if not name.startswith("time/") and name != "comm/bytes_down"
            },
        )
        for row in rows(folder)
    ]


def ordered(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sites of a round report in the order in which they finish."""
    return sorted(found, key=lambda row: (row[2], row[0], row[3] or ""))


@pytest.mark.slow
def test_a_run_killed_at_many_points_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = seven_rounds(tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fedmix("simulate", path, "--out", whole).returncode == 0
    arguments = command("simulate", path, "--out", broken)
    chance = random.Random(20)
    num_kills = 0
    # After a round was told; a random moment after that, in one of the next; and once everything is trained.
    for wanted_round, delay in ((1, 0.0), (3, chance.uniform(0.0, 0.1)), (7, 0.3)):
        moment: list[float] = []

        def has_come(goal: int = wanted_round, later: float = delay, seen: list[float] = moment) -> bool:
            if not seen and last_round(broken) >= goal:
                seen.append(time.monotonic() + later)
            return bool(seen) and time.monotonic() >= seen[0]

        num_kills += killed(arguments, has_come)
        if "--resume" not in arguments:
            arguments.append("--resume")
    assert num_kills >= 2
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
    # A run that is taken up does not know what the sites hold, and sends everything once more.
    sent = [[site.pop("bytes_down") for site in report["sites"]] for report in reports]
    assert all(again >= once for once, again in zip(*sent, strict=True))
    assert reports[0]["sites"] == reports[1]["sites"]


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to, and how long it took."""

    wanted: dict[str, Any]
    parameters: str
    outer: str
    rows: list[tuple[Any, ...]]
    num_rounds: int
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Two stages of six rounds; a momentum at the server and lossy coding, so that there is state to lose everywhere."""
    folder = tmp_path_factory.mktemp("whole")
    wanted = values(folder, wire={"coding": "int8", "keep": 0.5}, federation={"deadline_s": 60.0, "participation": 0.5})
    for stage in wanted["stages"]:
        stage |= {"rounds": 6, "outer": {"momentum": 0.9, "lr": 0.7}}
    world = World(folder, wanted)
    begun = time.monotonic()
    committed = world.run()
    told_rows = ordered(told(world.store.folder))
    return Whole(wanted, digest(committed.parameters), digest(committed.outer), told_rows, 12, time.monotonic() - begun)


def newest(folder: Path) -> int:
    """The newest committed round, which must be whole whatever ended the run; 0 before the first."""
    folders = sorted((folder / "checkpoints").glob("round-*"))
    if not folders:
        return 0
    committed = read_checkpoint(folders[-1])
    assert committed is not None, f"{folders[-1].name} is torn"
    assert committed.round_number == int(folders[-1].name.removeprefix("round-"))
    return committed.round_number


def end(pid: int, after_s: float | None) -> int:
    """Kill a child after some seconds, if it has not ended by then; its exit code."""
    if after_s is not None:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ended(pid)


def one_life(folder: Path, wanted: dict[str, Any], death: Death | float | None) -> int:
    """Begin or take up a run until it dies or is through; returns its exit code. ``death`` may be a time in seconds.

    Asserts that it took up the newest committed round, and left nothing but that, or the next, as the newest.
    """
    stands = newest(folder / "run")
    reading, writing = os.pipe()

    def tell(number: int, stage: str, parameters: object) -> None:
        os.write(writing, bytes([number]))

    def job() -> None:
        World(folder, wanted, resume=(folder / "run/manifest.json").exists()).run(on_committed=tell)

    pid = forked(job, folder / "run", death if isinstance(death, Death) else None)
    os.close(writing)
    code = end(pid, death if isinstance(death, float) else None)
    with os.fdopen(reading, "rb") as pipe:
        committed = list(pipe.read())
    assert code == 0 or code in DEATHS
    first = stands or 1
    assert committed == list(range(first, first + len(committed)))  # no round that was committed is ever done again
    last = max([stands, *committed])
    assert newest(folder / "run") in (last, last + 1)  # the end may have come between a commit and its being told
    return code


def some_death(chance: random.Random, whole: Whole) -> Death | float:
    """At a call to the disk, in the midst of a write, or at any moment; mostly within the next two or three rounds."""
    kind = chance.choice(("call", "write", "moment"))
    if kind == "moment":
        return chance.uniform(0.0, 4 * whole.seconds / whole.num_rounds)
    return Death(kind, chance.randrange(150), chance.randrange(90_000))  # a model takes 85 kB, and a round 55 calls


@pytest.mark.parametrize(("num_kills", "seed"), [(20, 7), pytest.param(200, 8, marks=pytest.mark.slow)])
def test_kills_at_any_moment_and_any_call_to_the_disk_cost_no_bit_and_no_row(
    num_kills: int, seed: int, whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, between writes and in the midst of them; the process is this one's fork, so a start takes no time."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    chance, left, num_runs = random.Random(seed), num_kills, 0
    while left:
        num_runs += 1
        folder = tmp_path / f"run-{num_runs}"
        while one_life(folder, whole.wanted, some_death(chance, whole) if left else None) != 0:
            left -= 1
        committed = RunStore(folder / "run", config.build(whole.wanted), resume=True).latest()
        assert committed is not None
        assert committed.round_number == whole.num_rounds
        assert (digest(committed.parameters), digest(committed.outer)) == (whole.parameters, whole.outer)
        assert ordered(told(folder / "run")) == whole.rows
        shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["cut short", "one bit"])
@pytest.mark.parametrize("member", ["model.safetensors", "outer.safetensors", "round.json"])
def test_a_damaged_checkpoint_costs_one_round_and_no_bit(member: str, damage: str, whole: Whole, tmp_path: Path) -> None:
    """Stopped in the ninth round, when its sites may already have finished it."""

    class Stops(DirectGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if any(reply.content.config_records.get("receipt", {}).get("round") == 9 for reply in replies):
                raise KeyboardInterrupt
            return replies

    world = World(tmp_path, whole.wanted)
    with pytest.raises(KeyboardInterrupt):
        world.run(Stops(world.places, {}))
    run = world.store.folder
    assert newest(run) == 8
    path = run / "checkpoints/round-00008" / member
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data if damage == "one bit" else data[: len(data) // 2])
    committed = World(tmp_path, whole.wanted, resume=True).run()
    assert (digest(committed.parameters), digest(committed.outer)) == (whole.parameters, whole.outer)
    assert ordered(told(run)) == whole.rows
