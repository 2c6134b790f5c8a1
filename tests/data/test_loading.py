from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedmix import config
from fedmix.batch import Batch, Study
from fedmix.data.loading import PatientSampler, Sampler, collate, pad, study
from fedmix.data.shard import Shard
from fedmix.data.shard_writer import ShardWriter
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError

SIZE = 8
NUM_EACH = 24  # studies of each stream
FINDINGS = ("heart", "lungs", "effusion", "left", "right", "small", "normal", "clear")


def image_of(number: int) -> np.ndarray:
    """An image whose first pixel is the study's number."""
    image = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE), dtype=np.uint8)
    image[0, 0] = number
    return image


def report_of(number: int) -> str:
    """Between 1 and 8 words, in no order of length, and no two alike: each ends with the study's number."""
    length = 1 + (number * 5) % 8
    return " ".join(FINDINGS[(number + k) % 8] for k in range(length)) + f" {number}"


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Images are studies 0 to 23, texts 24 to 47, pairs 48 to 71."""
    path = tmp_path_factory.mktemp("loading") / "shard"
    settings = {"image_size": SIZE, "tokenizer": Tokenizer.load(), "key": bytes(32), "split_shares": (1.0, 0.0, 0.0)}
    with ShardWriter(path, **settings) as writer:
        for number in range(3 * NUM_EACH):
            image = image_of(number) if number < NUM_EACH or number >= 2 * NUM_EACH else None
            text = report_of(number) if number >= NUM_EACH else None
            writer.add(patient=str(number), study=str(number), image=image, text=text)
    return Shard.open(path)


def sampler(shard: Shard, stream: str, *, batch_size: int = 4, seed: int = 0) -> Sampler:
    return Sampler(shard, shard.select("train", stream), batch_size=batch_size, seed=seed)


def same(one: Batch, other: Batch) -> bool:
    pairs = [(one.image, other.image), (one.text, other.text), (one.has_image, other.has_image), (one.has_text, other.has_text)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b for a, b in pairs)


def numbers(shard: Shard, batch: Batch) -> list[int]:
    """Which studies a batch holds: by the first pixel, or by the words of the report."""
    if batch.image is not None:
        return (batch.image[:, 0, 0] * 255).round().int().tolist()
    assert batch.text is not None
    known = {tuple(shard.words(k).tolist()): k for k in shard.select("train", "text")}
    return [known[tuple(word for word in row.tolist() if word)] for row in batch.text]


STREAMS = pytest.mark.parametrize("stream", ["image", "text", "paired"])

# ---- which studies a step sees


@STREAMS
def test_batch_of_a_step_is_the_same_whatever_was_asked_before(shard: Shard, stream: str) -> None:
    forwards, backwards = sampler(shard, stream), sampler(shard, stream)
    steps = [0, 1, 5, 6, 7, 13, 40]
    there = {step: forwards.batch(step) for step in steps}
    back = {step: backwards.batch(step) for step in reversed(steps)}
    for step in steps:
        assert same(there[step], back[step])
        assert same(there[step], sampler(shard, stream).batch(step))


@STREAMS
def test_epoch_shows_every_study_once(shard: Shard, stream: str) -> None:
    """Twenty-four studies in batches of four: six steps an epoch."""
    drawn = sampler(shard, stream)
    for epoch in range(3):
        seen = [number for step in range(6) for number in numbers(shard, drawn.batch(6 * epoch + step))]
        assert sorted(seen) == shard.select("train", stream).tolist()


def test_epoch_of_many_pools_shows_every_report_once(shard: Shard) -> None:
    """Reports are sorted by length within pools of sixteen batches; here there are two."""
    drawn = sampler(shard, "text", batch_size=1)
    seen = [number for step in range(24) for number in numbers(shard, drawn.batch(step))]
    assert sorted(seen) == shard.select("train", "text").tolist()


@STREAMS
def test_what_does_not_fill_a_batch_waits_for_another_shuffle(shard: Shard, stream: str) -> None:
    """Batches of five leave four over in each epoch, and not always the same four."""
    drawn = sampler(shard, stream, batch_size=5)
    epochs = [[number for step in range(4) for number in numbers(shard, drawn.batch(4 * epoch + step))] for epoch in range(6)]
    assert all(len(set(seen)) == len(seen) == 20 for seen in epochs)
    assert set().union(*map(set, epochs)) == set(shard.select("train", stream).tolist())


@STREAMS
def test_epochs_and_seeds_are_shuffled_anew(shard: Shard, stream: str) -> None:
    drawn, other = sampler(shard, stream), sampler(shard, stream, seed=1)
    first, second, elsewhere = (
        [numbers(shard, source.batch(start + step)) for step in range(6)]
        for source, start in ((drawn, 0), (drawn, 6), (other, 0))
    )
    assert first != second
    assert first != elsewhere


def test_batch_is_never_larger_than_the_shard(shard: Shard) -> None:
    drawn = sampler(shard, "image", batch_size=1000)
    assert len(drawn.batch(0)) == len(drawn.batch(1)) == NUM_EACH


def test_no_study_of_the_stream_is_an_error_that_says_what_to_do(shard: Shard) -> None:
    with pytest.raises(DataError, match="no study of the wanted stream and split in this shard; see `fedmix prepare --stream`"):
        Sampler(shard, np.array([], dtype=np.int64), batch_size=4, seed=0)


# ---- length buckets


def padding(batches: list[Batch]) -> float:
    return float(np.mean([(batch.text == 0).float().mean() for batch in batches if batch.text is not None]))


def test_reports_of_similar_length_share_a_batch(shard: Shard) -> None:
    """Against the same reports in random order, at least half of the padding is saved."""
    drawn = sampler(shard, "text")
    bucketed = [drawn.batch(step) for step in range(6)]
    order = np.random.default_rng(0).permutation(shard.select("train", "text"))
    shuffled = [collate([study(shard, int(row)) for row in order[start : start + 4]]) for start in range(0, 24, 4)]
    assert padding(shuffled) > 0.2
    assert padding(bucketed) < padding(shuffled) / 2


def test_buckets_come_in_random_order(shard: Shard) -> None:
    """Short reports first in every epoch would be a curriculum that nobody asked for."""
    drawn = sampler(shard, "text")
    lengths = [[drawn.batch(6 * epoch + step).text.shape[1] for step in range(6)] for epoch in range(4)]
    assert any(epoch != sorted(epoch) for epoch in lengths)
    assert len({tuple(epoch) for epoch in lengths}) > 1


def test_pairs_are_not_sorted_by_length(shard: Shard) -> None:
    """A batch of equally long reports would make contrast another task."""
    drawn = sampler(shard, "paired")
    spreads = [int((drawn.batch(step).text != 0).sum(dim=1).float().std() > 1) for step in range(12)]
    assert sum(spreads) >= 8


# ---- collating


def test_studies_of_all_streams_fit_one_batch(shard: Shard) -> None:
    batch = collate([study(shard, number) for number in (0, 30, 60, 1, 61)])
    assert batch.counts() == {"image": 2, "text": 1, "paired": 2}
    assert batch.has_image.tolist() == [True, False, True, True, True]
    assert batch.has_text.tolist() == [False, True, True, False, True]
    assert batch.image is not None
    assert batch.text is not None
    for row, number in enumerate((0, 60, 1, 61)):
        assert torch.equal((batch.image[row] * 255).round().byte(), torch.from_numpy(image_of(number)))
    for row, number in enumerate((30, 60, 61)):
        words = shard.words(number)
        assert batch.text[row, : len(words)].tolist() == words.tolist()
        assert not batch.text[row, len(words) :].any()


def test_grey_values_lie_between_zero_and_one(shard: Shard) -> None:
    image = sampler(shard, "image").batch(0).image
    assert image is not None
    assert (image.dtype, float(image.min()) >= 0, float(image.max()) <= 1) == (torch.float32, True, True)


def test_batch_of_one_stream_has_nothing_of_the_other(shard: Shard) -> None:
    assert sampler(shard, "image").batch(0).text is None
    assert sampler(shard, "text").batch(0).image is None


def test_image_and_report_of_a_pair_stay_together(shard: Shard) -> None:
    batch = sampler(shard, "paired").batch(3)
    for row, number in enumerate(numbers(shard, batch)):
        assert batch.text is not None
        assert [word for word in batch.text[row].tolist() if word] == shard.words(number).tolist()


def test_reports_are_padded_to_the_longest_of_their_batch() -> None:
    padded = pad([torch.tensor([2, 7]), torch.tensor([2, 8, 9]), torch.tensor([2])])
    assert padded.tolist() == [[2, 7, 0], [2, 8, 9], [2, 0, 0]]
    assert padded.dtype == torch.int64


def test_studies_are_copied_out_of_the_memory_map(shard: Shard) -> None:
    one = study(shard, 60)
    assert one.image is not None
    assert one.text is not None
    one.image.zero_()
    one.text.zero_()
    again = study(shard, 60)
    assert again.image is not None
    assert again.image.any()
    assert again.text is not None
    assert again.text.all()


def test_shard_on_another_path_gives_the_same_batches(shard: Shard, tmp_path: Path) -> None:
    """Where a file lies changes nothing, so the seed must not come from the path."""
    moved = Shard.open(Path(shutil.copytree(shard.path, tmp_path / "elsewhere")))
    assert same(sampler(shard, "paired").batch(9), sampler(moved, "paired").batch(9))


def test_studies_of_one_patient_share_a_number_and_no_others_do(tmp_path: Path) -> None:
    patients = ["ada", "bob", "ada", "eve", "bob"]
    numbers: list[list[int]] = []
    for key in (bytes(32), bytes(31) + b"1"):
        settings = {"image_size": SIZE, "tokenizer": Tokenizer.load(), "key": key, "split_shares": (1.0, 0.0, 0.0)}
        with ShardWriter(tmp_path / key.hex(), **settings) as writer:
            for number, patient in enumerate(patients):
                writer.add(patient=patient, study=str(number), image=image_of(number))
        opened = Shard.open(tmp_path / key.hex())
        batch = collate([study(opened, row) for row in range(5)])
        assert batch.patient is not None
        assert batch.patient.dtype == torch.int64
        numbers.append(batch.patient.tolist())
    for one in numbers:
        assert [one.index(number) for number in one] == [patients.index(patient) for patient in patients]
    assert set(numbers[0]).isdisjoint(numbers[1])  # sites do not know each other's patients


def test_batch_of_studies_without_a_patient_knows_none() -> None:
    image = torch.zeros(4, 4, dtype=torch.uint8)
    assert collate([Study(image, None, 3), Study(image, None)]).patient is None


# ---- augmentation


def test_images_are_changed_by_seed_and_step_and_nothing_else_of_the_batch(shard: Shard) -> None:
    wanted = config.Augment(smallest_crop=0.5, rotation_deg=10.0, gain=0.2)
    rows = shard.select("train", "paired")
    plain = Sampler(shard, rows, batch_size=4, seed=0)
    changed, again, other = (Sampler(shard, rows, batch_size=4, seed=seed, augment=wanted) for seed in (0, 0, 1))
    later, first = changed.batch(9), changed.batch(2)
    assert same(first, again.batch(2))
    assert same(later, again.batch(9))
    assert not torch.equal(first.image, plain.batch(2).image)
    assert torch.equal(first.text, plain.batch(2).text)
    assert torch.equal(first.patient, plain.batch(2).patient)
    assert not torch.equal(first.image, other.batch(2).image)
    assert same(Sampler(shard, rows, batch_size=4, seed=0, augment=config.Augment()).batch(2), plain.batch(2))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Shard:
    """Sixty images of thirty patients: patient k has k % 3 + 1 of them, scattered over the shard."""
    path = tmp_path_factory.mktemp("families") / "shard"
    owners = [patient for patient in range(30) for _ in range(patient % 3 + 1)]
    settings = {"image_size": SIZE, "tokenizer": Tokenizer.load(), "key": bytes(32), "split_shares": (1.0, 0.0, 0.0)}
    with ShardWriter(path, **settings) as writer:
        for number in np.random.default_rng(1).permutation(len(owners)):
            writer.add(patient=str(owners[number]), study=str(number), image=image_of(int(number)), text=None)
    return Shard.open(path)


def of_patients(shard: Shard, *, most_studies: int = 9, expected: int = 5) -> PatientSampler:
    return PatientSampler(shard, shard.select("train", "image"), expected=expected, most_studies=most_studies)


def test_a_drawn_patient_comes_with_all_of_its_studies_and_nobody_elses(families: Shard) -> None:
    people = of_patients(families)
    assert people.num_patients == 30
    owner = dict(zip(numbers_in_order(families), families.patient.tolist(), strict=True))
    batch = people.draw(torch.arange(30), torch.Generator().manual_seed(0))
    assert batch is not None
    assert batch.image is not None
    assert batch.patient is not None
    found = [owner[round(float(image[0, 0]) * 255)] for image in batch.image]
    assert sorted(found) == sorted(families.patient.tolist())
    assert len(set(zip(found, batch.patient.tolist(), strict=True))) == 30  # one number a patient, and one patient a number


def numbers_in_order(shard: Shard) -> list[int]:
    """The first pixel of every study."""
    return [int(shard.images[row][0, 0]) for row in shard.image_row]


def test_no_patient_brings_more_studies_than_it_may_and_each_has_its_turn(families: Shard) -> None:
    people, chance, seen = of_patients(families, most_studies=2), torch.Generator().manual_seed(0), set()
    for _ in range(40):
        batch = people.draw(torch.arange(30), chance)
        assert batch is not None
        assert batch.image is not None
        assert batch.patient is not None
        assert int(batch.patient.bincount().max()) == 2
        seen |= {round(float(image[0, 0]) * 255) for image in batch.image}
    assert len(seen) == len(families)


def test_patients_have_the_chance_that_makes_the_expected_number_of_them(families: Shard) -> None:
    assert of_patients(families, expected=6).rate == 0.2
    assert of_patients(families, expected=99).rate == 1.0
    assert of_patients(families).draw(torch.arange(0), torch.Generator()) is None
