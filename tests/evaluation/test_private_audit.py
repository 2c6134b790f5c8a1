"""The audit finds the members of a model that learnt by heart, and not those of a model that was trained privately.

Both models take the same steps on the same reports through the same code; only clip and noise differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import torch
from memorised import TinyVocabulary
from torch import Generator, Tensor

from fedmix import config
from fedmix.batch import Batch
from fedmix.evaluation.features import Report
from fedmix.evaluation.leakage import audit
from fedmix.evaluation.membership import AuditSettings
from fedmix.evaluation.subjects import Subjects
from fedmix.federation import local, private
from fedmix.model.encoder import MixedModel
from fedmix.privacy.accountant import Steps, account_of

NUM, STEPS, RATE = 40, 200, 0.5  # reports on either side, of as many patients
NOISE, DELTA = 8.0, 1e-3


@dataclass(frozen=True)
class Members:
    """A report of each patient, drawn as the step says."""

    text: Tensor
    rate: float = RATE

    @property
    def num_patients(self) -> int:
        return len(self.text)

    @property
    def expected(self) -> int:
        return round(self.rate * self.num_patients)

    def draw(self, drawn: Tensor, chance: Generator) -> Batch | None:
        has = torch.ones(len(drawn), dtype=torch.bool)
        return Batch(None, self.text[drawn], ~has, has, torch.arange(len(drawn))) if len(drawn) else None


@pytest.fixture(scope="module")
def reports() -> Tensor:
    return tiny.words(2 * NUM)


def trained(reports: Tensor, *, noise: float, clip: float) -> MixedModel:
    """The tiny model after private steps on the first half of the reports."""
    learner = tiny.learner(mlm=1.0)
    wanted = config.Optimiser(kind="adamw", lr=6e-3)
    stage = config.Stage(name="s", rounds=1, local_steps=STEPS, batch_size=30, objectives=learner.objectives, optimiser=wanted)
    settings = config.Privacy(mode="dp", noise_multiplier=1.0, clip=clip)
    private.train(
        learner,
        Members(reports[:NUM]),
        local.Assignment("west", stage, 0, 0),
        "text",
        private.Protection(settings, noise, tiny.generator(7)),
        start=local.Start({}, {}),
    )
    return learner.model


def audited(model: MixedModel, reports: Tensor) -> Report:
    subjects = Subjects(
        images=None,
        image_row=np.full(2 * NUM, -1),
        words=[ids[ids != 0].numpy() for ids in reports],
        patient=np.arange(2 * NUM),
        is_member=np.arange(2 * NUM) < NUM,
    )
    return audit(model, subjects, TinyVocabulary(), reference=tiny.model(), settings=AuditSettings(num_bootstrap=200))


def test_the_audit_separates_a_model_that_learnt_by_heart_from_a_private_one_of_the_same_members(reports: Tensor) -> None:
    by_heart = audited(trained(reports, noise=0.0, clip=1e6), reports)
    assert by_heart["membership"]["patient"]["auc"] > 0.9
    assert by_heart["epsilon"]["lower_bound"] > 0.5
    protected = audited(trained(reports, noise=NOISE, clip=1.0), reports)
    found = protected["membership"]["patient"]
    assert found["auc"] < 0.6
    assert found["auc_ci95"][0] < 0.5
    accounted = account_of([Steps(NOISE, RATE, STEPS)], DELTA).epsilon
    assert protected["epsilon"]["lower_bound"] <= accounted < 3
