"""Canaries: all follow from a few numbers, come back out of a shard as they went in, and have as many holders as stated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedmix.data.planted import NEVER_PLANTED, PLANTED, Plan, whole_words
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

TOKENIZER = Tokenizer.load()
KEY = bytes(32)


def plan(**changes: object) -> Plan:
    values = {"seed": 3, "tokenizer": TOKENIZER.fingerprint, "num_words": 7, "image_size": 32, "each": 2}
    return Plan.model_validate(values | changes)


def test_each_canary_is_in_the_studies_of_as_many_patients_as_the_plan_says(tmp_path: Path) -> None:
    wanted = plan()
    wanted.plant(tmp_path / "shard", tokenizer=TOKENIZER, key=KEY, max_words=16)
    shard = Shard.open(tmp_path / "shard")
    assert len(shard) == len(set(shard.patient)) == 2 * (1 + 2 + 4 + 8)
    assert set(shard.split) == {"train"}
    held = Counter(TOKENIZER.decode(shard.words(study)) for study in range(len(shard)))
    texts = wanted.texts(8, PLANTED, TOKENIZER)
    assert held == dict(zip(texts, (1, 1, 2, 2, 4, 4, 8, 8), strict=True))
    assert all(len(shard.words(study)) == 1 + 7 for study in range(len(shard)))
    seen = Counter(image.tobytes() for image in shard.images)
    assert seen == {image.tobytes(): times for image, times in zip(wanted.pictures(8, PLANTED), wanted.times_of, strict=True)}


def test_the_same_plan_draws_the_same_and_nothing_planted_is_among_the_others(tmp_path: Path) -> None:
    plan().write(tmp_path / "canaries.json")
    again = Plan.read(tmp_path / "canaries.json")
    assert again == plan()
    np.testing.assert_array_equal(again.pictures(8, PLANTED), plan().pictures(8, PLANTED))
    planted = plan().texts(8, PLANTED, TOKENIZER)
    assert planted == again.texts(8, PLANTED, TOKENIZER)
    for others in (again.texts(500, NEVER_PLANTED, TOKENIZER), plan(seed=4).texts(500, PLANTED, TOKENIZER)):
        assert not set(planted) & set(others)


def test_pictures_have_the_grey_of_prepared_radiographs_and_are_all_different() -> None:
    pictures = plan().pictures(50, NEVER_PLANTED) / 255
    assert len(np.unique(pictures.reshape(50, -1), axis=0)) == 50
    np.testing.assert_allclose(pictures.mean(axis=(1, 2)), 0.5, atol=0.02)
    np.testing.assert_allclose(pictures.std(axis=(1, 2)), 0.2, atol=0.02)


@pytest.mark.parametrize(("changes", "streams"), [({"image_size": 0}, "text"), ({"num_words": 0}, "image")])
def test_a_plan_of_texts_or_of_pictures_alone_is_a_shard_of_that_stream(
    tmp_path: Path, changes: dict[str, int], streams: str
) -> None:
    plan(**changes).plant(tmp_path / "shard", tokenizer=TOKENIZER, key=KEY, max_words=16)
    assert Shard.open(tmp_path / "shard").stream_counts[streams] == 30  # type: ignore[index]


def test_a_whole_word_is_read_back_as_itself() -> None:
    words = whole_words(TOKENIZER)
    assert len(words) > 1000
    assert all(len(ids) == 2 for ids in TOKENIZER.encode(words, 9))


def test_what_is_no_plan_or_does_not_fit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"schema": 1, "seed": 0}')
    for path in (tmp_path / "other.json", tmp_path / "nothing.json"):
        with pytest.raises(DataError, match="is no plan of canaries"):
            Plan.read(path)
    with pytest.raises(DataError, match="another tokenizer's words"):
        plan(tokenizer="0" * 64).texts(1, PLANTED, TOKENIZER)
    with pytest.raises(DataError, match="does not fit into max_words 7"):
        plan().plant(tmp_path / "shard", tokenizer=TOKENIZER, key=KEY, max_words=7)
    assert not (tmp_path / "shard").exists()
