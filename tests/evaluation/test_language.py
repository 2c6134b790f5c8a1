from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from evaluation_toys import OracleEncoder, ToyVocabulary, codes, draw, held_out, write
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from torch import Tensor

from fedmix.evaluation import language
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.language import (
    bits_per_token,
    evaluate_language,
    hidden_words,
    score_words,
    unigram_scores,
    word_report,
)

UNIFORM_BITS = np.log2(ToyVocabulary.vocab_size)


def context(encoder, **changes) -> EvaluationContext:
    settings = EvaluationSettings(**({"num_bootstrap": 20} | changes.pop("settings", {})))
    return EvaluationContext(encoder, held_out(**changes), ToyVocabulary(), {}, settings)


def texts(*lengths: int) -> list[np.ndarray]:
    return [np.array([2, *range(4, 4 + length)], np.int64) for length in lengths]


class ByPosition(OracleEncoder):
    """Fixed random scores for each pair of a place and a word shown there: it depends on nothing else."""

    def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
        table = torch.randn(40, 50, ToyVocabulary.vocab_size, generator=torch.Generator().manual_seed(0))
        return table[torch.arange(words_BL.shape[1]), words_BL]


@pytest.mark.parametrize(("length", "num_hidden"), [(1, 1), (3, 1), (10, 2), (16, 2), (13, 2)])
def test_fifteen_percent_of_the_words_are_hidden_and_at_least_one(length, num_hidden):
    for is_hidden in hidden_words(texts(*[length] * 20), frozenset(range(4)), mask_ratio=0.15, seed=0):
        assert is_hidden.sum() == num_hidden


def test_special_ids_are_never_hidden():
    words = [np.array([2, 3, 5, 3, 3]), np.array([2, 3, 3])]
    hidden = hidden_words(words, frozenset(range(4)), mask_ratio=0.9, seed=0)
    assert hidden[0].tolist() == [False, False, True, False, False]
    assert not hidden[1].any()


