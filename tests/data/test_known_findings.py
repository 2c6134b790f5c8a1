from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedmix import config
from fedmix.data.known_findings import FindingsReader, columns_of
from fedmix.data.loading import sampler_of
from fedmix.data.reports.labeller import FINDINGS
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer

NAMES = ("Pleural Effusion", "effusion_left", "Lung Lesion", "Support Devices")
KEY = b"0123456789abcdef"


def shard(path: Path) -> Shard:
    image = np.zeros((16, 16), np.uint8)
    with ShardWriter(path, image_size=16, tokenizer=Tokenizer.load(), key=KEY, label_names=NAMES) as writer:
        known = {"split": "train"}
        writer.add(patient="a", study="1", text="Small left effusion. No nodule.", labels={"Lung Lesion": 1}, **known)
        writer.add(patient="b", study="1", image=image, labels={"effusion_left": 1, "Lung Lesion": 0}, **known)
        writer.add(patient="c", study="1", image=image, labels={"Support Devices": 1}, **known)
        writer.add(patient="d", study="1", image=image, text="Possible edema.", labels={"Lung Lesion": 1}, **known)
    return Shard.open(path)


def row(**said: float) -> list[float]:
    return [said.get(finding, 0.0) for finding in FINDINGS]


def test_reports_are_read_and_images_alone_are_labelled(tmp_path: Path) -> None:
    """A report counts before labels, also for a pair; labels that mean no finding of ours say nothing."""
    found = FindingsReader(shard(tmp_path / "s"), Tokenizer.load()).of(np.array([0, 1, 2, 3]))
    expected = torch.tensor([row(effusion=1.0), row(effusion=1.0), [-1.0] * len(FINDINGS), row(edema=0.5)])
    assert torch.equal(found, expected)


def test_label_names_are_understood_as_words() -> None:
    columns = dict(zip(FINDINGS, columns_of((*NAMES, "Cardiomegaly", "Pneumonia", "Mass")), strict=True))
    assert {finding: own for finding, own in columns.items() if own} == {
        "effusion": [0, 1],
        "nodule": [2, 6],
        "cardiomegaly": [4],
        "consolidation": [5],
    }


def test_batches_hold_findings_where_the_stage_compares_them_and_only_there(tmp_path: Path) -> None:
    opened, tokenizer = shard(tmp_path / "s"), Tokenizer.load()
    asked = {"semantic": 1.0, "mvm": 0.0, "mlm": 0.0}
    for objectives, holds in (({}, False), (asked, True)):
        stage = config.Stage(name="s", rounds=1, batch_size=4, objectives=config.Objectives(**objectives))
        batch = sampler_of(stage, opened, opened.select("train"), seed=1, tokenizer=tokenizer).batch(0)
        assert (batch.findings is not None) == holds
        if batch.findings is not None:
            unknown = (batch.findings < 0).all(dim=1)
            assert unknown.sum() == 1  # the image whose one label means none of the findings
            assert not batch.has_text[unknown].any()
