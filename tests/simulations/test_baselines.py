"""Baselines by name: what each trains on, for how many steps, and that pooled training is the federation's where it must be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from little import Silent, World, everyone, scoring, values

from fedmix import config
from fedmix.batch import Batch
from fedmix.data.loading import Sampler
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError, DataError
from fedmix.federation.update import digest
from server.store import Parameters
from simulations import baselines
from simulations.run import simulate


def same(one: Batch, other: Batch) -> bool:
    pairs = ((one.image, other.image), (one.text, other.text))
    return all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)


def samplers_of(world: World) -> list[Sampler]:
    opened = [Shard.open(path) for path in world.shards.values()]
    return [Sampler(shard, shard.select("train"), batch_size=4, seed=number) for number, shard in enumerate(opened)]


def with_two_pairs(folder: Path, **changes: Any) -> dict[str, Any]:
    """The little experiment with a second paired site, named coast."""
    wanted = values(folder, **changes)
    west = wanted["data"]["sites"][2]
    wanted["data"]["sites"].append(west | {"name": "coast", "phantom": west["phantom"] | {"seed": 4}})
    return wanted


def federated(wanted: dict[str, Any], name: str, overrides: dict[str, Any] | None = None) -> dict[str, config.Experiment]:
    return baselines.federated(config.build(wanted | {"baselines": {name: overrides or {}}}), name)


# ---- all data in one place


def test_pooled_batches_are_the_sites_own_in_turn(tmp_path: Path) -> None:
    samplers = samplers_of(World(tmp_path))
    pooled = baselines.Interleaved(samplers)
    for step in range(9):
        turn, site = divmod(step, 3)
        assert same(pooled.batch(step), samplers[site].batch(turn))
    assert pooled.batch(0).counts()["image"] == 4
    assert pooled.batch(1).counts()["text"] == 4
    assert pooled.batch(2).counts()["paired"] == 4


def test_a_union_batch_holds_every_site_s_batch_of_that_step_unchanged(tmp_path: Path) -> None:
    images, texts, pairs = samplers_of(World(tmp_path))
    batch = baselines.Union((images, texts, pairs)).batch(5)
    assert batch.counts() == {"image": 4, "text": 4, "paired": 4}
    assert batch.image is not None
    assert batch.text is not None
    for rows, own in ((batch.image[:4], images.batch(5).image), (batch.image[4:], pairs.batch(5).image)):
        assert own is not None
        assert torch.equal(rows, own)
    for rows, own in ((batch.text[:4], texts.batch(5).text), (batch.text[4:], pairs.batch(5).text)):
        assert own is not None
        assert torch.equal(rows[:, : own.shape[1]], own)
        assert not rows[:, own.shape[1] :].any(), "what a longer report of another site adds is padding"
    own = [source.batch(5).patient for source in (images, texts, pairs)]
    assert torch.equal(batch.patient, torch.cat(own))
    # The masks of the objectives find the pairs: image rows 4..7 belong to text rows 4..7.
    for has_it in (batch.has_image, batch.has_text):
        assert batch.is_paired[has_it].nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("name", "steps"), [("centralised", 1 * 2 * 2 + 2 * 2 * 1), ("centralised_steps", 1 * 2 + 2 * 2)])
def test_pooled_training_sees_exactly_the_federation_s_examples(name: str, steps: int, tmp_path: Path) -> None:
    """Rounds x steps x sites, or rounds x steps: the little experiment has one unpaired round and two paired ones."""
    world = World(tmp_path)
    pooled = baselines.SPECIAL[name](world.experiment, world.shards, world.tokenizer)
    totals = world.run().totals
    streams = zip(("image", "text", "paired"), world.shards, strict=True)
    seen = {stream: int(totals[f"examples/{site}"]) for stream, site in streams}
    assert pooled.examples == seen == {"image": 8, "text": 8, "paired": 16}
    assert pooled.steps == steps
    assert pooled.core_s > 0


@pytest.mark.parametrize("name", sorted(baselines.SPECIAL))
def test_pooled_training_is_deterministic_and_moves_every_tower(name: str, tmp_path: Path) -> None:
    world = World(tmp_path, everyone(tmp_path))
    before = world.initial()
    first = baselines.SPECIAL[name](world.experiment, world.shards, world.tokenizer).parameters
    second = baselines.SPECIAL[name](world.experiment, world.shards, world.tokenizer).parameters
    assert digest(first) == digest(second) != digest(before)
    still = [name for name in before if torch.equal(first[name], before[name])]
    # Matching is off, and what starts at zero may have a gradient of zero at first.
    assert all(name.startswith("match_head") or float(before[name].abs().sum()) == 0 for name in still), still


@pytest.mark.parametrize("name", sorted(baselines.SPECIAL))
def test_pooled_training_of_one_site_is_that_site_s_own_training(name: str, tmp_path: Path) -> None:
    """One site, one round: the federation and the pool do the same steps, save for the name in the masks' seed."""
    wanted = everyone(tmp_path)
    wanted["data"]["sites"] = [wanted["data"]["sites"][2] | {"name": "pooled"}]
    world = World(tmp_path, wanted)
    pooled = baselines.SPECIAL[name](world.experiment, world.shards, world.tokenizer).parameters
    federated = world.run().parameters
    assert {name: value.shape for name, value in pooled.items()} == {name: value.shape for name, value in federated.items()}
    for name, value in pooled.items():
        assert torch.allclose(value, federated[name], atol=1e-6), name


