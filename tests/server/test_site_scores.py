"""Federated evaluation: one question after the last round, sums for an answer, and a reason where there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from little import Change, DirectGrid, World, failing, scoring
from test_books import PLAN, Registered

from fedmix import config
from fedmix.data.shard import Shard
from fedmix.deployment.ledger import Ledger, verify
from fedmix.federation import scoring as measures
from fedmix.federation.local import seed_of
from fedmix.objectives.masking import WordIds
from server import held_out as central
from server import site_scores
from server.books import Books
from server.roster import Roster
from server.store import Committed

MEASURES = {
    "north": {"score/psnr_db"},
    "south": {"score/bits_per_token"},
    "west": {"score/psnr_db", "score/bits_per_token", "score/r1_of_32"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Committed]:
    """A run over the three sites that has trained its only round, and asked."""
    folder = tmp_path_factory.mktemp("scoring")
    world = World(folder, scoring(folder))
    return world, world.run()


def asked(trained: tuple[World, Committed], folder: Path, grid: DirectGrid) -> dict[str, Any]:
    """What the sites behind a grid answer about the trained model."""
    world, committed = trained[0].afresh(folder), trained[1]
    site_scores.gather(grid, world.experiment, world.store, Roster(grid, world.experiment), committed, None)
    return kept(world)


def kept(world: World) -> dict[str, Any]:
    found = site_scores.kept(world.experiment, world.store.folder)
    assert found is not None
    return found


def scored(change: Callable[[RecordDict], object]) -> Change:
    """An answer to the question that was changed on its way."""

    def changed(reply: Message) -> Message:
        change(reply.content)
        return reply

    return changed


def test_each_site_scores_the_last_model_on_its_own_patients(trained: tuple[World, Committed]) -> None:
    world, committed = trained
    found = kept(world)
    assert {name: set(one["scores"]) for name, one in found.items()} == MEASURES
    model = central.set_parameters(central.random_model(world.experiment, world.tokenizer), committed.parameters)
    for site in world.experiment.data.sites:
        shard, seed = Shard.open(world.shards[site.name]), seed_of(world.experiment.seed, site.name, "scores")
        rows = measures.held_out(shard, site.stream, seed)
        assert {shard.split[row] for row in rows} == {"test"}
        here = measures.Held(shard, rows, WordIds.of(world.tokenizer), seed)
        expected = measures.score(model, here, tuple(found[site.name]["scores"]))
        assert {measure: tuple(pair) for measure, pair in found[site.name]["scores"].items()} == expected


def test_the_report_says_what_each_site_gave_and_got(trained: tuple[World, Committed]) -> None:
    world = trained[0]
    alone = {"north": {"score/psnr_db": (200.0, 20.0)}}
    found = site_scores.value_of(world.experiment, world.store.folder, alone)
    total, weight = kept(world)["north"]["scores"]["score/psnr_db"]
    assert found["north"]["scores"]["score/psnr_db"] == {"value": total / weight, "weight": weight, "alone": 10.0}
    assert found["south"]["scores"]["score/bits_per_token"]["alone"] is None
    shares = {site: one["shares"] for site, one in found.items()}
    assert [set(shares[site]) for site in ("north", "south")] == [{"shared", "image"}, {"shared", "text"}]
    for tower in ("shared", "image", "text", "pair"):
        assert sum(each.get(tower, 0.0) for each in shares.values()) == pytest.approx(1.0)
    assert shares["west"]["pair"] == 1.0
    assert site_scores.value_of(config.build(world.experiment.model_dump(mode="json") | {"evaluation": {}}), Path(), {}) == {}


def test_a_run_that_is_taken_up_asks_only_what_was_never_answered(trained: tuple[World, Committed]) -> None:
    world, kinds = trained[0], list[str]()

    class Counting(DirectGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            kinds.extend(message.metadata.message_type for message in messages)
            return super().push_messages(messages)

    file = world.store.folder / "evaluation" / "sites.json"
    before = json.loads(file.read_text())
    world.run(Counting(world.places, {}))
    assert kinds == []
    file.unlink()  # as if a kill had come before it was written
    world.run(Counting(world.places, {}))
    assert kinds == ["query"] * 3 + ["evaluate"] * 3
    assert json.loads(file.read_text()) == before


def test_a_site_that_declines_is_told_with_its_reason(trained: tuple[World, Committed], tmp_path: Path) -> None:
    found = asked(trained, tmp_path, trained[0].grid({"south": failing}))
    assert found["south"] == {"why": "on purpose"}
    assert set(found["west"]["scores"]) == MEASURES["west"]


def test_sites_that_left_after_the_last_round_cost_their_scores_and_not_the_run(
    trained: tuple[World, Committed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.roster.GREETING_DEADLINE_S", 0.0)
    found = asked(trained, tmp_path, DirectGrid(trained[0].places[:2], {}))
    assert all("2 of 3 nodes came" in one["why"] for one in found.values())


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["scores"].update({"score/psnr_db": [1e9, 30.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [-1.0, 30.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [float("nan"), 30.0]}),
        lambda content: content["scores"].update({"score/psnr_db": [1.0, 0.0]}),
        lambda content: content["scores"].update({"score/bits_per_token": [1.0, 2.0]}),
        lambda content: content["scores"].update({"patient": [1.0, 2.0]}),
        lambda content: content["receipt"].update({"nonce": "0" * 32}),
        lambda content: content["receipt"].update({"patients": 30}),
        lambda content: content.update({"more": content["scores"]}),
    ],
)
def test_an_answer_that_is_none_counts_as_no_answer(
    trained: tuple[World, Committed], tmp_path: Path, change: Callable[[RecordDict], object]
) -> None:
    found = asked(trained, tmp_path, trained[0].grid({"north": scored(change)}))
    assert set(found["north"]) == {"why"}
    assert set(found["west"]["scores"]) == MEASURES["west"]


def test_a_site_of_few_patients_answers_without_a_score(trained: tuple[World, Committed], tmp_path: Path) -> None:
    places = [replace(place, min_patients=40) for place in trained[0].places]
    found = asked(trained, tmp_path, DirectGrid(places, {}))
    assert found["north"] == {"scores": {}}
    assert found["west"]["scores"]


def test_only_sites_that_train_are_asked_and_none_unless_it_is_wanted(trained: tuple[World, Committed], tmp_path: Path) -> None:
    values = trained[0].experiment.model_dump(mode="json")
    values["stages"][0]["sites"] = ["west"]
    alone = World(tmp_path / "alone", values)
    alone.run()
    assert set(kept(alone)) == {"west"}
    assert not site_scores.is_due(alone.experiment, alone.store.folder)
    unasked = config.build(values | {"evaluation": {}})
    assert not site_scores.is_due(unasked, tmp_path)
    assert unasked.fingerprint() == alone.experiment.fingerprint()


def test_over_real_sites_the_question_and_its_answers_are_in_the_ledger(
    trained: tuple[World, Committed], tmp_path: Path
) -> None:
    world, committed = trained[0].afresh(tmp_path), trained[1]
    books = Books(Ledger(tmp_path / "ledger.jsonl"), PLAN)
    grid = Registered(world, ["north", "south", "west"], south=failing)
    who = Roster(grid, world.experiment, books=books)
    site_scores.gather(grid, world.experiment, world.store, who, committed, books)
    entries = [entry for entry in books.ledger.entries() if entry["kind"] == "evaluate"]
    assert verify(tmp_path / "ledger.jsonl").entries == 6 + len(entries) == 12
    assert [(entry["event"], entry["peer"]) for entry in entries if entry["direction"] == "out"] == [
        ("sent", site) for site in ("north", "south", "west")
    ]
    assert {entry["peer"]: entry["why"] for entry in entries if entry["direction"] == "in"} == {
        "north": None,
        "south": "on purpose",
        "west": None,
    }
    asked = next(message for site, message in grid.sent if message.metadata.message_type == "evaluate" and site == "north")
    assert asked.content.config_records["order"]["ledger"] == entries[0]["hash"]
