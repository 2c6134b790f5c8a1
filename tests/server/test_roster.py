"""Which sites a round asks, and what they are taken to hold."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from little import DirectGrid, World, everyone, values

from fedmix import config
from server.roster import Roster


def experiment(participation: float, *, seed: int = 3) -> config.Experiment:
    """Five image sites, two text sites and a paired one."""
    streams = ["image"] * 5 + ["text"] * 2 + ["paired"]
    wanted: dict[str, Any] = values(Path("/nowhere"), seed=seed, federation={"participation": participation})
    wanted["data"]["sites"] = [
        {"name": f"{stream}-{number}", "stream": stream, "shard": f"/shards/{number}"} for number, stream in enumerate(streams)
    ]
    wanted["stages"] = [{"name": "all", "rounds": 40}]
    return config.build(wanted)


def chosen(wanted: config.Experiment, round_number: int, excluded: tuple[str, ...] = ()) -> list[str]:
    roster = Roster(DirectGrid([], {}), wanted)
    return [site.name for site in roster.chosen(wanted.stages[0], round_number, excluded)]


@pytest.mark.parametrize(("share", "counts"), [(1.0, (5, 2, 1)), (0.5, (3, 1, 1)), (0.01, (1, 1, 1))])
def test_every_stream_gives_its_share_of_sites_and_at_least_one(share: float, counts: tuple[int, ...]) -> None:
    found = Counter(name.split("-")[0] for name in chosen(experiment(share), 1))
    assert (found["image"], found["text"], found["paired"]) == counts


def test_the_draw_follows_from_seed_and_round_and_reaches_everybody() -> None:
    wanted = experiment(0.4)
    rounds = [chosen(wanted, number) for number in range(1, 41)]
    assert rounds == [chosen(wanted, number) for number in range(1, 41)]
    assert rounds != [chosen(experiment(0.4, seed=4), number) for number in range(1, 41)]
    counts = Counter(name for names in rounds for name in names)
    assert set(counts) == {site.name for site in wanted.data.sites}
    assert all(8 <= counts[f"image-{number}"] <= 24 for number in range(5))  # 16 expected


def test_excluded_sites_are_not_asked_and_their_stream_may_run_dry() -> None:
    assert "text-5" not in chosen(experiment(1.0), 1, ("text-5",))
    assert not [name for name in chosen(experiment(0.5), 1, ("text-5", "text-6")) if name.startswith("text")]


def test_a_node_that_is_no_site_of_the_experiment_is_never_sent_an_order(tmp_path: Path) -> None:
    whole = World(tmp_path / "whole", everyone(tmp_path))
    only_two = everyone(tmp_path)
    only_two["data"]["sites"] = only_two["data"]["sites"][:2]
    run = World(tmp_path / "two", only_two)
    asked: list[int] = []

    class Noting(DirectGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            asked.extend(message.metadata.dst_node_id for message in messages if message.metadata.message_type == "train")
            return super().push_messages(messages)

    stranger = whole.places[2]  # its own experiment file names it, the server's does not
    run.run(Noting([*run.places, stranger], {}))
    assert sorted(asked) == [2, 3]
    assert run.taken() == [(1, "north"), (1, "south")]


def test_what_a_site_lacks_is_what_changed_since_it_last_answered() -> None:
    roster = Roster(DirectGrid([], {}), experiment(1.0))
    first = {"block0.attention": "a", "text.head": "b"}
    assert roster.lacks("west", first) == {"block0.attention", "text.head"}
    roster.holds("west", first)
    assert roster.lacks("west", first) == frozenset()
    assert roster.lacks("west", first | {"text.head": "c"}) == {"text.head"}
    assert roster.lacks("east", first) == set(first)
    roster.forget("west")
    assert roster.lacks("west", first) == set(first)
