"""The membership attack of a simulation: on whom, against what, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import little
import numpy as np
import pytest

from fedmix import config
from fedmix.data.shard import Shard
from server import held_out as central
from server.conclusion import evaluate
from simulations.membership import membership, people


def attacked(folder: Path) -> config.Experiment:
    return config.build(little.values(folder, evaluation={"gallery": 40, "num_bootstrap": 20, "membership_patients": 24}))


def test_a_model_that_trained_on_nobody_is_attacked_by_chance(tmp_path: Path) -> None:
    experiment = attacked(tmp_path)
    world = little.World(tmp_path, experiment.model_dump(mode="json"))
    start = central.parameters_of(central.initial_model(experiment, world.tokenizer))
    found = membership(experiment, start, world.shards, world.tokenizer)
    assert found["auc"] == pytest.approx(0.5)
    assert min(found["num_members"], found["num_non_members"]) >= 20
    assert found["epsilon_lower_bound"]["delta"] == experiment.privacy.delta


def test_both_sides_are_of_every_site_and_share_nobody(tmp_path: Path) -> None:
    experiment = attacked(tmp_path)
    world = little.World(tmp_path, experiment.model_dump(mode="json"))
    found = people(experiment, world.shards, world.tokenizer)
    sides = [{str(name).split("/")[0] for name in found.patient[side]} for side in (found.is_member, ~found.is_member)]
    assert sides == [{"north", "south", "west"}] * 2
    assert len(set(found.patient[found.is_member])) == len(set(found.patient[~found.is_member])) == 24
    north = np.flatnonzero(np.char.startswith(found.patient.astype(str), "north/") & found.is_member)
    shard = Shard.open(world.shards["north"])
    own = {shard.image(row).tobytes() for row in range(len(shard))}  # type: ignore[union-attr]
    assert {image.tobytes() for image in found.images_of(north)} <= own
    others = np.flatnonzero(np.char.startswith(found.patient.astype(str), "north/") & ~found.is_member)
    assert not {image.tobytes() for image in found.images_of(others)} & own


def test_an_evaluation_holds_the_attack_or_says_why_it_does_not(tmp_path: Path) -> None:
    experiment = attacked(tmp_path)
    world = little.World(tmp_path, experiment.model_dump(mode="json"))
    held_out = central.load(experiment.data, world.tokenizer)
    start = central.parameters_of(central.initial_model(experiment, world.tokenizer))
    kept = {}
    for name, attack in (("simulated", lambda: {"auc": 0.5}), ("deployed", None)):
        evaluate(experiment, start, held_out, tokenizer=world.tokenizer, folder=tmp_path / name, attack=attack)
        kept[name] = json.loads((tmp_path / name / "evaluation/evaluation.json").read_text())["report"]
    assert kept["simulated"]["membership"] == {"auc": 0.5}
    assert "not at the server" in kept["deployed"]["skipped"]["membership"]
