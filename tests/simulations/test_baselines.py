"""Baselines that are no federation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from little import World, everyone, values

from fedmix.batch import Batch
from fedmix.data.loading import Sampler
from fedmix.data.shard import Shard
from fedmix.errors import DataError
from fedmix.federation.update import digest
from simulations import baselines


def same(one: Batch, other: Batch) -> bool:
    pairs = ((one.image, other.image), (one.text, other.text))
    return all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)


def test_pooled_batches_are_the_sites_own_in_turn(tmp_path: Path) -> None:
    shards = World(tmp_path).shards
    samplers = [
        Sampler(shard, shard.select("train"), batch_size=4, seed=number)
        for number, shard in enumerate(Shard.open(path) for path in shards.values())
    ]
    pooled = baselines.Interleaved(samplers)
    for step in range(9):
        turn, site = divmod(step, 3)
        assert same(pooled.batch(step), samplers[site].batch(turn))
    assert pooled.batch(0).counts()["image"] == 4
    assert pooled.batch(1).counts()["text"] == 4
    assert pooled.batch(2).counts()["paired"] == 4


def test_centralised_training_is_deterministic_and_moves_every_tower(tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    before = world.initial()
    first = baselines.centralised(world.experiment, world.shards, world.tokenizer)
    second = baselines.centralised(world.experiment, world.shards, world.tokenizer)
    assert digest(first) == digest(second) != digest(before)
    still = [name for name in before if torch.equal(first[name], before[name])]
    # Matching is off, and what starts at zero may have a gradient of zero at first.
    assert all(name.startswith("match_head") or float(before[name].abs().sum()) == 0 for name in still), still


def test_centralised_training_of_one_site_is_that_site_s_own_training(tmp_path: Path) -> None:
    """One site, one round: the federation and the pool do the same steps, save for the name in the masks' seed."""
    wanted = everyone(tmp_path)
    wanted["data"]["sites"] = [wanted["data"]["sites"][2] | {"name": "pooled"}]
    world = World(tmp_path, wanted)
    pooled = baselines.centralised(world.experiment, world.shards, world.tokenizer)
    federated = world.run().parameters
    assert {name: value.shape for name, value in pooled.items()} == {name: value.shape for name, value in federated.items()}
    for name, value in pooled.items():
        assert torch.allclose(value, federated[name], atol=1e-6), name


def test_a_site_without_studies_of_its_stream_is_said(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path))
    shards = world.shards | {"west": world.shards["north"]}
    with pytest.raises(DataError, match="site west has no paired study in its training split"):
        baselines.centralised(world.experiment, shards, world.tokenizer)