def test_a_site_without_studies_of_its_stream_is_said(tmp_path: Path) -> None:
    world = World(tmp_path, values(tmp_path))
    shards = world.shards | {"west": world.shards["north"]}
    with pytest.raises(DataError, match="site west has no paired study in its training split"):
        baselines.centralised(world.experiment, shards, world.tokenizer)


# ---- other schedules and rules


def test_one_shot_is_one_round_a_stage_with_all_the_steps(tmp_path: Path) -> None:
    [(name, shot)] = federated(values(tmp_path), "one_shot").items()
    assert name == "one_shot"
    assert [(stage.name, stage.rounds, stage.local_steps) for stage in shot.stages] == [("unpaired", 1, 2), ("paired", 1, 4)]


def test_one_shot_of_one_site_is_the_same_training(tmp_path: Path) -> None:
    """Where one site trains, a round's end changes nothing: the moments stay, and the average is its own model."""
    wanted = everyone(tmp_path, rounds=3)
    wanted["data"]["sites"] = wanted["data"]["sites"][2:]
    world = World(tmp_path, wanted)
    shot = World(tmp_path / "shot", baselines.one_shot(world.experiment).model_dump(mode="json"))
    wanted["stages"][0]["optimiser"] = {"keep_state": False}
    forgetful = World(tmp_path / "forgetful", wanted)
    at_once, in_rounds, without = shot.run(), world.run(), forgetful.run()
    assert (at_once.round_number, in_rounds.round_number) == (1, 3)

    def squared(one: Parameters, other: Parameters) -> float:
        names = [name for name in one if not name.endswith("qkv.bias")]  # a key's has a gradient of rounding alone, blown up
        return sum(float((one[name] - other[name]).square().sum()) for name in names)

    moved = squared(at_once.parameters, world.initial())
    assert squared(at_once.parameters, in_rounds.parameters) < 1e-5 * moved  # bfloat16 rounding of Muon's steps
    assert squared(at_once.parameters, without.parameters) > 1e-3 * moved


@pytest.mark.parametrize("name", baselines.LOCAL_ONLY)
def test_local_only_trains_each_paired_site_in_its_own_stages(name: str, tmp_path: Path) -> None:
    found = federated(with_two_pairs(tmp_path), name)
    assert list(found) == ["site_west", "site_coast"]
    for site, alone in found.items():
        assert [stage.name for stage in alone.stages] == ["paired"], "the unpaired stage is others' work"
        assert alone.stages[0].sites == (site.removeprefix("site_"),)
        assert (alone.stages[0].rounds, alone.stages[0].local_steps) == (2, 2)
        assert [one.name for one in config.sites_of(alone.stages[0], alone.data.sites)] == [site.removeprefix("site_")]


def test_local_only_takes_every_site_where_none_has_pairs(tmp_path: Path) -> None:
    wanted = values(tmp_path, stages=[{"name": "unpaired", "rounds": 1, "streams": ["image", "text"], "local_steps": 2}])
    wanted["data"]["sites"] = wanted["data"]["sites"][:2]
    assert list(federated(wanted, "local_only")) == ["site_north", "site_south"]


def test_paired_only_drops_the_stages_of_others(tmp_path: Path) -> None:
    [only] = federated(values(tmp_path), "paired_only").values()
    assert only.aggregation.rule == "paired_only"
    assert [(stage.name, stage.streams) for stage in only.stages] == [("paired", ("paired",))]
    without = values(tmp_path, stages=[{"name": "unpaired", "rounds": 1, "streams": ["image", "text"]}])
    with pytest.raises(ConfigError, match="no stage has a paired site"):
        federated(without, "paired_only")


def test_a_rule_s_name_sets_the_rule_unless_the_config_says_another(tmp_path: Path) -> None:
    for rule in ("fedavg_all", "modality_exact", "fedcola"):
        [one] = federated(values(tmp_path), rule).values()
        assert one.aggregation.rule == rule
        assert one.stages == config.build(values(tmp_path)).stages
    [kept] = federated(values(tmp_path), "fedavg_all", {"aggregation": {"rule": "modality_exact"}}).values()
    assert kept.aggregation.rule == "modality_exact"
    [other] = federated(values(tmp_path), "fedavg_all", {"aggregation": {"count_exponent": 0.5}}).values()
    assert (other.aggregation.rule, other.aggregation.count_exponent) == ("fedavg_all", 0.5)


