"""Zero-shot with sentences out of reports: which are taken for what, and what they reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_toys import LABEL_NAMES, PROMPTS, ConstantEncoder, OracleEncoder, ToyVocabulary, held_out, write

from fedmix.evaluation.classification import evaluate_zero_shot
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.mined_prompts import MIN_SENTENCES, evaluate_mined_prompts, mined, sentences_of

SENTENCES = (
    "small left pleural effusion.",
    "moderate right effusion.",
    "tiny bilateral effusions.",
    "possible left effusion.",
    "no pleural effusion or pneumothorax.",
    "no left effusion.",
    "evaluate for effusion.",
    "heart size is normal.",
)


def context(encoder: OracleEncoder, **changes: Any) -> EvaluationContext:
    return EvaluationContext(encoder, held_out(**changes), ToyVocabulary(), PROMPTS, EvaluationSettings(num_bootstrap=50))


def test_sentences_say_a_finding_or_deny_it_and_the_rest_is_neither() -> None:
    found = mined(("Pleural Effusion", "pneumothorax_left", "No Finding", "tube"), SENTENCES)
    assert found["Pleural Effusion"] == (SENTENCES[:3], SENTENCES[4:6])
    assert found["pneumothorax_left"] == ((), SENTENCES[4:5])
    assert set(found) == {"Pleural Effusion", "pneumothorax_left", "tube"}


def test_a_label_of_one_side_takes_sentences_on_that_side() -> None:
    found = mined(("effusion_left", "effusion_right"), SENTENCES)
    assert found["effusion_left"] == ((SENTENCES[0], SENTENCES[2]), SENTENCES[4:6])
    assert found["effusion_right"] == (SENTENCES[1:3], SENTENCES[4:5])


def test_a_sentence_that_is_cut_short_is_not_taken() -> None:
    assert sentences_of(["no effusion . mild edema. effusion is", "", "no stop"]) == ["no effusion .", "mild edema."]


def test_an_exact_encoder_is_asked_without_fault_and_a_constant_one_guesses() -> None:
    found = evaluate_mined_prompts(context(OracleEncoder())).values
    assert found["macro_auroc"] == 1.0
    assert (found["gain_over_fixed"], found["gain_over_fixed_ci95"]) == (0.0, [0.0, 0.0])
    assert (found["num_reports"], found["num_test"], found["num_labels_scored"]) == (80, 80, len(LABEL_NAMES))
    assert evaluate_mined_prompts(context(ConstantEncoder())).values["macro_auroc"] == 0.5


def test_labels_are_used_to_score_alone_and_reports_of_test_studies_not_at_all() -> None:
    known = held_out()
    labels, words = known.labels.copy(), list(known.words)
    labels[known.is_probe_train] = -1
    words[80:] = [None] * 80
    assert evaluate_mined_prompts(context(OracleEncoder(), labels=labels, words=words)).values == (
        evaluate_mined_prompts(context(OracleEncoder())).values
    )


def test_too_few_sentences_are_not_enough_data() -> None:
    code = np.zeros((160, 8), bool)
    code[: MIN_SENTENCES - 1, 0] = True
    code[:20, 1] = True
    changes = {"words": write(code), "labels": held_out().labels}
    found = evaluate_mined_prompts(context(OracleEncoder(), **changes)).values
    assert found["per_label"][LABEL_NAMES[0]] is None
    reason = f"not enough data: {MIN_SENTENCES - 1} sentences say it and {81 - MIN_SENTENCES} deny it"
    assert found["not_asked"][LABEL_NAMES[0]].startswith(reason)
    assert found["num_labels_scored"] == 1
    assert (
        found["per_label"][LABEL_NAMES[1]] == evaluate_zero_shot(context(OracleEncoder())).values["per_label"][LABEL_NAMES[1]]
    )
    with pytest.raises(NotEvaluableError, match="no label has 5 sentences that say it"):
        evaluate_mined_prompts(context(OracleEncoder(), words=write(np.zeros((160, 8), bool))))


def test_no_sentence_is_in_what_is_reported() -> None:
    assert "no cardiomegaly" not in str(evaluate_mined_prompts(context(OracleEncoder())))
