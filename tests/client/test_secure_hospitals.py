"""Secure sums over the agents of hospitals, whose policy and gate stand between."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from crowd import summed_rounds
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from hospitals import approved, hospital
from little import DirectGrid, World, wired

from client.app import build_app, from_node_config
from client.home import Home
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import Ledger
from fedmix.errors import RunError
from server.books import Books


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
    plain, world = World(tmp_path / "a", summed_rounds(tmp_path)), World(tmp_path / "b", summed_rounds(tmp_path))
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
    world = World(tmp_path / "a", summed_rounds(tmp_path))
    grid, books = joined(tmp_path, world)
    for _, home in grid.homes.values():
        home.policy_file.write_text("{min_studies: 5, max_norm: 1.0e-6}\n")
    with pytest.raises(RunError, match="this site's policy lets 1e-06 leave"):
        world.run(grid, books=books)
    assert not [said for kind, _, said in grid.said if kind == "train" and not said.has_error()]
