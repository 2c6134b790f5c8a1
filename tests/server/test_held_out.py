"""What the central held-out sets say of their studies beyond their data, and that each is reported under its own name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import little
import numpy as np
import pytest

from fedmix import config
from fedmix.data.characteristics import Characteristics
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.deployment.plan import _portable
from fedmix.errors import DataError
from server import held_out as central
from server.conclusion import evaluate, kept_evaluation
from server.held_out import of_shards


def shard(folder: Path, views: tuple[str, ...], *, size: int = 16, labels: tuple[str, ...] = (), splits: str = "") -> Shard:
    writer = ShardWriter(folder, image_size=size, tokenizer=Tokenizer.load(), key=bytes(range(32)), label_names=labels)
    with writer:
        for row, view in enumerate(views):
            image, split = np.full((size, size), row, np.uint8), splits or ("train", "test")[row % 2]
            present = dict.fromkeys(labels, row // 2 % 2)
            writer.add(patient=f"{folder.name}{row}", study=str(row), image=image, view=view, split=split, labels=present)
    return Shard.open(folder)


def experiment(folder: Path, **also: dict[str, Any]) -> config.Experiment:
    values = little.values(folder, evaluation={"gallery": 6, "num_bootstrap": 20, "regeneration_images": 4})
    values["data"]["held_out"] = {"phantom": {"studies": 16, "look": "unseen"}, "probe_studies": 8, "also": also}
    return config.build(values)


def test_studies_are_grouped_by_view_and_shard_without_a_folders_name(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "MUELLER", ("PA", "AP", "PA")), shard(tmp_path / "second", ("lateral", "unknown"))]
    held_out = of_shards(shards, 16, Tokenizer.load())
    grey = [int(held_out.images_of(np.array([study]))[0, 0, 0]) for study in range(5)]
    assert held_out.groups["site"].tolist() == ["shard 1"] * 3 + ["shard 2"] * 2
    expected = [("PA", "AP", "PA")[row] for row in grey[:3]] + [("lateral", "unknown")[row] for row in grey[3:]]
    assert held_out.groups["view"].tolist() == expected


def test_studies_are_grouped_by_sex_and_age_band_where_a_shard_keeps_them(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image_size": 16, "tokenizer": Tokenizer.load(), "key": bytes(range(32))}
    said = [Characteristics("F", "0-17"), Characteristics("M", "80+"), Characteristics("unknown", "40-59")]
    with ShardWriter(tmp_path / "kept", keeps_characteristics=True, **settings) as writer:
        for row, one in enumerate(said):
            image, split = np.full((16, 16), row, np.uint8), ("train", "test")[row % 2]
            writer.add(patient=f"p{row}", study=str(row), image=image, split=split, characteristics=one)
    held_out = of_shards([Shard.open(tmp_path / "kept"), shard(tmp_path / "usual", ("PA", "AP"))], 16, Tokenizer.load())
    assert list(held_out.groups) == ["view", "sex", "age_band", "site"]
    assert held_out.groups["sex"].tolist() == ["F", "unknown", "M", "unknown", "unknown"]
    assert held_out.groups["age_band"].tolist() == ["0-17", "40-59", "80+", "unknown", "unknown"]


def test_of_a_long_training_split_no_more_is_read_than_a_probe_can_use(tmp_path: Path) -> None:
    long = shard(tmp_path / "long", ("PA",) * 40)
    held_out = of_shards([long], 16, Tokenizer.load(), most_train=6)
    assert (held_out.is_probe_train.sum(), (~held_out.is_probe_train).sum()) == (6, 20)
    again = of_shards([long], 16, Tokenizer.load(), most_train=6)
    assert held_out.patient.tolist() == again.patient.tolist()


def test_each_further_set_is_evaluated_with_its_own_labels_under_its_own_name(tmp_path: Path) -> None:
    shard(tmp_path / "other", ("PA", "AP") * 12, size=48, labels=("Mass", "Hernia"))
    wanted = experiment(tmp_path, other={"shards": [tmp_path / "other"], "probe_studies": 5})
    tokenizer = Tokenizer.load()
    start = central.parameters_of(central.initial_model(wanted, tokenizer))
    held_out = central.load(wanted.data, tokenizer)
    found = evaluate(wanted, start, held_out, tokenizer=tokenizer, folder=tmp_path / "run", was_trained=False)["report"]
    other = found["also"]["other"]
    assert list(other["classification"]["zero_shot"]["per_label"]) == ["Hernia", "Mass"]
    assert (other["classification"]["linear_probe"]["num_train"], other["classification"]["linear_probe"]["num_test"]) == (
        5,
        12,
    )
    assert "have an image and a report" in other["skipped"]["retrieval"]
    assert not {"Hernia", "Mass"} & set(found["classification"]["zero_shot"]["per_label"])
    assert json.loads(json.dumps(found)) == kept_evaluation(wanted, tmp_path / "run")["report"]  # type: ignore[index]
    assert kept_evaluation(experiment(tmp_path), tmp_path / "run") is None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "no shard folder"),
        ({"size": 16}, "images of 16 px, the model wants 48"),
        ({"size": 48, "splits": "test"}, "no image in their training split"),
    ],
)
def test_a_further_set_that_cannot_be_evaluated_is_refused_before_the_first_round(
    tmp_path: Path, made: dict[str, Any], message: str
) -> None:
    if made:
        shard(tmp_path / "other", ("PA", "AP"), **made)
    wanted = experiment(tmp_path, other={"shards": [tmp_path / "other"]})
    with pytest.raises(DataError, match=message):
        central.load(wanted.data, Tokenizer.load())


def test_no_plan_says_which_further_sets_the_coordinator_has(tmp_path: Path) -> None:
    wanted = experiment(tmp_path, secret={"shards": [tmp_path / "other"]})
    assert wanted.fingerprint() == experiment(tmp_path).fingerprint()
    assert "secret" not in json.dumps(_portable(wanted))
