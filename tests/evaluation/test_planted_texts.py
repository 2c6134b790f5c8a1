"""Planted texts and pictures: ranks are counted right, and a model that was trained on them is told from one that was not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from evaluation_toys import OracleEncoder, ToyVocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import Same
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedmix import config
from fedmix.batch import Batch
from fedmix.data.planted import Plan
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import DataError
from fedmix.evaluation.canaries import CHANCE_BITS, canary_report, exposures, planted_report, text_bits
from fedmix.evaluation.features import Report
from fedmix.evaluation.membership import AuditSettings
from fedmix.federation.local import Assignment, train
from fedmix.model.encoder import MixedModel
from fedmix.objectives.masking import WordIds

TOKENIZER = Tokenizer.load()


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


def test_a_remembered_text_has_the_largest_exposure_and_a_strange_one_little() -> None:
    planted = drawn(1)
    others = [*drawn(31, seed=1), *drawn(32, seed=2)]
    bits = text_bits(Remembers(planted[0]), [*planted, *others], ToyVocabulary())
    report = canary_report(bits[:1], bits[1:], np.array([4]))
    assert report["by_times"] == {"4": report["all"]}
    assert report["all"]["exposure_bits"] == [report["most_possible_bits"]] == [6.0]
    bits = text_bits(OracleEncoder(), [*planted, *others], ToyVocabulary())
    strange = canary_report(bits[:1], bits[1:], np.array([4]))
    assert strange["all"]["mean_exposure_bits"] == pytest.approx(1, abs=0.05)  # all alike: the middle rank


def test_the_p_value_of_scores_that_know_nothing_is_below_a_level_as_often_as_the_level_says() -> None:
    rng = np.random.default_rng(0)
    reports = [canary_report(rng.normal(size=8), rng.normal(size=255), np.ones(8, int)) for _ in range(400)]
    p_values = np.array([report["all"]["p_value"] for report in reports])
    assert 0.03 <= (p_values < 0.05).mean() <= 0.075
    assert 0.45 <= (p_values < 0.5).mean() <= 0.55
    assert np.mean([report["all"]["mean_exposure_bits"] for report in reports]) == pytest.approx(CHANCE_BITS, abs=0.05)


# ---- a model that was trained on a shard of canaries


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(seed=0, tokenizer=TOKENIZER.fingerprint, num_words=8, image_size=tiny.IMAGE_SIZE, each=4)


@pytest.fixture(scope="module")
def overfitted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> MixedModel:
    path = tmp_path_factory.mktemp("canaries") / "shard"
    plan.plant(path, tokenizer=TOKENIZER, key=bytes(32), max_words=tiny.MAX_WORDS)
    shard = Shard.open(path)
    text = pad_sequence([torch.from_numpy(shard.words(study)) for study in range(len(shard))], batch_first=True)
    has = torch.ones(len(shard), dtype=torch.bool)
    everybody = Batch(torch.from_numpy(np.array(shard.images)) / 255, text, has, has, torch.arange(len(shard)))
    ids = WordIds(mask_id=TOKENIZER.mask_id, special_ids=tuple(sorted(TOKENIZER.special_ids)))
    learner = replace(tiny.learner(mvm=1.0, mlm=1.0), model=tiny.model(vocabulary=TOKENIZER.vocab_size), word_ids=ids)
    stage = config.Stage(name="by-heart", rounds=1, local_steps=60, optimiser=config.Optimiser(lr=3e-3))
    train(learner, Same(everybody), Assignment("west", stage, 0, 0))
    return learner.model


def exposed(model: MixedModel, plan: Plan) -> Report:
    return planted_report(model, plan, TOKENIZER, settings=AuditSettings(num_draws=2), num_candidates=127)


def test_canaries_that_were_planted_often_are_exposed_and_others_of_the_same_kind_are_not(
    overfitted: MixedModel, plan: Plan
) -> None:
    report = exposed(overfitted, plan)
    assert report["texts"]["by_times"]["8"]["mean_exposure_bits"] > 6  # of at most 7
    once, often = (report["images"]["by_times"][times]["mean_exposure_bits"] for times in ("1", "8"))
    assert often > max(once, 3)
    assert report["images"]["psnr_db"] > report["images"]["candidates_psnr_db"]
    assert max(found["all"]["p_value"] for found in report.values()) < 1e-3
    never = exposed(overfitted, plan.model_copy(update={"seed": 1}))
    for found in never.values():
        assert found["all"]["mean_exposure_bits"] < 2.2
        assert found["all"]["p_value"] > 0.05


def test_a_plan_of_one_kind_is_measured_in_that_kind_and_of_another_size_is_refused(plan: Plan) -> None:
    model = tiny.model(vocabulary=TOKENIZER.vocab_size)
    assert set(exposed(model, plan.model_copy(update={"num_words": 0}))) == {"images"}
    assert set(exposed(model, plan.model_copy(update={"image_size": 0}))) == {"texts"}
    with pytest.raises(DataError, match="planted for another model"):
        exposed(model, plan.model_copy(update={"image_size": 64}))


def test_canaries_without_a_word_or_without_company_are_refused() -> None:
    with pytest.raises(DataError, match="no canary holds a word"):
        text_bits(OracleEncoder(), [np.array([2, 3])], ToyVocabulary())
    with pytest.raises(DataError, match="never used"):
        canary_report(np.zeros(1), np.zeros(0), np.ones(1, int))
