"""Noise on the mean at a server that sites trust: how far one site can move it, how much is added, and what it spends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import little
import pytest
import torch

from fedmix import config
from fedmix.errors import ConfigError, RunError
from fedmix.federation.update import Update
from fedmix.privacy.accountant import Ledger, Steps, account_of
from server.accounts import privacy_of
from server.central_noise import LEDGER, aggregate_noised

NAMES = {"word_head.logits.weight": (60, 20), "projection.image.weight": (30, 30)}


def experiment(folder: Path, *, rounds: int = 2, **privacy: Any) -> dict[str, Any]:
    wanted = {"mode": "central_noise", "delta": 1e-5} | privacy
    return little.everyone(folder, rounds=rounds, privacy=wanted, aggregation={"clip": None})


def updates(lengths: dict[str, float]) -> list[Update]:
    """One update of pairs a site, every group of it of a given length."""
    found = []
    for number, (site, length) in enumerate(lengths.items()):
        chance = torch.Generator().manual_seed(number)
        deltas = {name: torch.randn(shape, generator=chance) for name, shape in NAMES.items()}
        found.append(Update(site, {name: one * length / one.norm() for name, one in deltas.items()}, {"paired": 8}, 1))
    return found


def mean(lengths: dict[str, float], wanted: config.Experiment, seed: int = 1) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return dict(aggregate_noised(updates(lengths), {name: torch.Size(one) for name, one in NAMES.items()}, wanted, chance))


def test_updates_are_cut_before_they_are_weighed(tmp_path: Path) -> None:
    wanted = config.build(experiment(tmp_path, noise_multiplier=1e-9, clip=2.0))
    found = mean({"a": 1.0, "b": 1e6}, wanted)
    whole = updates({"a": 1.0, "b": 2.0})  # a is short enough, b is as long as may be
    for name, change in found.items():
        torch.testing.assert_close(change, (whole[0].deltas[name] + whole[1].deltas[name]) / 2, rtol=1e-4, atol=1e-6)


def test_noise_covers_what_one_site_can_move(tmp_path: Path) -> None:
    """Two groups, each site half of either: one site replaced moves a group's mean by 2 C / 2."""
    wanted = config.build(experiment(tmp_path, noise_multiplier=3.0, clip=2.0))
    quiet = config.build(experiment(tmp_path, noise_multiplier=1e-9, clip=2.0))
    noisy, plain = mean({"a": 1.0, "b": 1.0}, wanted), mean({"a": 1.0, "b": 1.0}, quiet)
    for name, change in noisy.items():
        expected = 3.0 * 2 * 2.0 * 0.5 * math.sqrt(2)
        noise = change - plain[name]
        assert float(noise.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * noise.numel()))
    farthest = 0.0
    for name in NAMES:
        one, other = updates({"a": 2.0})[0].deltas[name], -updates({"a": 2.0})[0].deltas[name]
        std = 3.0 * 2 * 2.0 * 0.5 * math.sqrt(2)
        farthest += float(((one - other) / 2).norm() / std) ** 2
    assert math.sqrt(farthest) == pytest.approx(1 / 3.0)  # the worst replacement is one Gaussian of noise multiplier 3


def test_a_run_keeps_its_own_ledger_and_a_finished_one_spends_no_more(tmp_path: Path) -> None:
    world = little.World(tmp_path, experiment(tmp_path, noise_multiplier=4.0))
    committed = world.run()
    ledger = Ledger(world.store.folder / LEDGER)
    assert [entry.round for entry in ledger.entries()] == [1, 2]
    expected = account_of([Steps(4.0, 1.0, 2)], 1e-5)
    block = privacy_of(world.experiment, committed.totals)
    assert (block["mode"], block["unit"], block["sites"]) == ("central_noise", "site", [])
    assert (block["epsilon"], block["steps"]) == (expected.epsilon, 2.0)
    world.run()
    assert len(ledger.entries()) == 2


def test_a_stop_between_ledger_and_checkpoint_counts_the_round_again_and_never_too_little(tmp_path: Path) -> None:
    world = little.World(tmp_path, experiment(tmp_path, noise_multiplier=4.0))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.run(before_commit=stop)
    assert world.store.latest() is None
    committed = world.run()
    assert [entry.round for entry in Ledger(world.store.folder / LEDGER).entries()] == [1, 1, 2]
    assert committed.totals["privacy/epsilon"] == account_of([Steps(4.0, 1.0, 3)], 1e-5).epsilon


def test_a_run_stops_where_the_next_round_would_pass_the_budget(tmp_path: Path) -> None:
    budget = account_of([Steps(2.0, 1.0, 1)], 1e-5).epsilon * 1.01
    world = little.World(tmp_path, experiment(tmp_path, rounds=3, noise_multiplier=2.0, epsilon=budget))
    with pytest.raises(RunError, match="the privacy budget of this run's sites would be passed"):
        world.run()
    assert world.store.latest().round_number == 1  # type: ignore[union-attr]
    assert len(Ledger(world.store.folder / LEDGER).entries()) == 1


@pytest.mark.parametrize("aggregation", [{}, {"clip": None, "combine": "median"}])
def test_rules_under_which_one_site_sways_how_others_count_are_refused(aggregation: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="knows how far one site can move a mean"):
        config.build(experiment(tmp_path, noise_multiplier=1.0) | {"aggregation": aggregation})
