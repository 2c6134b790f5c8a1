from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from evaluation_toys import LABEL_NAMES, PROMPTS, SAYINGS, ConstantEncoder, OracleEncoder, ToyVocabulary, codes, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from fedmix.data.layouts import mimic, nih14
from fedmix.evaluation import classification
from fedmix.evaluation.classification import (
    WORDED,
    LabelledRows,
    _choose_inverse_penalty,
    linear_probe,
    prompts_for,
    raw_pixel_features,
    zero_shot_scores,
)
from fedmix.evaluation.features import encode_images


def labelled(num: int = 200, seed: int = 0, noise: float = 2.0) -> LabelledRows:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num, 3)).astype(np.int8)
    mixing = np.random.default_rng(99).normal(size=(3, 20))
    features = labels @ mixing + noise * rng.normal(size=(num, 20))
    return LabelledRows(features.astype(np.float32), labels, np.arange(num) // 2)


def probe(train: LabelledRows, test: LabelledRows, **settings):
    names = [f"label {k}" for k in range(train.labels.shape[1])]
    return linear_probe(train, test, label_names=names, **({"num_bootstrap": 20} | settings))


def test_the_probe_is_sklearns_pipeline_at_the_chosen_penalty():
    train, test = labelled(), labelled(seed=1)
    stretch = np.random.default_rng(2).uniform(0.1, 3, 20).astype(np.float32)
    # Another scale than in training, so that it shows whose mean and deviation standardise.
    test = LabelledRows(test.features * stretch, test.labels, test.patient)
    report = probe(train, test)
    for k, value in enumerate(report["per_label"].values()):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=report["inverse_penalty"], max_iter=200))
        model.fit(train.features, train.labels[:, k])
        expected = roc_auc_score(test.labels[:, k], model.decision_function(test.features))
        assert value == pytest.approx(expected, abs=2e-3)  # the solver stops within its tolerance


def test_cross_validation_keeps_a_patient_whole():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, (100, 1)).astype(np.int8)
    features = (0.2 * label + rng.normal(size=(100, 100))).astype(np.float32)
    rows = np.repeat(np.arange(100), 2)  # every patient came twice with the same picture
    whole = LabelledRows(features[rows], label[rows], rows)
    leaking = LabelledRows(features[rows], label[rows], np.arange(200))
    # Folds that split patients reward learning the pictures by heart, which takes a weak penalty.
    assert _choose_inverse_penalty(leaking, seed=0) > _choose_inverse_penalty(whole, seed=0)


def test_test_labels_have_no_say_in_the_probe():
    train, test = labelled(), labelled(seed=1)
    flipped = LabelledRows(test.features, 1 - test.labels, test.patient)
    report, reverse = probe(train, test), probe(train, flipped)
    assert reverse["inverse_penalty"] == report["inverse_penalty"]
    assert reverse["macro_auroc"] == pytest.approx(1 - report["macro_auroc"])


def test_features_that_hold_the_labels_score_one_and_noise_scores_one_half():
    easy = probe(labelled(noise=0.01), labelled(seed=1, noise=0.01))
    assert easy["macro_auroc"] == 1.0
    rng = np.random.default_rng(5)
    noise = LabelledRows(rng.normal(size=(1000, 20)).astype(np.float32), labelled(1000, 1).labels, np.arange(1000))
    report = probe(labelled(), noise, num_bootstrap=200)
    assert report["ci95"][0] < 0.5 < report["ci95"][1]


def test_rows_with_an_unknown_label_take_no_part_for_that_label():
    train, test = labelled(), labelled(seed=1)
    hidden = np.arange(len(train)) % 5 == 0
    labels = train.labels.copy()
    labels[hidden] = -1
    with_unknown = LabelledRows(train.features, labels, train.patient)
    seen_in_fit = probe(with_unknown, test)
    without = train.take(np.flatnonzero(~hidden))
    # Only the standardisation still sees the unlabelled rows.
    assert seen_in_fit["macro_auroc"] == pytest.approx(probe(without, test)["macro_auroc"], abs=0.02)
    test_labels = test.labels.copy()
    test_labels[:50, 1] = -1
    report = probe(train, LabelledRows(test.features, test_labels, test.patient))
    assert report["num_per_label"]["label 1"] == {
        "positive": int((test.labels[50:, 1] == 1).sum()),
        "negative": int((test.labels[50:, 1] == 0).sum()),
    }


def test_a_label_with_one_class_in_training_is_not_scored():
    train = labelled()
    train.labels[:, 0] = 0
    report = probe(train, labelled(seed=1))
    assert report["per_label"]["label 0"] is None
    assert report["num_labels_scored"] == 2


def test_without_a_label_to_score_the_report_says_why():
    train = labelled()
    train.labels[:] = 1
    report = probe(train, labelled(seed=1))
    assert report["macro_auroc"] is None
    assert report["ci95"] is None
    assert "both classes" in report["reason"]


def test_the_probe_trains_on_no_more_rows_than_asked_for():
    assert probe(labelled(), labelled(seed=1), num_train=50)["num_train"] == 50
    assert probe(labelled(), labelled(seed=1), num_train=5000)["num_train"] == 200


def test_the_same_seed_gives_the_same_report_and_another_seed_other_rows():
    first, again = (probe(labelled(), labelled(seed=1), num_train=50, seed=3) for _ in range(2))
    assert first == again
    assert probe(labelled(), labelled(seed=1), num_train=50, seed=4)["macro_auroc"] != first["macro_auroc"]


def test_row_order_of_the_test_changes_nothing():
    test = labelled(seed=1)
    order = np.random.default_rng(0).permutation(len(test))
    report, shuffled = probe(labelled(), test), probe(labelled(), test.take(order))
    assert shuffled["per_label"] == report["per_label"]
    assert shuffled["ci95"] == pytest.approx(report["ci95"])


