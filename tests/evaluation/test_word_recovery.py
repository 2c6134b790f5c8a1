from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import precision_score, recall_score

from fedmix import config
from fedmix.batch import Batch
from fedmix.errors import DataError
from fedmix.evaluation.word_recovery import recovered_words, recovery_report, row_changes
from fedmix.federation.local import Assignment, train

EMBEDDING = "embed_text.word.weight"
SPECIAL = frozenset(range(tiny.FIRST_WORD))


class Reports:
    """Three reports a step that use the words up to 24 and no others."""

    def batch(self, step: int) -> Batch:
        batch = tiny.batch("ttt", seed=step)
        few = torch.where(batch.text >= tiny.FIRST_WORD, tiny.FIRST_WORD + batch.text % 20, batch.text)
        return Batch(None, few, batch.has_image, batch.has_text, batch.patient)


@pytest.mark.parametrize("optimiser", [{"weight_decay": 0.3}, {"weight_decay": 0.0}, {"kind": "adamw", "lr": 1e-4}])
def test_a_real_update_gives_a_sites_words_away_whatever_weight_decay_does(optimiser: dict[str, float]) -> None:
    learner = tiny.learner(mlm=1.0)
    base = tiny.parameters_of(learner.model)[EMBEDDING].numpy()
    stage = config.Stage(name="texts", rounds=1, local_steps=6, optimiser=config.Optimiser(**optimiser))
    update, _ = train(learner, Reports(), Assignment("south", stage, 0, 0))
    seen = np.unique(torch.cat([Reports().batch(step).text.flatten() for step in range(6)]).numpy())
    report = recovery_report(update.deltas[EMBEDDING].numpy(), base, seen, SPECIAL)
    assert report["average_precision"] > 0.99
    # A word that was always the hidden one was never read.
    assert report["precision"] == 1.0
    assert report["recall"] >= 0.9
    assert report["chance"] < 0.5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1))
def test_precision_and_recall_are_sklearns(seed, share):
    rng = np.random.default_rng(seed)
    base, moved = rng.normal(size=(30, 4)), rng.random(30) < share
    delta = -0.01 * base + moved[:, None] * rng.normal(size=(30, 4))
    seen = np.unique(rng.integers(2, 30, 12))
    report = recovery_report(delta, base, seen, frozenset({0, 1}))
    found = np.isin(np.arange(30), recovered_words(np.where(np.arange(30) > 1, row_changes(delta, base), 0)))[2:]
    truth = np.isin(np.arange(30), seen)[2:]
    assert report["recall"] == pytest.approx(recall_score(truth, found))
    assert (report["precision"] or 0.0) == pytest.approx(precision_score(truth, found, zero_division=0))


def test_decay_alone_is_no_change_and_a_still_embedding_tells_nothing() -> None:
    base = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    np.testing.assert_allclose(row_changes(-0.05 * base, base), 0, atol=1e-6)
    assert len(recovered_words(np.zeros(20))) == 0
    report = recovery_report(np.zeros((20, 8)), base, np.array([3, 4]), frozenset())
    assert (report["precision"], report["recall"]) == (None, 0.0)
    assert report["average_precision"] == pytest.approx(report["chance"])


def test_every_word_is_recovered_where_a_site_used_the_whole_vocabulary() -> None:
    rng = np.random.default_rng(0)
    report = recovery_report(rng.normal(size=(20, 8)), rng.normal(size=(20, 8)), np.arange(20), frozenset())
    assert (report["precision"], report["recall"]) == (1.0, 1.0)


def test_rows_that_do_not_fit_and_reports_without_words_are_refused() -> None:
    with pytest.raises(DataError, match="give the same rows"):
        recovery_report(np.zeros((3, 2)), np.zeros((4, 2)), np.array([1]), frozenset())
    with pytest.raises(DataError, match="nothing to recover"):
        recovery_report(np.zeros((3, 2)), np.zeros((3, 2)), np.array([0]), frozenset({0}))
