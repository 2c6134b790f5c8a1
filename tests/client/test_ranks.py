"""A site's round in several processes: the same update as from one, and no process left whatever happens."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little import World, is_running, values, waited_until

from client import ranks
from client.place import Place, materials
from fedmix.errors import FedmixError, RunError


def paired_world(folder: Path, *, steps: int = 3, **federation: Any) -> World:
    """One round of the site with pairs, on every kind of loss."""
    objectives = {"contrast": 1.0, "match": 0.5, "joint_share": 0.5, "match_negatives": "hard"}
    optimiser = {"kind": "adamw", "second_moment": "aggregated"}
    stage = {"name": "all", "rounds": 1, "streams": ["paired"], "local_steps": steps, "batch_size": 5}
    return World(
        folder,
        values(
            folder,
            stages=[stage | {"objectives": objectives, "optimiser": optimiser}],
            federation={"deadline_s": 240.0, "max_failed_rounds": 1} | federation,
        ),
    )


@pytest.mark.e2e
def test_two_processes_send_the_update_that_one_would(tmp_path: Path) -> None:
    """Through a whole round: the same studies counted, the same losses, the same change but for the order of sums."""
    worlds = [paired_world(tmp_path / str(total), processes_per_site=total) for total in (1, 2)]
    start = worlds[0].initial()
    one, two = (world.run() for world in worlds)
    sites = [next(row for row in world.seen if row["event"] == "site") for world in worlds]
    assert [row["values"]["data/paired"] for row in sites] == [15, 15]
    losses = [{name: loss for name, loss in row["values"].items() if name.startswith("train/")} for row in sites]
    assert set(losses[0]) == {f"train/{name}/loss" for name in ("mvm", "mlm", "contrast", "match")}
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    changed = torch.cat([(one.parameters[name] - start[name]).flatten() for name in start])
    apart = torch.cat([(one.parameters[name] - two.parameters[name]).flatten() for name in start])
    assert 0 < float(apart.norm()) < 1e-3 * float(changed.norm())
    state = worlds[1].places[2].state
    assert not list(state.glob(f"{ranks.PREFIX}*"))
    assert moments_of(worlds[0].places[2]) == moments_of(worlds[1].places[2])


def moments_of(place: Place) -> set[str]:
    """Names of what a site has kept for its next round."""
    return {name for path in place.state.rglob("round-*.safetensors") for name in ranks.load(path, "adamw")}


# ---- what ends a job


def job(world: World, *, timeout_s: float = 240.0) -> Callable[[], object]:
    """The round of the site with pairs by two processes."""
    place = world.places[2]
    model = materials(place, "all").learner.model
    task = ranks.Task("west", str(place.experiment), str(place.shard), "all", 0, {}, 2, timeout_s)
    return lambda: ranks.train(task, dict(model.named_parameters()), {}, state=place.state)


def pids(state: Path) -> dict[int, int]:
    """The processes that work for a site, by their number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "client.rank" in arguments and f"{state}/" in arguments[-3]:
            found[int(arguments[-2])] = int(path.parent.name)
    return found


@pytest.mark.e2e
def test_a_process_that_dies_ends_the_round_and_leaves_no_other(tmp_path: Path) -> None:
    world = paired_world(tmp_path, steps=100_000, processes_per_site=2)
    state, met = world.places[2].state, []

    def kill() -> None:
        waited_until(lambda: any(path.stat().st_size for path in state.glob(f"{ranks.PREFIX}*/{ranks.MEETING}")), 200.0)
        met.append(pids(state))
        os.kill(met[0][1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunError, match=r"process 1 of this site's 2 ended early \(signal 9\); last_error.txt in its state"):
        job(world)()
    killer.join()
    assert set(met[0]) == {0, 1}
    assert not any(is_running(pid) for pid in met[0].values())
    assert [path.name for path in state.iterdir()] == ["last_error.txt"]


def test_processes_that_do_not_come_to_an_end_are_ended(tmp_path: Path) -> None:
    world = paired_world(tmp_path, processes_per_site=2)
    with pytest.raises(RunError, match=r"2 processes were not done after 0.5 s; raise federation.deadline_s"):
        job(world, timeout_s=0.5)()
    assert not pids(world.places[2].state)


def test_what_is_said_is_what_failed_first(tmp_path: Path) -> None:
    """A refusal, then a process that was killed from outside; the others fail because it did."""
    ranks._check(tmp_path, [0, 0])
    with pytest.raises(RunError, match=r"process 2 of this site's 3 ended early \(signal 9\)"):
        ranks._check(tmp_path, [1, None, -9])
    (tmp_path / f"{ranks.REFUSED}-1").write_text("its shard is damaged; prepare it again")
    with pytest.raises(RunError, match=r"^its shard is damaged; prepare it again$"):
        ranks._check(tmp_path, [1, 1, -9])


@pytest.mark.slow
def test_what_a_process_refuses_is_said_as_if_there_were_one(tmp_path: Path) -> None:
    world = paired_world(tmp_path, processes_per_site=2)
    poisoned = materials(world.places[2], "all").learner.model
    with torch.no_grad():
        poisoned.patch_decoder.values.bias[0] = float("nan")
    with pytest.raises(FedmixError, match="the gradient is not finite; lower"):
        job(world)()


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    world = paired_world(tmp_path, steps=100_000, processes_per_site=2)
    state = world.places[2].state
    parent = os.fork()
    if parent == 0:
        try:
            job(world)()
        finally:
            os._exit(1)
    waited_until(lambda: any(path.stat().st_size for path in state.glob(f"{ranks.PREFIX}*/{ranks.MEETING}")), 200.0)
    started = pids(state)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    waited_until(lambda: not any(is_running(pid) for pid in started.values()), 20.0)
    assert set(started) == {0, 1}


def test_tensors_of_several_mappings_come_back_as_they_went(tmp_path: Path) -> None:
    given = {"a/b": torch.arange(6.0).reshape(2, 3).T, "c": torch.tensor(3.0)}
    ranks.save(tmp_path / "x", parameters=given, moments={"a/b": torch.zeros(2)})
    found = ranks.load(tmp_path / "x", "parameters")
    assert set(found) == set(given)
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert torch.equal(ranks.load(tmp_path / "x", "moments")["a/b"], torch.zeros(2))
