"""Fine-tuning of an encoder that looks at the wrong pixels: what it learns, what it leaves alone, what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import NUM_LABELS, OracleEncoder, ToyVocabulary, held_out
from torch import Tensor, nn

from fedmix.evaluation.classification import image_probe
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.fine_tuning import evaluate_fine_tuning, fine_tuned, predicted
from fedmix.evaluation.label_shares import evaluate_label_shares, probe_by_share


class LooksAside(OracleEncoder):
    """Its features are pixels that say nothing, until its weights are moved to the row with the code."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Linear(2 * NUM_LABELS, NUM_LABELS)
        with torch.no_grad():
            self.look.bias.zero_()
            self.look.weight.copy_(torch.cat([torch.zeros(NUM_LABELS, NUM_LABELS), 0.1 * torch.eye(NUM_LABELS)], dim=1))
        self.unread = nn.Linear(3, 3)  # a part that images do not pass

    def image_features(self, image_BSS: Tensor) -> Tensor:
        features_BF: Tensor = self.look(torch.cat([image_BSS[:, 0, :NUM_LABELS], image_BSS[:, 5, :NUM_LABELS]], dim=1))
        return features_BF


def context(encoder: OracleEncoder, num: int = 240, **changes: Any) -> EvaluationContext:
    settings = EvaluationSettings(num_bootstrap=20, num_few_train=40, fine_tune_steps=100)
    return EvaluationContext(encoder, held_out(num, **changes), ToyVocabulary(), {}, settings)


@pytest.fixture(scope="module")
def asked() -> EvaluationContext:
    return context(LooksAside())


@pytest.fixture(scope="module")
def found(asked: EvaluationContext) -> dict[str, Any]:
    return evaluate_fine_tuning(asked).values


def test_it_learns_what_the_frozen_features_do_not_hold(found: dict[str, Any]) -> None:
    whole = found["100_percent"]
    assert whole["macro_auroc"] > 0.9
    assert whole["macro_auroc"] - whole["gain_over_probe"] < 0.65
    assert whole["gain_over_probe_ci95"][0] > 0.2
    assert whole["num_train"] == 120


def test_it_stands_beside_the_probe_on_the_same_draws(asked: EvaluationContext, found: dict[str, Any]) -> None:
    probe = evaluate_label_shares(asked).values
    for share, block in found.items():
        assert block["num_train"] == probe[share]["num_train"]
    few = found["10_percent"]
    assert few["gain_over_probe"] == pytest.approx(few["macro_auroc"] - probe["10_percent"]["macro_auroc"])
    assert found["1_percent"]["reason"] == probe["1_percent"]["reason"]
    assert found["1_percent"]["macro_auroc"] is None


def test_the_encoder_is_the_same_to_the_bit_afterwards() -> None:
    encoder = LooksAside().train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    evaluate_fine_tuning(context(encoder))
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in encoder.parameters())
    assert encoder.training
    assert torch.equal(torch.get_rng_state(), state)


def test_the_same_seed_gives_the_same_report(found: dict[str, Any]) -> None:
    assert evaluate_fine_tuning(context(LooksAside())).values == found


def test_it_begins_as_the_linear_probe_and_is_one_if_it_takes_no_step() -> None:
    asked = context(LooksAside())
    train, test = asked.probe_studies(image=True), asked.test_studies(image=True, label=True)
    probe, held = image_probe(asked), asked.held_out
    labels = held.labels_of(train)
    model = fine_tuned(asked.encoder, probe.linear, held.images_of(train), labels, num_steps=0)
    np.testing.assert_allclose(predicted(model, held.images_of(test), batch_size=7), probe.scores, atol=1e-4)
    assert probe_by_share(asked)["100_percent"][0] is probe.scores


def test_unknown_labels_are_not_learnt_from() -> None:
    """Where every known label of a finding is absent, the finding is guessed; unknown ones do not count as absent."""
    labels = held_out(240).labels.copy()
    labels[:120, 0] = np.where(labels[:120, 0] == 1, -1, 0)
    block = evaluate_fine_tuning(context(LooksAside(), labels=labels)).values["100_percent"]
    assert block["mean_labels_guessed"] == 1.0


def test_an_encoder_without_weights_has_a_reason() -> None:
    class Weightless:
        image_size, patch_size = 24, 8

        def image_features(self, image_BSS: Tensor) -> Tensor:
            return image_BSS[:, 0, :NUM_LABELS]

    with pytest.raises(NotEvaluableError, match="no weights to train"):
        evaluate_fine_tuning(context(Weightless()))  # type: ignore[arg-type]
