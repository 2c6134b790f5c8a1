"""A federated round carries the experts of joint sequences to and from sites with pairs, and to no other."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Message
from little import World, everyone

from fedmix.federation.update import group_of


def test_only_the_paired_site_is_sent_them_and_sends_them_and_the_server_moves_them(tmp_path: Path) -> None:
    wanted = everyone(tmp_path)
    wanted["model"] |= {"depth": 2, "pair_experts": 1}
    wanted["stages"][0]["objectives"] |= {"match": 0.5, "joint_share": 1.0}
    world = World(tmp_path, wanted)
    sent: dict[str, set[str]] = {}

    def watched(site: str) -> None:
        def note(reply: Message) -> Message:
            sent[site] = {group_of(name) for name in reply.content.array_records["deltas"]}
            return reply

        changes[site] = note

    changes: dict[str, object] = {}
    for site in ("north", "south", "west"):
        watched(site)
    committed = world.run(world.grid(changes))
    assert world.dropped() == {}
    assert {site for site, groups in sent.items() if "block1.pair" in groups} == {"west"}
    assert not any("block0.pair" in groups for groups in sent.values())
    before = world.initial()
    names = [name for name in before if group_of(name) == "block1.pair"]
    assert len(names) == 6
    assert all(not torch.equal(committed.parameters[name], before[name]) for name in names)
    downs = {row["site"]: row["values"]["comm/bytes_down"] for row in world.seen if row["event"] == "site"}
    assert downs["west"] > max(downs["north"], downs["south"])
