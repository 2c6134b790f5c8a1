"""Whole updates that are noised before they leave, through the sites' real apps: what is spent, told, and still told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import little
import pytest
import torch
from flwr.app import Message

from client.noisy_updates import LEDGER, SpentUpdate
from fedmix import config
from fedmix.errors import RunError
from fedmix.federation.update import Update
from fedmix.privacy.accountant import Account, Ledger, Steps, account_of
from server.accounts import privacy_of


def guarded(folder: Path, *, rounds: int = 2, **privacy: Any) -> dict[str, Any]:
    """Rounds of pairs with contrast, which noise on whole updates allows."""
    stage = {"name": "all", "rounds": rounds, "streams": ["image", "paired"], "local_steps": 2, "batch_size": 4}
    stage |= {"objectives": {"contrast": 1.0}}
    return little.values(folder, stages=[stage], privacy={"mode": "noisy_updates", "delta": 1e-5} | privacy)


def ledger_of(world: little.World, site: str) -> Ledger:
    return Ledger(world.store.folder / "sites" / site / LEDGER)


def test_a_run_spends_round_by_round_and_reports_the_site_as_its_unit(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []

    def look(reply: Message) -> Message:
        seen.append(dict(reply.content["metrics"]))
        return reply

    world = little.World(tmp_path, guarded(tmp_path, noise_multiplier=4.0, clip=0.1))
    committed = world.run(world.grid(dict.fromkeys(little.SITES, look)))
    assert committed.round_number == 2
    assert not world.dropped()  # the server expects updates as long as the noise makes them
    expected = account_of([Steps(4.0, 1.0, 2)], 1e-5)
    for site in ("north", "west"):
        assert [(entry.round, entry.steps) for entry in ledger_of(world, site).entries()] == [(1, 1), (2, 1)]
        assert ledger_of(world, site).account(1e-5) == expected
    block = privacy_of(world.experiment, committed.totals)
    assert (block["mode"], block["unit"], block["accountant"]) == ("noisy_updates", "site", "prv")
    assert block["relation"] == "replace all that the site holds by anything else"
    assert (block["epsilon"], block["steps"]) == (expected.epsilon, 2)
    assert {key: value for metrics in seen for key, value in metrics.items()} == {}  # losses are exact facts


def test_planned_rounds_fit_into_the_budget_and_another_run_finds_it_spent(tmp_path: Path) -> None:
    first = little.World(tmp_path / "first", guarded(tmp_path, epsilon=3.0))
    block = privacy_of(first.experiment, first.run().totals)
    assert 2.9 < block["epsilon"] <= 3.0
    second = first.afresh(tmp_path / "second")  # its sites' state folders are those of the first
    with pytest.raises(RunError, match="the privacy budget of this site would be passed"):
        second.run()
    assert second.store.latest() is None


def test_a_round_that_never_left_is_spent_all_the_same_and_a_committed_one_once(tmp_path: Path) -> None:
    """A lost reply's noise was drawn, so asking again spends again; what is committed is not asked again on resume."""
    lost = iter([True])

    def lose_one(reply: Message) -> Message:
        if next(lost, False):
            reply.content["receipt"]["nonce"] = "another"
        return reply

    world = little.World(tmp_path, guarded(tmp_path, noise_multiplier=4.0) | {"federation": {"min_sites": 2}})
    world.run(world.grid({"north": lose_one}))
    assert [entry.round for entry in ledger_of(world, "north").entries()] == [1, 1, 2]
    world.run()  # nothing is left to do
    assert len(ledger_of(world, "north").entries()) == 3


def test_an_update_is_covered_by_noise_that_no_seed_repeats() -> None:
    spent = SpentUpdate(Account(1.0, 1.0, 1e-5, 1), 1.0, 1.0, config.Privacy(mode="noisy_updates", noise_multiplier=1.0))
    update = Update("x", {"word_head.logits.bias": torch.zeros(50)}, {"text": 4}, 2, {"mlm/loss": (3.0, 4.0)})
    one, other = spent.cover(update), spent.cover(update)
    assert not torch.equal(one.deltas["word_head.logits.bias"], other.deltas["word_head.logits.bias"])
    assert (one.metrics, one.examples, one.steps) == ({}, update.examples, update.steps)
