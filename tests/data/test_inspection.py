import numpy as np
import pytest

from fedmix.data.characteristics import Characteristics
from fedmix.data.inspection import check_together, declaration, num_shared, patients_in_two_splits
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


@pytest.fixture
def make(tmp_path, tokenizer):
    def make(patients, *, key=KEY, size=16, splits=None, text="Normal."):
        path = tmp_path / f"shard{len(list(tmp_path.iterdir()))}"
        with ShardWriter(path, image_size=size, tokenizer=tokenizer, key=key, label_names=("Edema",)) as writer:
            for number, patient in enumerate(patients):
                image = np.full((size, size), number, np.uint8)
                split = None if splits is None else splits[number]
                writer.add(
                    patient=patient, study=str(number), image=image, text=text, labels={"Edema": number % 2}, split=split
                )
        return Shard.open(path)

    return make


def test_a_declaration_is_counts(make):
    shard = make(["a", "a", "b"], splits=["train", "train", "test"])
    said = declaration(shard)
    assert (said.streams, said.splits) == ({"image": 0, "text": 0, "paired": 3}, {"train": 2, "val": 0, "test": 1})
    assert (said.num_patients, said.views, said.positives) == (2, {"unknown": 3}, {"Edema": 1})
    assert (said.image_size, said.languages, said.texts) == (16, {"unknown": 3}, "not searched")


def test_a_declaration_says_nothing_of_sex_and_age(tmp_path, tokenizer):
    said = []
    for keeps in (False, True):
        path = tmp_path / f"shard{keeps}"
        with ShardWriter(path, image_size=16, tokenizer=tokenizer, key=KEY, keeps_characteristics=keeps) as writer:
            kept = Characteristics("F", "80+") if keeps else Characteristics()
            writer.add(patient="a", study="1", text="Normal.", split="train", characteristics=kept)
        said.append(declaration(Shard.open(path)))
    assert said[0] == said[1]


def test_a_declaration_counts_the_texts_of_each_language(tmp_path, tokenizer):
    with ShardWriter(tmp_path / "shard", image_size=16, tokenizer=tokenizer, key=KEY) as writer:
        for number, lang in enumerate(("en", "es", "en", "")):
            writer.add(patient="a", study=str(number), text="Normal.", lang=lang)
        writer.add(patient="a", study="no text", image=np.eye(16, dtype=np.uint8), lang="en")
    assert declaration(Shard.open(tmp_path / "shard")).languages == {"en": 2, "es": 1, "unknown": 1}


def test_shards_of_one_key_put_a_patient_into_one_split(make):
    names = [f"patient {number}" for number in range(60)]
    shards = [make(names), make(names[::-1][:40]), make([*names[:10], "another"])]
    check_together(shards)
    assert patients_in_two_splits(shards) == 0
    assert num_shared(shards) == 50  # the last 40, and 10 of the first 20


def test_a_patient_in_two_splits_of_two_shards_is_found(make):
    shards = [make(["a", "b"], splits=["train", "test"]), make(["b", "a"], splits=["test", "test"])]
    assert patients_in_two_splits(shards) == 1
    with pytest.raises(DataError, match="1 patients stand in two splits"):
        check_together(shards)


def test_two_keys_or_two_sizes_do_not_go_together(make):
    with pytest.raises(DataError, match="2 different site keys"):
        check_together([make(["a"]), make(["a"], key=bytes(32))])
    with pytest.raises(DataError, match="images of 16 and 24 pixels"):
        check_together([make(["a"]), make(["a"], size=24)])