def test_overrides_are_merged_before_the_name_is_looked_at(tmp_path: Path) -> None:
    [shot] = federated(
        values(tmp_path), "one_shot", {"seed": 5, "stages": [{"name": "all", "rounds": 3, "local_steps": 7}]}
    ).values()
    assert (shot.seed, shot.stages[0].rounds, shot.stages[0].local_steps) == (5, 1, 21)
    [plain] = federated(values(tmp_path), "short", {"seed": 5}).values()
    assert plain.stages == config.build(values(tmp_path)).stages


def test_the_best_site_is_the_one_with_the_best_number_that_all_have() -> None:
    def found(zero_shot: float | None, probe: float) -> dict[str, Any]:
        return {"classification": {"zero_shot": {"macro_auroc": zero_shot}, "linear_probe": {"macro_auroc": probe}}}

    assert baselines.best({"a": found(0.6, 0.9), "b": found(0.7, 0.8)}) == "b"
    assert baselines.best({"a": found(0.6, 0.9), "b": found(None, 0.8)}) == "a", "then the probe decides"
    assert baselines.best({"a": {}, "b": {}}) == "a"


def test_a_union_keeps_findings_where_all_batches_tell_them() -> None:
    told = [replace(tiny.batch(kinds), findings=torch.full((len(kinds), 3), said)) for kinds, said in (("ip", 1.0), ("t", 0.0))]
    together = baselines.union(told)
    assert together.findings is not None
    assert together.findings[:, 0].tolist() == [1.0, 1.0, 0.0]
    assert baselines.union([told[0], tiny.batch("t")]).findings is None


# ---- what a site gave, and what it got


def test_leave_one_out_is_the_same_stages_without_a_site_and_without_what_only_it_trains(tmp_path: Path) -> None:
    found = federated(values(tmp_path), "leave_one_out")
    assert list(found) == ["without_north", "without_south", "without_west"]
    stages = {name: {stage.name: stage.sites for stage in one.stages} for name, one in found.items()}
    assert stages["without_north"] == {"unpaired": ("south",), "paired": ("west",)}
    assert stages["without_west"] == {"unpaired": ("north", "south")}
    assert found["without_north"].data == config.build(values(tmp_path)).data


def test_leaving_out_the_only_site_is_refused(tmp_path: Path) -> None:
    wanted = values(tmp_path)
    wanted["data"]["sites"], wanted["stages"] = wanted["data"]["sites"][2:], wanted["stages"][1:]
    with pytest.raises(ConfigError, match="without west no site is left"):
        federated(wanted, "leave_one_out")


def test_every_site_trains_alone_where_sites_score_models_and_the_best_is_still_one_with_pairs(tmp_path: Path) -> None:
    assert list(federated(values(tmp_path), "local_only")) == ["site_west"]
    wanted = scoring(tmp_path)
    assert list(federated(wanted, "local_only")) == ["site_north", "site_south", "site_west"]
    assert [site.name for site in baselines.lonely(config.build(wanted))] == ["west"]


def test_a_quorum_is_what_the_sites_of_a_baseline_can_meet(tmp_path: Path) -> None:
    wanted = with_two_pairs(tmp_path, federation={"min_sites": 4, "min_sites_of_stream": {"paired": 2, "image": 1}})
    alone = federated(wanted, "local_only")["site_west"].federation
    assert (alone.min_sites, alone.min_sites_of_stream.paired, alone.min_sites_of_stream.image) == (1, 1, 0)
    without = federated(wanted, "leave_one_out")["without_west"]
    fewest = min(len(config.sites_of(stage, without.data.sites)) for stage in without.stages)
    assert without.federation.min_sites == min(4, fewest)
    assert (without.federation.min_sites_of_stream.paired, without.federation.min_sites_of_stream.image) == (1, 1)


def test_a_site_alone_has_nobody_to_sum_with(tmp_path: Path) -> None:
    wanted = with_two_pairs(tmp_path, secure_sum={"threshold": 2, "clip": 0.5}, aggregation={"clip": None})
    assert config.build(wanted).secure_sum is not None
    assert federated(wanted, "local_only")["site_west"].secure_sum is None


def test_a_baseline_that_cannot_be_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    wanted = values(tmp_path, baselines={"leave_one_out": {}})
    wanted["data"]["sites"], wanted["stages"] = wanted["data"]["sites"][2:], wanted["stages"][1:]
    with pytest.raises(ConfigError, match="take this baseline out"):
        simulate(config.build(wanted), tmp_path / "run", engine_name="inprocess", resume=False, view=Silent())
    assert not (tmp_path / "run").exists()
