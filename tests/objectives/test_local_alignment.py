from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.objectives.local import ATTENTION_TEMPERATURE, local_term, sentences
from fedmix.objectives.masking import WordIds

STOP = 9
IDS = WordIds(mask_id=4, special_ids=(0, 1, 2, 3, 4), stop_id=STOP)
TENTH = torch.tensor(0.1)


def parts(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=tiny.generator(seed)), dim=-1)


def test_sentences_by_hand() -> None:
    words = torch.tensor([[2, 5, 6, STOP, 7, STOP], [2, 8, 8, 8, 0, 0]])
    expected = [[[0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]], [[0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]]]
    assert torch.equal(sentences(words, IDS), torch.tensor(expected, dtype=torch.bool))


def test_without_a_full_stop_a_report_is_one_sentence() -> None:
    words = torch.tensor([[2, 5, STOP, 7, 0]])
    found = sentences(words, replace(IDS, stop_id=None))
    assert torch.equal(found, torch.tensor([[[False, True, True, True, False]]]))


def test_every_word_is_of_one_sentence_at_most() -> None:
    words = torch.randint(0, 12, (6, 10), generator=tiny.generator(2))
    found = sentences(words, IDS)
    is_word = (words > 4) & (words != STOP)
    assert torch.equal(found.sum(dim=1) == 1, is_word)


def test_term_equals_a_loop_over_pairs_and_parts() -> None:
    patch, sentence = parts(3, 4, 5), parts(3, 2, 5, seed=1)
    present = torch.tensor([[True, True], [True, False], [True, True]])

    def fit(asking: Tensor, found: Tensor) -> float:
        values = []
        for one in asking:
            attention = (found @ one / ATTENTION_TEMPERATURE).softmax(dim=0)
            values.append(float(F.cosine_similarity(attention @ found, one, dim=0)))
        return sum(values) / len(values)

    total = 0.0
    for direction in (lambda i, j: fit(sentence[j][present[j]], patch[i]), lambda i, j: fit(patch[i], sentence[j][present[j]])):
        scores = torch.tensor([[direction(i, j) / 0.1 for j in range(3)] for i in range(3)])
        for way in (scores, scores.T):
            total += 0.25 * float(F.cross_entropy(way, torch.arange(3), reduction="sum"))
    term = local_term(patch, sentence, present, TENTH)
    assert term.total.item() == pytest.approx(total, rel=1e-4)
    assert term.weight.item() == 3


def test_sentences_that_are_not_there_change_nothing() -> None:
    patch, sentence, present = parts(3, 4, 5), parts(3, 2, 5, seed=1), torch.ones(3, 2, dtype=torch.bool)
    wider = torch.cat([sentence, parts(3, 1, 5, seed=2)], dim=1)
    absent = F.pad(present, (0, 1))
    torch.testing.assert_close(local_term(patch, wider, absent, TENTH).total, local_term(patch, sentence, present, TENTH).total)


def test_one_pair_alone_and_a_report_without_words_give_no_nan() -> None:
    term = local_term(parts(1, 4, 5), parts(1, 1, 5), torch.zeros(1, 1, dtype=torch.bool), TENTH)
    assert term.total == 0


def test_pairs_of_one_patient_are_not_told_apart() -> None:
    """Two pairs that are not compared have nothing to choose from."""
    patch, sentence, present = parts(2, 4, 5), parts(2, 2, 5, seed=1), torch.ones(2, 2, dtype=torch.bool)
    term = local_term(patch, sentence, present, TENTH, compared_BB=torch.eye(2, dtype=torch.bool))
    assert term.total.item() == pytest.approx(0.0, abs=1e-6)


def test_learning_it_brings_pairs_together() -> None:
    """Trained on sentences and patches alone, whole images find their reports: both lie in one space."""
    learner = tiny.learner(local=1.0, hide_image_paired=0.1, hide_text_paired=0.1)
    learner = replace(learner, word_ids=replace(tiny.IDS, stop_id=7))
    optimiser = torch.optim.AdamW(learner.model.parameters(), lr=3e-3)
    batch = tiny.batch("pppp")
    losses = []
    for step in range(60):
        loss = learner.loss(learner.terms(batch, tiny.generator(step)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    assert batch.image is not None
    assert batch.text is not None
    alike = learner.model.encode_image(batch.image) @ learner.model.encode_text(batch.text).T
    assert (alike.argmax(dim=1) == torch.arange(4)).sum() >= 3
