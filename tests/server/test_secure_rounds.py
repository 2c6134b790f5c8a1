"""Whole rounds with a secure sum over the sites' real apps: the plain run's weights, and what a hospital lets leave."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from hospitals import approved, hospital
from little import DirectGrid, World, failing, values, wired

from client.app import build_app, from_node_config
from client.home import Home
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import Ledger
from fedmix.errors import RunError
from fedmix.federation.secure_sum import step_of
from fedmix.federation.update import group_of, tower_of
from fedmix.report.summary import Privacy
from server.books import Books
from server.secure import privacy_of
from server.store import RunStore

TOWERS = ("shared", "image", "text", "pair")


def experiment(folder: Path, *, rounds: int = 1, **changes: Any) -> dict[str, Any]:
    """One stage for all three sites; nothing that only the one paired site trains."""
    stage = {"name": "all", "rounds": rounds, "local_steps": 1, "batch_size": 4}
    stage["objectives"] = {"contrast": 0.0, "match": 0.0, "joint_share": 0.0}  # type: ignore[assignment]
    return values(folder, stages=[stage], aggregation={"clip": None}, **changes)


def summing(folder: Path, **changes: Any) -> dict[str, Any]:
    return experiment(folder, secure_sum={"threshold": 2, "clip": 0.1}, **changes)


def row(world: World, event: str = "round") -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in reversed(world.seen) if one["event"] == event)["values"]
    return found


def test_a_round_s_weights_are_the_plain_ones_within_the_step(tmp_path: Path) -> None:
    plain, secret = World(tmp_path / "a", experiment(tmp_path)), World(tmp_path / "b", summing(tmp_path))
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
    world = World(tmp_path, summing(tmp_path))
    done = world.run(world.grid({"north": failing}))
    assert world.dropped() == {"north": "on purpose"}
    assert [row(world)[f"secure_sum/sites/{tower}"] for tower in TOWERS] == [2.0, 0.0, 2.0, 0.0]
    image = [name for name in done.parameters if tower_of(group_of(name)) == "image"]
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
    world = World(tmp_path, summing(tmp_path))
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
    whole, world = World(tmp_path / "a", summing(tmp_path, rounds=2)), World(tmp_path / "b", summing(tmp_path, rounds=2))
    wanted = whole.run().parameters
    grid = DiesAfter(world.places, {})
    grid.phase = phase
    with pytest.raises(KeyboardInterrupt):
        world.run(grid)
    world.store = RunStore(world.store.folder, world.experiment, resume=True)
    found = world.run().parameters
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


# ---- hospitals, whose policy and gate stand between


class Hospitals(DirectGrid):
    """A Grid over the agents of three hospitals."""

    def __init__(self, world: World, homes: dict[str, Home]) -> None:
        super().__init__(world.places, {})
        self.homes = dict(zip(self.apps, homes.items(), strict=True))
        self.said: list[tuple[str, str, Message]] = []

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=number, name=name) for number, (name, _) in self.homes.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for number, message in enumerate(messages):
            name, home = self.homes[message.metadata.dst_node_id]
            ids.append(f"{len(self.said)}-{number}")
            message.metadata.__dict__["_message_id"] = ids[-1]
            node_config: Any = {"site": name, "home": str(home.folder)}
            context = Context(run_id=7, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
            self.replies[ids[-1]] = wired(build_app(from_node_config)(wired(message), context))
            self.said.append((message.metadata.message_type, name, self.replies[ids[-1]]))
        return ids


def joined(folder: Path, world: World, **keys: str) -> tuple[Hospitals, Books]:
    """Hospitals that have approved a plan with their keys; ``keys`` puts others in."""
    homes = {name: hospital(folder / "homes" / name, world, name, privacy={"secure_sum": True}) for name in world.shards}
    known = {name: " ".join(home.public_key.read_text().split()[:2]) for name, home in homes.items()} | keys
    plan = plans.Plan.of(world.experiment, list(homes), coordinator="fedmix.example:9092", valid_days=3, keys=known)
    path = folder / "plan.yaml"
    plans.write(plan, path)
    digests = {approved(home, path) for home in homes.values()}
    return Hospitals(world, homes), Books(Ledger(folder / "ledger.jsonl"), digests.pop(), known)


def test_hospitals_sum_in_secret_and_their_ledgers_tell_of_every_message(tmp_path: Path) -> None:
    plain, world = World(tmp_path / "a", summing(tmp_path)), World(tmp_path / "b", summing(tmp_path))
    grid, books = joined(tmp_path, world)
    found, wanted = world.run(grid, books=books).parameters, plain.run().parameters
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    for name, home in grid.homes.values():
        sent = [entry for entry in home.ledger().entries() if entry["event"] == "sent"]
        assert [entry["kind"] for entry in sent] == ["query", "query.keys", "query.shares", "train", "query.unmask"], name
        assert sent[3]["norm"] > 0.0  # of the update before its masks
    kinds = [entry["kind"] for entry in books.ledger.entries() if entry["direction"] == "in" and entry["peer"] == "west"]
    assert kinds == ["query", "query.keys", "query.shares", "train", "query.unmask"]


def test_an_update_that_is_too_long_leaves_in_no_form(tmp_path: Path) -> None:
    world = World(tmp_path / "a", summing(tmp_path))
    grid, books = joined(tmp_path, world)
    for _, home in grid.homes.values():
        home.policy_file.write_text("{min_studies: 5, max_norm: 1.0e-6}\n")
    with pytest.raises(RunError, match="this site's policy lets 1e-06 leave"):
        world.run(grid, books=books)
    assert not [said for kind, _, said in grid.said if kind == "train" and not said.has_error()]
