"""Rounds under differential privacy through the sites' real apps: what is spent, what is told, and when it stops."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import little
import pytest
from flwr.app import Message

from client.private import LEDGER
from fedmix.data.shard import Shard
from fedmix.errors import RunError
from fedmix.privacy.accountant import Ledger, Steps, account_of
from server import held_out as central
from server.accounts import privacy_of


def guarded(folder: Path, *, rounds: int = 2, streams: tuple[str, ...] = ("image", "paired"), **privacy: Any) -> dict[str, Any]:
    """Masked modelling of two sites in one stage, as losses that compare patients are none here."""
    stage = {"name": "all", "rounds": rounds, "streams": list(streams), "local_steps": 2, "batch_size": 4}
    return little.values(folder, stages=[stage], privacy={"mode": "dp"} | privacy)


def ledger_of(world: little.World, site: str) -> Ledger:
    return Ledger(world.store.folder / "sites" / site / LEDGER)


def test_a_run_spends_round_by_round_and_reports_it(tmp_path: Path) -> None:
    world = little.World(tmp_path, guarded(tmp_path, noise_multiplier=1.0, clip=0.5))
    committed = world.run()
    assert committed.round_number == 2
    block = privacy_of(world.experiment, committed.totals)
    assert [site["name"] for site in block["sites"]] == ["north", "west"]
    for site in block["sites"]:
        entries = ledger_of(world, site["name"]).entries()
        assert [(entry.round, entry.steps) for entry in entries] == [(1, 2), (2, 2)]
        account = account_of([Steps(1.0, site["sample_rate"], 4)], 1e-5)
        assert (site["epsilon"], site["epsilon_rdp"], site["steps"]) == (account.epsilon, account.epsilon_rdp, 4)
        assert ledger_of(world, site["name"]).account(1e-5) == account
    assert block["epsilon"] == max(site["epsilon"] for site in block["sites"])
    assert (block["unit"], block["relation"]) == ("patient", "add or remove one patient")
    assert json.loads(json.dumps(block, allow_nan=False)) == block


def test_what_leaves_the_site_holds_no_losses_and_only_expected_counts(tmp_path: Path) -> None:
    seen: list[Mapping[str, Any]] = []

    def look(reply: Message) -> Message:
        if not reply.has_error():
            seen.append({"examples": dict(reply.content["examples"]), "metrics": dict(reply.content["metrics"])})
        return reply

    world = little.World(tmp_path, guarded(tmp_path, rounds=1, noise_multiplier=1.0))
    world.run(world.grid(dict.fromkeys(little.SITES, look)))
    assert sorted(seen, key=str) == [
        {"examples": {"image": 0, "text": 0, "paired": 8}, "metrics": {}},
        {"examples": {"image": 8, "text": 0, "paired": 0}, "metrics": {}},
    ]


def test_noise_cannot_be_told_from_the_experiment_seed(tmp_path: Path) -> None:
    """The server knows the seed: were the noise drawn from it, it would subtract it."""
    ends = []
    for name in ("one", "other"):
        world = little.World(tmp_path / name, guarded(tmp_path, rounds=1, noise_multiplier=1.0))
        ends.append(world.run().parameters)
    weight = "patch_decoder.values.weight"
    assert not bool((ends[0][weight] == ends[1][weight]).all())


def test_a_run_stops_at_the_budget_with_a_message_at_both_ends(tmp_path: Path) -> None:
    plain = little.World(tmp_path / "plain", guarded(tmp_path, noise_multiplier=1.0))
    rates = [4 / len(set(Shard.open(plain.shards[site]).patient)) for site in ("north", "west")]
    budget = max(account_of([Steps(1.0, rate, 2)], 1e-5).epsilon for rate in rates) * 1.01
    world = little.World(tmp_path, guarded(tmp_path, rounds=3, noise_multiplier=1.0, epsilon=budget))
    with pytest.raises(RunError, match="the privacy budget of this site's patients would be passed"):
        world.run()
    assert world.store.latest().round_number == 1  # type: ignore[union-attr]
    assert set(world.dropped()) == {"north", "west"}
    assert all(len(ledger_of(world, site).entries()) == 1 for site in ("north", "west"))
    block = privacy_of(world.experiment, world.store.latest().totals)  # type: ignore[union-attr]
    assert 0 < block["epsilon"] <= budget


def test_planned_rounds_fit_into_the_budget_and_another_run_finds_it_spent(tmp_path: Path) -> None:
    first = little.World(tmp_path / "first", guarded(tmp_path, streams=("paired",), epsilon=6.0))
    block = privacy_of(first.experiment, first.run().totals)
    assert 5.7 < block["epsilon"] <= 6.0
    second = first.afresh(tmp_path / "second")  # its sites' state folders are those of the first
    with pytest.raises(RunError, match="would be passed"):
        second.run()
    assert second.store.latest() is None


def test_a_delta_that_gives_patients_away_is_refused(tmp_path: Path) -> None:
    world = little.World(tmp_path, guarded(tmp_path, rounds=1, streams=("paired",), noise_multiplier=1.0, delta=0.5))
    with pytest.raises(RunError, match="given away whole"):
        world.run()


def test_a_site_that_says_nothing_of_its_privacy_is_refused(tmp_path: Path) -> None:
    def silent(reply: Message) -> Message:
        reply.content["privacy"].clear()
        return reply

    world = little.World(tmp_path, guarded(tmp_path, rounds=1, noise_multiplier=1.0))
    world.run(world.grid({"north": silent}))
    assert "does not fit privacy.mode" in world.dropped()["north"]


def test_adapters_move_the_trunks_matrices_alone_and_pass_the_servers_screening(tmp_path: Path) -> None:
    world = little.World(tmp_path, guarded(tmp_path, noise_multiplier=1.0, trainable="adapters", adapter_rank=2))
    begun = central.parameters_of(central.initial_model(world.experiment, world.tokenizer))
    ended = world.run().parameters
    assert not world.dropped()
    moved = {name for name, value in ended.items() if not bool((value == begun[name]).all())}
    assert moved == {name for name, value in begun.items() if name.startswith("blocks.") and value.ndim == 2}
