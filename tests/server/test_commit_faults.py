"""A commit that is cut short at every single call to the disk, and in the midst of its writes: all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from deaths import Death, died
from little import values

from fedmix import config
from fedmix.federation.update import digest
from server.store import Committed, RunStore, row_of


def committed(number: int) -> Committed:
    """A round whose every tensor and number is another than in the round before."""
    chance = torch.Generator().manual_seed(number)
    parameters = {"a.weight": torch.randn(40, 30, generator=chance), "b": torch.tensor(float(number))}
    outer = {"velocity/a.weight": torch.randn(40, 30, generator=chance)}
    screening = {"stage": "one", "strikes": {"west": number}, "norms": {"text.head/text": [0.5 * number]}}
    return Committed(number, parameters, outer, {"examples/north": 4.0 * number}, screening, {"a.weight": 0.25 / number})


def told(found: Committed | None) -> object:
    """All that a checkpoint holds but for times, so that it can be compared."""
    assert found is not None
    totals = {name: value for name, value in found.totals.items() if not name.endswith("_s")}
    return found.round_number, digest(found.parameters), digest(found.outer), totals, found.screening, found.second_moments


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> config.Experiment:
    return config.build(values(tmp_path_factory.mktemp("experiment")))


@pytest.fixture(scope="module")
def before(experiment: config.Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two committed rounds."""
    folder = tmp_path_factory.mktemp("before") / "run"
    store = RunStore(folder, experiment, resume=False)
    for number in (1, 2):
        write(store, number)
    return folder


def write(store: RunStore, number: int) -> None:
    """A round as the loop makes it last."""
    store.append([row_of("round", stage="s", round_number=number, site=None, values={"num_sites": 3})])
    store.commit(committed(number))


def survives(folder: Path, experiment: config.Experiment, death: Death) -> bool:
    """Cut the third round short and check what is left; whether there was anything left to cut short."""

    def job() -> None:
        write(RunStore(folder, experiment, resume=True), 3)

    has_died = died(job, folder, death)
    store = RunStore(folder, experiment, resume=True)
    found = store.latest()
    assert found is not None
    assert found.round_number in ((2, 3) if has_died else (3,))
    assert told(found) == told(committed(found.round_number))
    rounds = [row["round"] for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]
    assert rounds == list(range(1, found.round_number + 1))
    assert json.loads((folder / "manifest.json").read_text())["state"] == "running"
    if found.round_number == 2:
        write(store, 3)
        assert told(RunStore(folder, experiment, resume=True).latest()) == told(committed(3))
    return has_died


def test_a_round_is_there_whole_or_not_at_all_at_every_call_to_the_disk(
    experiment: config.Experiment, before: Path, tmp_path: Path
) -> None:
    num_calls = 0
    while survives(shutil.copytree(before, tmp_path / f"{num_calls}" / "run"), experiment, Death("call", num_calls)):
        num_calls += 1
        assert num_calls < 200
    assert num_calls > 30  # taking the run up, the rows, four files, their flushes, two renames, and the oldest round's end


@pytest.mark.parametrize("size", [0, 1, 7, 64, 150, 300, 1000, 4096, 4900, 5000])
def test_a_round_is_there_whole_or_not_at_all_when_a_write_is_torn(
    size: int, experiment: config.Experiment, before: Path, tmp_path: Path
) -> None:
    """The tensors take 4.9 KB each, the facts about 500 bytes, a row 100."""
    for calls in (0, 8, 12, 16):  # so that other writes are the first that fail
        survives(shutil.copytree(before, tmp_path / f"{calls}" / "run"), experiment, Death("write", calls, size))


def test_every_file_is_on_the_disk_before_the_round_appears_and_the_round_before_the_next_begins(
    experiment: config.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL loses nothing that was written; a power cut loses what was not flushed."""
    store = RunStore(tmp_path / "run", experiment, resume=False)
    done: list[tuple[str, str]] = []

    really_rename = os.rename

    def fsync(handle: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))

    def rename(source: Path, target: Path) -> None:
        # Its files, and its own entries.
        assert {("flush", str(path)) for path in (source, *source.iterdir())} <= set(done)
        done.append(("rename", str(target)))
        really_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    store.commit(committed(1))
    checkpoints = tmp_path / "run/checkpoints"
    assert done[-2:] == [("rename", str(checkpoints / "round-00001")), ("flush", str(checkpoints))]
