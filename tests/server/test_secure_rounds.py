"""Whole rounds with a secure sum over the sites' real apps: the plain run's weights, and drop-outs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from crowd import plain_rounds, summed_rounds
from flwr.app import Message
from little import DirectGrid, World, failing

from fedmix.errors import RunError
from fedmix.federation.secure_sum import step_of
from fedmix.federation.update import group_of, tower_of
from fedmix.report.summary import Privacy
from server.secure import privacy_of
from server.store import RunStore

TOWERS = ("shared", "image", "text", "pair")


def row(world: World, event: str = "round") -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in reversed(world.seen) if one["event"] == event)["values"]
    return found


def test_a_round_s_weights_are_the_plain_ones_within_the_step(tmp_path: Path) -> None:
    plain, secret = World(tmp_path / "a", plain_rounds(tmp_path)), World(tmp_path / "b", summed_rounds(tmp_path))
    wanted, found = plain.run().parameters, secret.run().parameters
    assert secret.experiment.secure_sum is not None
    bound = 1.5 * step_of(secret.experiment.secure_sum)  # half a step a site; beside it float32 rounds the weights
    for name, value in wanted.items():
        assert bool(((value - found[name]).abs() <= bound + 2e-7 * value.abs().clamp_min(0.1)).all()), name
    before = plain.initial()
    moved = {name for name in before if not torch.equal(before[name], wanted[name])}
    assert moved == {name for name in before if not torch.equal(before[name], found[name])}
    told = row(secret)
    assert [told[f"secure_sum/sites/{tower}"] for tower in TOWERS] == [3.0, 2.0, 2.0, 0.0]
    assert told["secure_sum/clipped"] == 0.0


def test_a_site_that_drops_out_midway_costs_its_own_part_only(tmp_path: Path) -> None:
    world = World(tmp_path, summed_rounds(tmp_path))
    done = world.run(world.grid({"north": failing}))
    assert world.dropped() == {"north": "on purpose"}
    assert [row(world)[f"secure_sum/sites/{tower}"] for tower in TOWERS] == [2.0, 0.0, 2.0, 0.0]
    image = [name for name in done.parameters if tower_of(group_of(name)) == "image"]
    assert image
    assert all(torch.equal(value, done.parameters[name]) for name, value in world.initial().items() if name in image)
    said = Privacy.model_validate({"mode": "none"} | privacy_of(world.experiment, done.totals)).secure_sum
    assert said is not None
    assert (said.threshold, said.rounds, said.clipped) == (2, 1, 0)
    assert {tower: (one.rounds, one.fewest_sites) for tower, one in said.towers.items()} == {
        "shared": (1, 2),
        "image": (0, 0),
        "text": (1, 2),
        "pair": (0, 0),
    }
    assert said.step == step_of(world.experiment.secure_sum)


def test_rounds_without_enough_sites_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path, summed_rounds(tmp_path))
    with pytest.raises(RunError, match=r"failed 2 times in a row"):
        world.run(world.grid({"north": failing, "south": failing, "west": failing}))


class DiesAfter(DirectGrid):
    """A Grid whose server dies when it has collected the answers to a phase."""

    phase = "query.unmask"

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if messages and messages[0].metadata.message_type == self.phase:
            raise KeyboardInterrupt
        return replies


@pytest.mark.parametrize("phase", ["query.keys", "query.shares", "query.unmask"])
def test_a_server_that_dies_in_a_phase_repeats_the_round_with_fresh_keys(tmp_path: Path, phase: str) -> None:
    whole, world = (
        World(tmp_path / "a", summed_rounds(tmp_path, rounds=2)),
        World(tmp_path / "b", summed_rounds(tmp_path, rounds=2)),
    )
    wanted = whole.run().parameters
    grid = DiesAfter(world.places, {})
    grid.phase = phase
    with pytest.raises(KeyboardInterrupt):
        world.run(grid)
    world.store = RunStore(world.store.folder, world.experiment, resume=True)
    found = world.run().parameters
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
