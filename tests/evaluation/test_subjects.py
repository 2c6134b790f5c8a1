"""Who is attacked: the split of each shard decides, and nobody stands on both sides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.evaluation.subjects import of_shards, words_trained_on

SIDE, TOKENIZER = 16, Tokenizer.load()
SPLITS = ("train", "train", "val", "test")


def shard(folder: Path, first: int = 0, num: int = 40) -> Shard:
    """A study for each patient and a second for each fifth; every third is an image alone, its grey value its number."""
    writer = ShardWriter(folder, image_size=SIDE, tokenizer=TOKENIZER, key=bytes(range(32)))
    with writer:
        for number in range(first, first + num):
            for visit in range(1 + (number % 5 == 0)):
                writer.add(
                    patient=f"P{number}",
                    study=f"S{number}-{visit}",
                    image=np.full((SIDE, SIDE), number, np.uint8),
                    text=None if number % 3 == 0 else f"effusion {number}",
                    split=SPLITS[number % 4],
                )
    return Shard.open(folder)


def audited(members: list[Shard], others: list[Shard], **changes: int):
    return of_shards(members, others, **({"image_size": SIDE, "tokenizer": TOKENIZER.fingerprint} | changes))


def test_of_a_shard_on_both_sides_the_splits_decide(tmp_path: Path) -> None:
    one = shard(tmp_path / "one")
    found = audited([one], [one])
    assert found.are_alike
    assert len(found) == len(one)
    assert found.counts()["members"]["patients"] == found.counts()["non_members"]["patients"] == 20
    numbers = found.images_of(np.arange(len(found)))[:, 0, 0]
    np.testing.assert_array_equal(found.is_member, np.isin(numbers % 4, (0, 1)))
    np.testing.assert_array_equal(found.has_text, numbers % 3 != 0)
    texts = [TOKENIZER.decode(ids.tolist()) for ids in found.words_of(np.flatnonzero(found.has_text))]
    assert all(str(number) in text.replace(" ", "") for number, text in zip(numbers[found.has_text], texts, strict=True))


def test_another_shard_is_taken_whole_but_for_patients_who_are_members(tmp_path: Path) -> None:
    one, two = shard(tmp_path / "one"), shard(tmp_path / "two", first=30)
    found = audited([one], [two])
    assert not found.are_alike
    assert found.counts()["num_shared_patients_left_out"] == 4  # 32, 33, 36 and 37 stand in both
    assert found.counts()["non_members"]["patients"] == 36


def test_words_trained_on_are_those_of_the_training_splits_reports_and_of_no_others(tmp_path: Path) -> None:
    one, images = shard(tmp_path / "one"), shard(tmp_path / "images", first=60, num=1)
    trained = [number for number in range(40) if number % 3 and SPLITS[number % 4] == "train"]
    expected = {word for ids in TOKENIZER.encode([f"effusion {number}" for number in trained], 99) for word in ids}
    assert set(words_trained_on([one, images]).tolist()) == expected
    assert len(words_trained_on([images])) == 0


def test_patients_are_drawn_with_all_their_studies(tmp_path: Path) -> None:
    one = shard(tmp_path / "one", num=80)
    first, again, other = (audited([one], [one], most_patients=12, seed=seed) for seed in (0, 0, 1))
    assert first.counts()["members"]["patients"] == first.counts()["non_members"]["patients"] == 12
    whole = {name: int((one.patient == name).sum()) for name in np.unique(first.patient)}
    assert whole == {name: int((first.patient == name).sum()) for name in whole}
    np.testing.assert_array_equal(first.patient, again.patient)
    assert set(first.patient) != set(other.patient)


def test_shards_of_another_size_or_vocabulary_are_refused_without_a_name(tmp_path: Path) -> None:
    one = shard(tmp_path / "MUELLER")
    for changes, said in (({"image_size": 32}, "the model wants 32"), ({"tokenizer": "other"}, "another tokenizer")):
        with pytest.raises(DataError, match=said) as caught:
            audited([one], [one], **changes)
        assert "MUELLER" not in str(caught.value)
