"""A run over real sites: only registered names on the plan are asked, and every message stands in the ledger."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from little import SITES, DirectGrid, World, everyone, failing

from fedmix.deployment.ledger import Ledger, verify
from fedmix.errors import RunError
from server import messages, roster
from server.books import Books
from server.roster import Roster

PLAN = "c" * 64


class Registered(DirectGrid):
    """A Grid whose nodes have names, in the order of the places; notes who is sent what."""

    def __init__(self, world: World, names: Iterable[str], **changes: Any) -> None:
        super().__init__(world.places, changes)
        self.names = dict(zip(self.apps, names, strict=False))
        self.sent: list[tuple[str, Message]] = []

    def get_node_ids(self) -> Iterable[int]:
        raise AssertionError("nodes have to be known by name")

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=number, name=name) for number, name in self.names.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent += [(self.names[message.metadata.dst_node_id], message) for message in messages]
        return super().push_messages(messages)


def test_every_message_is_in_the_ledger_before_it_counts(tmp_path: Path) -> None:
    world, books = World(tmp_path / "a", everyone(tmp_path)), Books(Ledger(tmp_path / "ledger.jsonl"), PLAN)
    grid = Registered(world, ["north", "south", "west"], south=failing)
    world.run(grid, books=books)
    entries = list(books.ledger.entries())
    assert verify(tmp_path / "ledger.jsonl").entries == len(entries) == 12
    assert {entry["plan"] for entry in entries} == {PLAN}
    for entry, (site, message) in zip([one for one in entries if one["direction"] == "out"], grid.sent, strict=True):
        assert (entry["event"], entry["peer"], entry["kind"]) == ("sent", site, message.metadata.message_type)
    order = next(message for site, message in grid.sent if message.metadata.message_type == "train" and site == "north")
    assert order.content.config_records["order"]["plan"] == PLAN
    heads = {entry["hash"]: entry for entry in entries}
    assert heads[str(order.content.config_records["order"]["ledger"])]["peer"] == "north"
    replies = {entry["peer"]: entry for entry in entries if entry["direction"] == "in" and entry["kind"] == "train"}
    assert replies["south"]["why"] == "on purpose"
    assert replies["north"]["why"] is None
    assert replies["north"]["norm"] > 0.0
    assert "mvm/loss" in replies["north"]["metrics"]
    assert not any(group.startswith("text") for group in replies["north"]["groups"])


def test_a_node_under_a_name_that_is_on_no_plan_is_never_asked(tmp_path: Path) -> None:
    whole = World(tmp_path / "whole", everyone(tmp_path))
    some = everyone(tmp_path)
    some["data"]["sites"] = some["data"]["sites"][:2]
    run = World(tmp_path / "two", some)
    grid = Registered(run, ["north", "south", "east"])
    grid.names[99] = "east"
    run.run(grid, books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))
    assert {site for site, _ in grid.sent} == {"north", "south"}
    assert whole.places


def test_a_node_that_answers_under_another_name_than_its_key_ends_the_run_with_words(tmp_path: Path) -> None:
    world = World(tmp_path / "a", everyone(tmp_path))
    grid = Registered(world, ["south", "north", "west"])
    with pytest.raises(RunError, match=r"site (north|south): its node answers under another name"):
        world.run(grid, books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))


def test_a_site_that_is_not_connected_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "GREETING_DEADLINE_S", 0.0)
    world = World(tmp_path / "a", everyone(tmp_path))
    with pytest.raises(RunError, match=r"2 of 3 nodes came within 0 s \(west missing\)"):
        world.run(Registered(world, ["north", "south"]), books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))


def offline(message: Message) -> Message:
    """What the SuperLink answers for a node that has gone."""
    return Message(Error(code=5, reason="Node Unavailable"), reply_to=message)


def test_a_site_that_goes_offline_before_it_has_said_who_it_is_is_asked_again(tmp_path: Path) -> None:
    world, books = World(tmp_path / "a", everyone(tmp_path)), Books(Ledger(tmp_path / "ledger.jsonl"), PLAN)

    class Gone(Registered):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            messages = list(messages)
            answers = list(super().send_and_receive(messages, timeout=timeout))
            return answers if len(messages) == 1 else [*answers[:2], offline(messages[2])]

    grid = Gone(world, ["north", "south", "west"])
    world.run(grid, books=books)
    assert [site for site, message in grid.sent if message.metadata.message_type == "query"] == [*SITES, "west"]
    assert world.taken() == [(1, "north"), (1, "south"), (1, "west")]
    greetings = [entry["why"] for entry in books.ledger.entries() if entry["kind"] == "query" and entry["direction"] == "in"]
    assert greetings == [None, None, "its agent went offline", None]


def test_a_site_that_stays_offline_ends_the_run_before_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Registered):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            messages = list(messages)
            self.push_messages(messages)
            return list(map(offline, messages))

    monkeypatch.setattr(roster, "GREETING_DEADLINE_S", 0.1)
    world = World(tmp_path / "a", everyone(tmp_path))
    with pytest.raises(RunError, match="no node answered for north, south, west; start their agents"):
        world.run(Gone(world, SITES), books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))


def test_a_lost_agent_is_waited_for_but_only_once_if_it_does_not_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [SITES]  # by one question after the other, and then for good

    class Seen(DirectGrid):
        def get_nodes(self) -> Iterable[NodeInfo]:
            names = seen[0] if len(seen) == 1 else seen.pop(0)
            return [NodeInfo(name=name) for name in names]

    monkeypatch.setattr(roster, "RETURN_S", 0.2)
    monkeypatch.setattr(roster, "GREETING_POLL_S", 0.01)
    world, two, grid = World(tmp_path / "a", everyone(tmp_path)), SITES[:2], Seen([], {})
    sites = Roster(grid, world.experiment, books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))
    assert sites.away(SITES) == set()
    seen[:] = [two, two, SITES]
    assert sites.away(SITES) == set()
    seen[:] = [two]
    assert sites.away(SITES) == {"west"}
    seen[:] = [two, SITES]
    assert sites.away(SITES) == {"west"}  # not waited for
    assert sites.away(SITES) == set()
    seen[:] = [two, SITES]
    assert sites.away(SITES) == set()  # seen since, and waited for again
    assert Roster(grid, world.experiment).away(SITES) == set()


@pytest.mark.parametrize("head", ["x", "A" * 64, "a" * 63, 7])
def test_what_is_no_head_of_a_ledger_is_refused(head: object) -> None:
    with pytest.raises(messages.UpdateError, match="ledger"):
        messages._head({"ledger": head})


@pytest.mark.parametrize("studies", [0, -8])
def test_a_site_that_registers_no_studies_is_no_site(tmp_path: Path, studies: int) -> None:
    world = World(tmp_path / "a", everyone(tmp_path))

    class Odd(Registered):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
            answers = list(super().send_and_receive(messages, timeout=timeout))
            answers[-1].content.config_records["greeting"]["studies"] = studies
            return answers

    with pytest.raises(RunError, match=f"site west: the site registers {studies} training studies"):
        world.run(Odd(world, SITES), books=Books(Ledger(tmp_path / "ledger.jsonl"), PLAN))


# ---- a run that is taken up


class BrokenError(Exception):
    """What ends a run in its second round."""


def killed_in_round_2(world: World, books: Books) -> None:
    class Breaking(Registered):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            if any(one.metadata.message_type == "train" for one in messages) and world.taken():
                raise BrokenError
            return super().push_messages(messages)

    # A round's orders go out one by one, so taken updates mean that the first round is over.
    with pytest.raises(BrokenError):
        world.run(Breaking(world, SITES), books=books)
    assert world.taken() == [(1, site) for site in SITES]


def test_a_run_that_is_taken_up_goes_on_without_a_site_and_lets_it_in_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "GREETING_DEADLINE_S", 0.0)
    wanted, books = everyone(tmp_path, rounds=3), Books(Ledger(tmp_path / "ledger.jsonl"), PLAN)
    killed_in_round_2(World(tmp_path / "a", wanted), books)

    class Late(Registered):
        def get_nodes(self) -> Iterable[NodeInfo]:
            nodes = list(super().get_nodes())
            return nodes if (2, "south") in again.taken() else nodes[:2]

    again = World(tmp_path / "a", wanted, resume=True)
    again.run(Late(again, SITES), books=books)
    assert again.taken() == [(2, "north"), (2, "south"), *((3, site) for site in SITES)]
    assert again.dropped() == {"west": "its agent has not come since the run was taken up"}


def test_a_run_that_is_taken_up_goes_on_without_a_site_that_refuses_and_says_why(tmp_path: Path) -> None:
    wanted, books = everyone(tmp_path, rounds=2), Books(Ledger(tmp_path / "ledger.jsonl"), PLAN)
    killed_in_round_2(World(tmp_path / "a", wanted), books)
    again = World(tmp_path / "a", wanted, resume=True)
    again.run(Registered(again, ["north", "west", "south"]), books=books)
    assert again.taken() == [(2, "north")]
    assert set(again.dropped()) == {"south", "west"}
    assert "another name than its key is registered under" in again.dropped()["west"]