@pytest.mark.parametrize(("size", "side"), [(12, 12), (16, 16), (48, 16), (64, 16), (224, 16)])
def test_raw_pixels_are_averaged_to_at_most_sixteen_a_side(size, side):
    images = np.random.default_rng(0).integers(0, 256, (3, size, size)).astype(np.uint8)
    features = raw_pixel_features(images)
    assert features.shape == (3, side * side)
    np.testing.assert_allclose(features.mean(axis=1), images.mean(axis=(1, 2)) / 255, rtol=1e-5)


def test_zero_shot_of_an_exact_encoder_is_one_and_of_a_constant_one_one_half():
    code = codes(100)
    for encoder, expected in ((OracleEncoder(), 1.0), (ConstantEncoder(), 0.5)):
        embeddings = encode_images(encoder, draw(code))
        scores = zero_shot_scores(encoder, embeddings, PROMPTS, ToyVocabulary())
        report = classification.score_report(code.astype(np.int8), scores, np.arange(100), label_names=LABEL_NAMES)
        assert report["macro_auroc"] == expected
        assert report["num_labels_scored"] == len(LABEL_NAMES)


def test_exchanging_positive_and_negative_prompts_turns_zero_shot_round():
    code = codes(100)
    encoder = OracleEncoder()
    swapped = {name: (negative, positive) for name, (positive, negative) in PROMPTS.items()}
    embeddings = encode_images(encoder, draw(code))
    scores = zero_shot_scores(encoder, embeddings, PROMPTS, ToyVocabulary())
    np.testing.assert_allclose(zero_shot_scores(encoder, embeddings, swapped, ToyVocabulary()), -scores)


def test_several_prompts_count_through_their_normalised_mean():
    encoder = OracleEncoder()
    embeddings = encode_images(encoder, draw(codes(10)))
    several = {"a": (SAYINGS[1:4:2], SAYINGS[0:6:2])}
    z = embeddings.astype(float)
    positive = np.array([1, 1, 0, 0, 0, 0, 0, 0]) / np.sqrt(2)
    negative = -np.array([1, 1, 1, 0, 0, 0, 0, 0]) / np.sqrt(3)
    expected = z @ (positive - negative)
    np.testing.assert_allclose(zero_shot_scores(encoder, embeddings, several, ToyVocabulary())[:, 0], expected, atol=1e-6)


def test_a_label_without_prompts_is_asked_for_by_its_name():
    prompts = prompts_for(("edema", "Pleural_Effusion"), {"edema": (("some edema .",), ("none .",))})
    assert prompts["edema"] == (("some edema .",), ("none .",))
    assert prompts["Pleural_Effusion"] == (("pleural effusion .",), ("no pleural effusion .",))


def test_labels_of_the_public_data_sets_are_asked_for_in_words_that_a_report_has() -> None:
    prompts = prompts_for((*nih14.FINDINGS, *mimic.FINDINGS), {})
    assert set(WORDED) <= set(prompts)
    sentences = [sentence for sides in prompts.values() for side in sides for sentence in side]
    assert all(sentence == sentence.lower() and sentence.endswith(" .") and "_" not in sentence for sentence in sentences)
    assert not any("no finding" in sentence for sentence in sentences)
    assert len({sides for label, sides in prompts.items() if label != "Effusion"}) == len(prompts) - 1


class Tabled(OracleEncoder):
    """A text's embedding is the sum of a fixed random row for each of its words."""

    def encode_text(self, words_BL: Tensor) -> Tensor:
        table = torch.randn(ToyVocabulary.vocab_size, 8, generator=torch.Generator().manual_seed(0))
        return nn.functional.normalize((table[words_BL] * (words_BL > 0)[:, :, None]).sum(dim=1), dim=-1)


def loop_score(image: np.ndarray, pair: tuple[tuple[str, ...], tuple[str, ...]]) -> float:
    """Cosine of an image to the mean of the positive prompts less that to the mean of the negative ones."""
    cosines = []
    for side in pair:
        read = [Tabled().encode_text(torch.tensor(ToyVocabulary().encode([text], 64)))[0].tolist() for text in side]
        mean = [sum(column) / len(read) for column in zip(*read, strict=True)]
        length = math.sqrt(sum(value**2 for value in mean))
        cosines.append(sum(a * b / length for a, b in zip(image.tolist(), mean, strict=True)))
    return cosines[0] - cosines[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(8, 30))
def test_zero_shot_is_a_loop_over_prompts_and_scikit_learns_auroc_over_the_known(seed, num_labels, num):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(num, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    prompts = {
        name: tuple(tuple(rng.choice(SAYINGS, rng.integers(1, 4), replace=False).tolist()) for _ in range(2))
        for name in LABEL_NAMES[:num_labels]
    }
    labels = rng.integers(-1, 2, (num, num_labels)).astype(np.int8)
    scores = zero_shot_scores(Tabled(), embeddings, prompts, ToyVocabulary())
    for k, pair in enumerate(prompts.values()):
        np.testing.assert_allclose(scores[:, k], [loop_score(image, pair) for image in embeddings], atol=1e-6)
    report = classification.score_report(labels, scores, np.arange(num), label_names=tuple(prompts), num_bootstrap=0)
    scored = []
    for k, name in enumerate(prompts):
        known = [row for row in range(num) if labels[row, k] >= 0]
        if {0, 1} <= {int(labels[row, k]) for row in known}:
            scored.append(roc_auc_score(labels[known, k], scores[known, k]))
            assert report["per_label"][name] == pytest.approx(scored[-1])
        else:
            assert report["per_label"][name] is None
    assert report["macro_auroc"] == (pytest.approx(np.mean(scored)) if scored else None)