def test_hidden_words_are_fixed_by_the_seed():
    words = write(codes(50))
    first, again, other = (hidden_words(words, frozenset(range(4)), mask_ratio=0.3, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_an_encoder_without_a_clue_needs_the_bits_of_the_vocabulary():
    report = evaluate_language(context(OracleEncoder())).values
    assert report["bits_per_token"] == pytest.approx(UNIFORM_BITS)
    assert report["ci95"] == pytest.approx([UNIFORM_BITS, UNIFORM_BITS])
    assert report["num_tokens"] == report["num_texts"] == 80  # 15 % of eight words is one


def test_an_encoder_that_reads_the_image_saves_every_bit():
    report = evaluate_language(context(OracleEncoder())).values["with_image"]
    assert report["bits_per_token"] == pytest.approx(0.0, abs=1e-6)
    assert report["top1"] == 1.0
    assert report["bits_saved"] == pytest.approx(UNIFORM_BITS)


def test_scores_equal_a_loop_over_single_texts():
    words = texts(3, 16, 7, 1, 9)
    hidden = hidden_words(words, frozenset(range(4)), mask_ratio=0.3, seed=0)
    encoder = ByPosition()
    scores = score_words(encoder, words, hidden, vocabulary=ToyVocabulary(), batch_size=2)
    for i, (ids, is_hidden) in enumerate(zip(words, hidden, strict=True)):
        shown = torch.from_numpy(np.where(is_hidden, 1, ids))[None]
        log_p = encoder.word_logits(shown)[0].log_softmax(dim=-1).numpy()
        places = np.flatnonzero(is_hidden)
        assert scores.bits[i] == pytest.approx(-log_p[places, ids[places]].sum() / np.log(2), rel=1e-5)
        assert scores.num_right[i] == (log_p[places].argmax(axis=1) == ids[places]).sum()
        assert scores.num_hidden[i] == len(places)


def test_images_stay_with_their_texts_when_batches_are_sorted_by_length():
    code = codes(30)
    words = [ids[: 3 + i % 6] for i, ids in enumerate(write(code))]
    hidden = hidden_words(words, frozenset(range(4)), mask_ratio=0.15, seed=0)
    scores = score_words(OracleEncoder(), words, hidden, draw(code), vocabulary=ToyVocabulary(), batch_size=4)
    assert scores.bits == pytest.approx(np.zeros(30), abs=1e-6)


def test_large_vocabularies_are_scored_in_smaller_batches(monkeypatch):
    words = write(codes(20))
    hidden = hidden_words(words, frozenset(range(4)), mask_ratio=0.15, seed=0)
    sizes: list[int] = []

    class Counting(ByPosition):
        def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
            sizes.append(len(words_BL))
            return super().word_logits(words_BL)

    whole = score_words(Counting(), words, hidden, vocabulary=ToyVocabulary())
    monkeypatch.setattr(language, "MAX_LOGITS", 3 * 9 * ToyVocabulary.vocab_size)
    parts = score_words(Counting(), words, hidden, vocabulary=ToyVocabulary())
    assert sizes == [20, 3, 3, 3, 3, 3, 3, 2]
    np.testing.assert_allclose(parts.bits, whole.bits, rtol=1e-6)


def test_the_unigram_by_hand():
    known = [np.array([2, 4, 4, 4, 5])]  # of 16 words: 4 counts 3 + 1, 5 counts 1 + 1, fourteen others 0 + 1
    words = [np.array([2, 4, 6])]
    hidden = [np.array([False, True, True])]
    scores = unigram_scores(words, hidden, known, vocabulary=ToyVocabulary())
    assert scores.bits[0] == pytest.approx(-np.log2(4 / 20) - np.log2(1 / 20))
    assert scores.num_right[0] == 1


def test_the_unigram_without_reports_to_count_is_uniform_over_words():
    words, hidden = [np.array([2, 4])], [np.array([False, True])]
    scores = unigram_scores(words, hidden, [], vocabulary=ToyVocabulary())
    assert scores.bits[0] == pytest.approx(np.log2(16))


def test_long_reports_weigh_by_their_hidden_words():
    words = [np.tile(ids, 1 + i % 3) for i, ids in enumerate(write(codes(160)))]
    report = evaluate_language(context(ByPosition(), words=words, images=None, mean_image=None)).values
    hidden = hidden_words(words[80:], ToyVocabulary.special_ids, mask_ratio=0.15, seed=0)
    scores = score_words(ByPosition(), words[80:], hidden, vocabulary=ToyVocabulary())
    assert report["bits_per_token"] == pytest.approx(scores.bits.sum() / scores.num_hidden.sum())


def test_without_images_that_part_is_skipped_with_a_reason():
    findings = evaluate_language(context(OracleEncoder(), images=None, mean_image=None))
    assert "with_image" not in findings.values
    assert "image" in findings.skipped["with_image"]


def test_reports_without_a_word_to_hide_cannot_be_scored():
    with pytest.raises(NotEvaluableError, match="could be hidden"):
        evaluate_language(context(OracleEncoder(), words=[np.array([2, 3])] * 160))


def test_the_learning_curve_number_is_the_reports():
    assert bits_per_token(context(ByPosition())) == evaluate_language(context(ByPosition())).values["bits_per_token"]


def some_texts(seed: int, num: int) -> list[np.ndarray]:
    """Texts of up to twelve words, some special; the first has a word that can be hidden."""
    rng = np.random.default_rng(seed)
    rest = [rng.integers(2, ToyVocabulary.vocab_size, rng.integers(1, 13)) for _ in range(num)]
    return [np.array([2, 4, 5]), *rest]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.floats(0.05, 0.95), st.integers(1, 9))
def test_bits_per_token_are_scikit_learns_log_loss_over_all_hidden_words(seed, num, mask_ratio, batch_size):
    words = some_texts(seed, num)
    hidden = hidden_words(words, ToyVocabulary.special_ids, mask_ratio=mask_ratio, seed=seed)
    scores = score_words(ByPosition(), words, hidden, vocabulary=ToyVocabulary(), batch_size=batch_size)
    said, truth = [], []
    for ids, is_hidden in zip(words, hidden, strict=True):
        shown = torch.from_numpy(np.where(is_hidden, ToyVocabulary.mask_id, ids))[None]
        said.append(ByPosition().word_logits(shown)[0].double().softmax(dim=-1).numpy()[is_hidden])
        truth.append(ids[is_hidden])
    said_NV, truth_N = np.concatenate(said), np.concatenate(truth)
    report = word_report(scores, np.zeros((0, len(words))))
    expected = log_loss(truth_N, said_NV, labels=np.arange(ToyVocabulary.vocab_size)) / np.log(2)
    assert report["bits_per_token"] == pytest.approx(expected, rel=1e-5)
    assert report["top1"] == pytest.approx(accuracy_score(truth_N, said_NV.argmax(axis=1)))
    assert report["num_tokens"] == len(truth_N)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 8), st.integers(0, 6))
def test_the_unigram_is_a_loop_over_counted_words(seed, num, num_known):
    words, known = some_texts(seed, num), some_texts(seed + 1, num_known)
    hidden = hidden_words(words, ToyVocabulary.special_ids, mask_ratio=0.4, seed=seed)
    scores = unigram_scores(words, hidden, known, vocabulary=ToyVocabulary())
    counts = Counter(dict.fromkeys(range(4, ToyVocabulary.vocab_size), 1))
    counts.update(int(number) for ids in known for number in ids if number >= 4)
    commonest = min(number for number, count in counts.items() if count == max(counts.values()))
    for i, (ids, is_hidden) in enumerate(zip(words, hidden, strict=True)):
        truth = [int(number) for number in ids[is_hidden]]
        assert scores.bits[i] == pytest.approx(sum(math.log2(counts.total() / counts[number]) for number in truth))
        assert (scores.num_right[i], scores.num_hidden[i]) == (truth.count(commonest), len(truth))
