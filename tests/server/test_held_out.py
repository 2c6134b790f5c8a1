"""What the central held-out set says of its studies beyond their data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedmix.data.shard import Shard, ShardWriter
from fedmix.data.tokenizer import Tokenizer
from server.held_out import of_shards


def shard(folder: Path, views: tuple[str, ...]) -> Shard:
    with ShardWriter(folder, image_size=16, tokenizer=Tokenizer.load(), key=bytes(range(32))) as writer:
        for row, view in enumerate(views):
            image, split = np.full((16, 16), row, np.uint8), ("train", "test")[row % 2]
            writer.add(patient=f"{folder.name}{row}", study=str(row), image=image, view=view, split=split)
    return Shard.open(folder)


def test_studies_are_grouped_by_view_and_shard_without_a_folders_name(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "MUELLER", ("PA", "AP", "PA")), shard(tmp_path / "second", ("lateral", "unknown"))]
    held_out = of_shards(shards, 16, Tokenizer.load())
    grey = [int(held_out.images_of(np.array([study]))[0, 0, 0]) for study in range(5)]
    assert held_out.groups["site"].tolist() == ["shard 1"] * 3 + ["shard 2"] * 2
    expected = [("PA", "AP", "PA")[row] for row in grey[:3]] + [("lateral", "unknown")[row] for row in grey[3:]]
    assert held_out.groups["view"].tolist() == expected
