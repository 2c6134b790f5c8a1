from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_toys import OracleEncoder, ToyVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmix.errors import DataError
from fedmix.evaluation.canaries import canary_report, exposures, text_bits


class Remembers(OracleEncoder):
    """Knows one text: at each place its word is likely, whatever the others are."""

    def __init__(self, text: np.ndarray) -> None:
        super().__init__()
        self.text = torch.from_numpy(text)

    def word_logits(self, words_BL: Tensor, image_BSS: Tensor | None = None) -> Tensor:
        logits_BLV = torch.zeros(*words_BL.shape, ToyVocabulary.vocab_size)
        for place in range(min(words_BL.shape[1], len(self.text))):
            logits_BLV[:, place, self.text[place]] = 5.0
        return logits_BLV


def drawn(num: int, length: int = 6, seed: int = 0) -> list[np.ndarray]:
    ids = np.random.default_rng(seed).integers(4, ToyVocabulary.vocab_size, (num, length))
    return [np.array([2, *row], np.int64) for row in ids]


def test_bits_of_a_text_are_the_sum_over_words_each_hidden_alone() -> None:
    texts = [*drawn(3), *drawn(2, length=9, seed=1)]
    encoder = Remembers(texts[0])
    expected = []
    for ids in texts:
        total = 0.0
        for place in range(1, len(ids)):
            masked = ids.copy()
            masked[place] = ToyVocabulary.mask_id
            chances = encoder.word_logits(torch.from_numpy(masked)[None])[0, place].log_softmax(dim=-1)
            total -= float(chances[ids[place]]) / np.log(2)
        expected.append(total)
    np.testing.assert_allclose(text_bits(encoder, texts, ToyVocabulary(), batch_size=4), expected, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_exposure_is_the_logarithm_of_the_rank_with_ties_shared(planted, candidates):
    found = exposures(np.array(planted, float), np.array(candidates, float))
    for bits, exposure in zip(planted, found, strict=True):
        ranks = [place for place, other in enumerate(sorted([bits, *candidates]), 1) if other == bits]
        assert exposure == pytest.approx(np.log2(len(candidates) + 1) - np.log2(np.mean(ranks)))


def test_a_remembered_canary_has_the_largest_exposure_and_a_strange_one_little() -> None:
    planted = drawn(1)
    others = [*drawn(31, seed=1), *drawn(32, seed=2)]
    report = canary_report(Remembers(planted[0]), planted, others, ToyVocabulary())
    assert report["exposure_bits"] == [report["most_possible_bits"]] == [6.0]
    strange = canary_report(OracleEncoder(), planted, others, ToyVocabulary())
    assert strange["mean_exposure_bits"] == pytest.approx(1, abs=0.05)  # all alike: the middle rank


def test_canaries_without_a_word_or_without_company_are_refused() -> None:
    with pytest.raises(DataError, match="no canary holds a word"):
        text_bits(OracleEncoder(), [np.array([2, 3])], ToyVocabulary())
    with pytest.raises(DataError, match="never used"):
        canary_report(OracleEncoder(), drawn(1), [], ToyVocabulary())
