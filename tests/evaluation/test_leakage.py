"""The audit on the tiny model: what learnt its studies by heart is found out, what never trained is not."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import tiny
import torch
from evaluation_toys import ConstantEncoder, OracleEncoder, ToyVocabulary, codes, draw, write
from memorised import Same, TinyVocabulary

from fedmix import config
from fedmix.batch import Batch
from fedmix.errors import ConfigError, DataError
from fedmix.evaluation.attack import choosing_half
from fedmix.evaluation.leakage import audit, relinkage_report, update_report
from fedmix.evaluation.membership import AuditSettings, membership_scores, patient_scores
from fedmix.evaluation.subjects import Subjects
from fedmix.federation.local import Assignment, train
from fedmix.model.encoder import MixedModel

NUM = 60  # studies on either side
SETTINGS = AuditSettings(num_draws=3, num_bootstrap=200)


@pytest.fixture(scope="module")
def pairs() -> Batch:
    return tiny.batch("p" * 2 * NUM)


@pytest.fixture(scope="module")
def subjects(pairs: Batch) -> Subjects:
    return Subjects(
        images=(pairs.image * 255).round().to(torch.uint8).numpy(),
        image_row=np.arange(2 * NUM),
        words=[ids[ids != 0].numpy() for ids in pairs.text],
        patient=np.arange(2 * NUM),
        is_member=np.arange(2 * NUM) < NUM,
    )


@pytest.fixture(scope="module")
def overfitted(pairs: Batch) -> MixedModel:
    learner = tiny.learner(mvm=1.0, mlm=1.0, contrast=1.0)
    half = Batch(pairs.image[:NUM], pairs.text[:NUM], pairs.has_image[:NUM], pairs.has_text[:NUM], pairs.patient[:NUM])
    stage = config.Stage(name="by-heart", rounds=1, local_steps=80, optimiser=config.Optimiser(lr=3e-3))
    train(learner, Same(half), Assignment("west", stage, 0, 0))
    return learner.model


def test_a_model_that_learnt_its_studies_by_heart_gives_them_away(overfitted: MixedModel, subjects: Subjects) -> None:
    report = audit(overfitted, subjects, TinyVocabulary(), reference=tiny.model(), settings=SETTINGS)
    membership = report["membership"]
    assert membership["patient"]["auc"] > 0.9
    assert membership["pair"]["auc"] > 0.9
    assert membership["text"]["auc_ci95"][0] > 0.5
    low, high = membership["patient"]["control"]["auc_ci95"]
    assert low < 0.5 < high, "the reference never saw them"
    assert report["relinkage"]["difference_r@1_ci95"][0] > 0.5
    assert report["relinkage"]["control"]["difference_r@1_ci95"][0] < 0.1
    assert report["epsilon"]["lower_bound"] > 0.5
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_without_a_reference_the_same_model_is_still_found_out(overfitted: MixedModel, subjects: Subjects) -> None:
    membership = audit(overfitted, subjects, TinyVocabulary(), settings=SETTINGS)["membership"]
    assert membership["patient"]["auc"] > 0.9
    assert "control" not in membership["patient"]


def test_a_model_that_never_trained_cannot_tell_members_from_others(subjects: Subjects) -> None:
    report = audit(tiny.model(), subjects, TinyVocabulary(), settings=SETTINGS)
    for found in report["membership"].values():
        low, high = found["auc_ci95"]
        assert low < 0.5 < high
    low, high = report["relinkage"]["difference_r@1_ci95"]
    assert low <= 0 <= high
    assert report["epsilon"]["lower_bound"] < 0.5


def test_a_model_is_no_better_than_itself(overfitted: MixedModel, subjects: Subjects) -> None:
    membership = audit(overfitted, subjects, TinyVocabulary(), reference=overfitted, settings=SETTINGS)["membership"]
    assert membership["patient"]["auc"] == 0.5
    assert membership["patient"]["control"]["auc"] > 0.9


def test_an_audit_twice_is_the_same_and_leaves_the_model_as_it_was(overfitted: MixedModel, subjects: Subjects) -> None:
    model = copy.deepcopy(overfitted).train()
    first, again = (audit(model, subjects, TinyVocabulary(), settings=SETTINGS) for _ in range(2))
    assert first == again
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- a site's update


def test_an_update_gives_its_members_and_their_words_away(overfitted: MixedModel, subjects: Subjects) -> None:
    seen = np.unique(np.concatenate(subjects.words_of(np.flatnonzero(subjects.is_member))))
    report = update_report((tiny.model(), overfitted), subjects, TinyVocabulary(), seen, settings=SETTINGS)
    assert report["membership"]["patient"]["auc"] > 0.9
    low, high = report["membership"]["patient"]["control"]["auc_ci95"]
    assert low < 0.5 < high, "the model before the steps saw nobody"
    assert report["words"]["recall"] > 0.9
    still = update_report((overfitted, overfitted), subjects, TinyVocabulary(), seen, settings=SETTINGS)
    assert still["membership"]["patient"]["auc"] == 0.5
    assert still["words"]["num_recovered"] == 0
    assert "words" not in update_report((overfitted, overfitted), subjects, TinyVocabulary(), seen[:0], settings=SETTINGS)


def test_models_of_different_widths_are_no_update(subjects: Subjects) -> None:
    with pytest.raises(DataError, match="two of one run"):
        update_report((tiny.model(width=16), tiny.model()), subjects, TinyVocabulary(), np.arange(9))


# ---- scores


def toys(num: int = 80, **changes: object) -> Subjects:
    code = codes(num)
    parts = {
        "images": draw(code),
        "image_row": np.arange(num),
        "words": write(code),
        "patient": np.arange(num) // 2,
        "is_member": np.arange(num) < num // 2,
    }
    return Subjects(**(parts | changes))


def test_every_kind_of_score_has_a_value_exactly_where_the_study_has_the_kind() -> None:
    subjects = toys()
    image_row = np.where(np.arange(80) % 3 == 0, -1, np.arange(80))
    words = [None if study % 4 == 0 else ids for study, ids in enumerate(subjects.words)]
    scores = membership_scores(OracleEncoder(), toys(image_row=image_row, words=words), ToyVocabulary(), SETTINGS)
    studies = np.arange(80)
    np.testing.assert_array_equal(np.isfinite(scores["image"]), studies % 3 != 0)
    np.testing.assert_array_equal(np.isfinite(scores["text"]), studies % 4 != 0)
    np.testing.assert_array_equal(np.isfinite(scores["pair"]), (studies % 3 != 0) & (studies % 4 != 0))
    assert np.nanmin(scores["pair"]) == pytest.approx(1.0)
    np.testing.assert_allclose(scores["text"][studies % 4 != 0], -np.log2(ToyVocabulary.vocab_size))
    only_texts = toys(images=None, image_row=np.full(80, -1))
    assert set(membership_scores(OracleEncoder(), only_texts, ToyVocabulary(), SETTINGS)) == {"text"}


def test_a_patients_score_is_the_sum_of_standard_scores_over_the_root_of_their_number() -> None:
    chance = np.random.default_rng(0)
    subjects = toys(patient=np.repeat(np.arange(20), 4), is_member=np.arange(80) < 40)
    scores = {"text": chance.normal(3, 2, 80), "image": np.where(chance.random(80) < 0.4, np.nan, chance.normal(size=80))}
    found, is_member = patient_scores(scores, subjects)
    for patient in range(20):
        standard = []
        for values in scores.values():
            others = values[40:][np.isfinite(values[40:])]
            own = values[subjects.patient == patient]
            standard += [(one - others.mean()) / others.std() for one in own if np.isfinite(one)]
        assert found[patient] == pytest.approx(sum(standard) / len(standard) ** 0.5)
        assert is_member[patient] == (patient < 10)


def test_patients_that_are_counted_have_no_say_in_what_is_standard() -> None:
    chance = np.random.default_rng(0)
    subjects = toys(patient=np.repeat(np.arange(40), 2), is_member=np.arange(80) < 40)
    scores = {"text": chance.normal(3, 2, 80), "image": chance.normal(size=80)}
    half = choosing_half(np.arange(40) < 20, 0)
    assert (half[:20].sum(), half[20:].sum()) == (10, 10)
    counted = np.repeat(~half, 2) & ~subjects.is_member
    moved = {name: np.where(counted, 50 + 9 * values, values) for name, values in scores.items()}
    (before, _), (after, _) = (patient_scores(one, subjects, half) for one in (scores, moved))
    uncounted = np.unique(subjects.patient[~counted])
    np.testing.assert_array_equal(before[uncounted], after[uncounted])
    assert (patient_scores(moved, subjects)[0] != patient_scores(scores, subjects)[0])[uncounted].all()


# ---- re-linkage


def test_relinkage_of_an_exact_encoder_is_alike_on_both_sides_and_counts_one_pair_a_patient() -> None:
    report = relinkage_report(OracleEncoder(), toys(), AuditSettings(gallery=30))
    assert (report["num_members"], report["num_non_members"]) == (20, 20)  # forty pairs, two of each patient
    assert report["gallery"] == 20
    assert report["members_r@1"] == report["non_members_r@1"] == 1.0
    assert report["difference_r@1_ci95"] == [0.0, 0.0]


def test_relinkage_by_a_constant_encoder_is_chance() -> None:
    report = relinkage_report(ConstantEncoder(), toys(), SETTINGS)
    assert report["members_r@1"] == pytest.approx(report["chance"]) == pytest.approx(1 / 20)


def test_few_pairs_are_not_enough_data() -> None:
    report = relinkage_report(OracleEncoder(), toys(40), SETTINGS)
    assert report["difference_r@1"] is None
    assert "not enough data: 10 patients" in report["reason"]


# ---- what cannot be audited


def test_wrong_subjects_and_settings_are_refused() -> None:
    with pytest.raises(DataError, match="there are no non-members"):
        toys(is_member=np.ones(80, bool))
    with pytest.raises(DataError, match="1 patients are members and non-members"):
        toys(patient=(np.arange(80) + 1) // 2)
    with pytest.raises(DataError, match="one row for each study"):
        toys(patient=np.arange(79))
    for wrong in ({"num_draws": 0}, {"mask_ratio": 1.0}, {"delta": 1.0}):
        with pytest.raises(ConfigError):
            AuditSettings(**wrong)
