from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_toys import OracleEncoder, ToyVocabulary, codes, draw, held_out, write
from torch import Tensor, nn

from fedmix.errors import ConfigError, DataError
from fedmix.evaluation.features import (
    EvaluationContext,
    EvaluationSettings,
    NotEvaluableError,
    batches_by_length,
    encode_images,
    encode_texts,
    evaluating,
    image_features,
    random_for,
    text_features,
)
from fedmix.evaluation.held_out import HeldOut


class RecordingEncoder(OracleEncoder):
    """Embeds a text by the sum of its ids, and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode_text(self, words_BL: Tensor) -> Tensor:
        self.seen.append(words_BL)
        return words_BL.sum(dim=1, keepdim=True).float()


def random_texts(num: int = 50, longest: int = 30) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 100, rng.integers(1, longest + 1)) for _ in range(num)]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_texts_come_back_in_their_own_order_whatever_the_batch_size(batch_size):
    texts = random_texts()
    result = encode_texts(RecordingEncoder(), texts, batch_size=batch_size)
    np.testing.assert_array_equal(result[:, 0], [text.sum() for text in texts])


def test_batches_are_padded_with_zeros_to_their_own_longest_text():
    encoder = RecordingEncoder()
    encode_texts(encoder, random_texts(), batch_size=8)
    for words_BL in encoder.seen:
        lengths = (words_BL > 0).sum(dim=1)
        assert words_BL.shape[1] == lengths.max()
        assert all((row[length:] == 0).all() for row, length in zip(words_BL, lengths, strict=True))
    widths = [words_BL.shape[1] for words_BL in encoder.seen]
    assert widths == sorted(widths)


def test_batches_by_length_hold_every_row_once():
    texts = random_texts()
    rows = np.concatenate(batches_by_length(texts, 7))
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(texts)))


@pytest.mark.parametrize("encode", [encode_images, image_features])
def test_images_are_encoded_alike_whatever_the_batch_size(encode):
    images = draw(codes(30))
    np.testing.assert_array_equal(encode(OracleEncoder(), images, batch_size=4), encode(OracleEncoder(), images))


def test_pixels_reach_the_encoder_in_zero_to_one():
    class Mean(OracleEncoder):
        def encode_image(self, image_BSS: Tensor) -> Tensor:
            return image_BSS.mean(dim=(1, 2))[:, None]

    images = np.stack([np.full((24, 24), 255, np.uint8), np.zeros((24, 24), np.uint8)])
    np.testing.assert_array_equal(encode_images(Mean(), images)[:, 0], [1.0, 0.0])


def test_evaluation_leaves_every_submodule_in_the_mode_it_was_in():
    encoder = OracleEncoder().train()
    encoder.inner.eval()  # a frozen part inside a training model
    encode_images(encoder, draw(codes(4)))
    assert encoder.training
    assert not encoder.inner.training


def test_evaluation_restores_the_mode_after_an_error():
    encoder = OracleEncoder().train()

    def fail() -> None:
        with evaluating(encoder):
            assert not encoder.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert encoder.training
    assert torch.is_grad_enabled()


def test_a_table_cached_during_evaluation_serves_the_next_training_step():
    class Caching(nn.Linear):
        table: Tensor | None = None

        def forward(self, image_BSS: Tensor) -> Tensor:
            self.table = torch.ones(24) if self.table is None else self.table
            return super().forward(image_BSS) * self.table

    encoder = OracleEncoder()
    encoder.inner = Caching(24, 24)
    with evaluating(encoder):
        encoder.inner(torch.ones(1, 24))
    encoder.inner(torch.ones(1, 24)).sum().backward()
    assert encoder.inner.weight.grad is not None


@pytest.mark.gpu
def test_an_encoder_on_the_gpu_gives_the_same_embeddings():
    images, words = draw(codes(30)), write(codes(30))
    here, there = OracleEncoder(), OracleEncoder().cuda()
    np.testing.assert_allclose(encode_images(there, images), encode_images(here, images), atol=1e-6)
    np.testing.assert_allclose(text_features(there, words), text_features(here, words), atol=1e-6)


def test_values_that_are_not_finite_are_not_evaluable():
    encoder = OracleEncoder()
    encoder.scale.data.fill_(float("inf"))
    with pytest.raises(NotEvaluableError, match="not finite"):
        encode_images(encoder, draw(codes(3)))


def test_a_patient_on_both_sides_is_refused_without_being_named():
    patient = np.array([f"P{i:03d}" for i in range(160)])
    patient[100] = patient[3]
    with pytest.raises(DataError, match="1 held-out patients are both") as error:
        held_out(patient=patient)
    assert "P003" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": []}, "words has 0 rows"),
        ({"labels": np.zeros((160, 3), np.int8)}, "one column for each label name"),
        ({"labels": np.full((160, 8), 2, np.int8)}, "-1"),
        ({"mean_image": None}, "mean_image"),
        ({"mean_image": np.full((24, 24), 128.0)}, r"0\.\.1"),
        ({"images": np.zeros((160, 24, 24), np.float32)}, "uint8"),
    ],
)
def test_held_out_sets_that_contradict_themselves_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        held_out(**changes)


def test_a_study_without_an_image_has_none():
    image_row = np.arange(160) - 1  # the first study has none, the others are shifted by one
    shifted = held_out(image_row=image_row)
    assert not shifted.has_image[0]
    assert shifted.has_image[1:].all()
    np.testing.assert_array_equal(shifted.images_of(np.array([1, 5])), shifted.images[[0, 4]])


def test_a_subset_keeps_what_belongs_together():
    whole = held_out()
    part = whole.take(np.array([3, 150]))
    np.testing.assert_array_equal(part.images_of(np.array([1])), whole.images_of(np.array([150])))
    np.testing.assert_array_equal(part.words_of(np.array([1]))[0], whole.words_of(np.array([150]))[0])
    np.testing.assert_array_equal(part.labels[1], whole.labels[150])
    assert part.is_probe_train.tolist() == [True, False]


def test_bool_labels_are_known_labels():
    labels = codes(160)
    np.testing.assert_array_equal(held_out(labels=labels).labels, labels.astype(np.int8))


def test_empty_reports_count_as_none():
    words = [*write(codes(160))[:158], None, np.zeros(0, np.int64)]
    assert held_out(words=words).has_text[-3:].tolist() == [True, False, False]


def test_an_image_size_the_encoder_does_not_take_is_refused_before_any_work():
    encoder = OracleEncoder()
    encoder.image_size = 32
    with pytest.raises(DataError, match="24 pixels a side, the model expects 32"):
        EvaluationContext(encoder, held_out(), ToyVocabulary(), {}, EvaluationSettings())


def test_test_studies_are_not_those_that_train_the_probe():
    context = EvaluationContext(OracleEncoder(), held_out(), ToyVocabulary(), {}, EvaluationSettings())
    assert not context.held_out.is_probe_train[context.test_studies(image=True)].any()
    assert context.held_out.is_probe_train[context.probe_studies(image=True)].all()
    np.testing.assert_array_equal(context.test_studies(), np.arange(80, 160))
    assert len(context.test_studies(most=10)) == 10


def test_embeddings_kept_for_all_tasks_belong_to_the_studies_asked_for():
    context = EvaluationContext(OracleEncoder(), held_out(), ToyVocabulary(), {}, EvaluationSettings())
    studies = np.array([90, 81, 159])
    expected = encode_images(context.encoder, context.held_out.images_of(studies))
    np.testing.assert_array_equal(context.image_embeddings(studies), expected)
    mixed = np.array([2, 90])
    expected = image_features(context.encoder, context.held_out.images_of(mixed))
    np.testing.assert_array_equal(context.image_features(mixed), expected)


@pytest.mark.parametrize("wrong", [{"mask_ratio": 1.0}, {"text_mask_ratio": 0.0}, {"gallery": 0}, {"num_bootstrap": -1}])
def test_settings_that_cannot_be_run_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EvaluationSettings(**wrong)


def test_random_numbers_depend_on_the_purpose_and_the_seed_only():
    assert random_for(1, "masks").random() == random_for(1, "masks").random()
    assert random_for(1, "masks").random() != random_for(2, "masks").random()
    assert random_for(1, "masks").random() != random_for(1, "words").random()


def test_a_held_out_set_of_reports_alone_needs_no_mean_image():
    texts = HeldOut(
        images=None,
        words=write(codes(4)),
        labels=None,
        label_names=(),
        patient=np.arange(4),
        is_probe_train=np.zeros(4, bool),
    )
    assert not texts.has_image.any()
    assert texts.has_text.all()
