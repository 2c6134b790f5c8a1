"""Tuned prompts on an encoder whose answer is known: said and denied begin alike, and can be told apart by context alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import LABEL_NAMES, NUM_LABELS, OracleEncoder, ToyVocabulary, held_out
from torch import Tensor, nn

from fedmix import config
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.prompt_tuning import OPENINGS, evaluate_prompt_tuning, prompt_sides
from fedmix.model.encoder import MixedModel


class Words(ToyVocabulary):
    """Whole words: 3 for every word that is no label, then the labels."""

    def encode(self, texts: Sequence[str], max_words: int) -> list[list[int]]:
        return [[2, *(self._word(word) for word in text.split())][:max_words] for text in texts]

    def _word(self, word: str) -> int:
        return 4 + LABEL_NAMES.index(word) if word in LABEL_NAMES else 3


class Asked(OracleEncoder):
    """A text is its finding's axis, times the sum of all other words there: that says whether it is said or denied."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4 + NUM_LABELS, NUM_LABELS)
        with torch.no_grad():
            self.table.weight[:4] = 0.1
            self.table.weight[4:] = torch.eye(NUM_LABELS)

    def word_vectors(self, words_BL: Tensor) -> Tensor:
        vectors_BLD: Tensor = self.table(words_BL)
        return vectors_BLD

    def encode_vectors(self, vectors_BLD: Tensor, words_BL: Tensor) -> Tensor:
        is_name_BL1 = (words_BL >= 4).unsqueeze(-1)
        axis_BD = (vectors_BLD * is_name_BL1).sum(dim=1)
        others_BD = (vectors_BLD * ~is_name_BL1 * (words_BL > 0).unsqueeze(-1)).sum(dim=1)
        return nn.functional.normalize(axis_BD * others_BD + 1.0, dim=-1)


def context(encoder: OracleEncoder, num_steps: int = 100, **changes: Any) -> EvaluationContext:
    settings = EvaluationSettings(num_bootstrap=20, num_few_train=40, prompt_tune_steps=num_steps)
    return EvaluationContext(encoder, held_out(240, **changes), Words(), {}, settings)


def test_context_learns_to_say_and_to_deny_and_nothing_else_moves() -> None:
    encoder = Asked().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    found = evaluate_prompt_tuning(context(encoder)).values
    for share in ("10_percent", "100_percent"):
        assert found[share]["macro_auroc"] > 0.99
    assert found["1_percent"]["reason"].startswith("not enough data")
    assert found["100_percent"]["gain_over_probe"] == pytest.approx(0.0, abs=0.01)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert encoder.training
    assert evaluate_prompt_tuning(context(Asked())).values == found


def test_before_a_step_this_encoder_takes_what_is_denied_for_said() -> None:
    """So what the tuned prompts reach is learned: the denial begins with a word more, and words add up here."""
    assert evaluate_prompt_tuning(context(Asked(), num_steps=0)).values["100_percent"]["macro_auroc"] < 0.5


def test_the_first_prompts_are_what_the_model_says_of_the_same_words() -> None:
    """The tuned vectors stand where the opening's words stood, so before a step nothing has changed."""
    sizes = config.Model(width=24, depth=1, num_heads=2, embedding=8, decoder_width=8, decoder_heads=2)
    model = MixedModel(sizes, image_size=24, max_words=12, vocabulary=20)
    sides = prompt_sides(model, LABEL_NAMES, Words(), max_words=12, device=torch.device("cpu"))
    assert [side.num_context for side in sides] == [len(opening.split()) for opening in OPENINGS]
    for side in sides:
        with torch.no_grad():
            read = model.encode_vectors(side.vectors_KLD, side.words_KL)
            assert torch.equal(read, model.encode_text(side.words_KL))


def test_padding_is_not_read_in_vectors_either() -> None:
    sizes = config.Model(width=24, depth=1, num_heads=2, embedding=8, decoder_width=8, decoder_heads=2)
    model = MixedModel(sizes, image_size=24, max_words=12, vocabulary=20).eval()
    short, long = torch.tensor([[2, 5, 6]]), torch.tensor([[2, 5, 6, 0, 0]])
    with torch.no_grad():
        vectors = model.word_vectors(long)
        vectors[:, 3:] = 7.0
        torch.testing.assert_close(model.encode_vectors(vectors, long), model.encode_text(short))


def test_an_encoder_that_reads_words_alone_has_a_reason() -> None:
    with pytest.raises(NotEvaluableError, match="reads words alone"):
        evaluate_prompt_tuning(context(OracleEncoder()))


def test_a_label_that_no_study_of_a_draw_teaches_is_guessed() -> None:
    labels = held_out(240).labels.copy()
    labels[:120, 0] = np.where(labels[:120, 0] == 1, -1, 0)
    block = evaluate_prompt_tuning(context(Asked(), labels=labels)).values["100_percent"]
    assert block["mean_labels_guessed"] == 1.0
