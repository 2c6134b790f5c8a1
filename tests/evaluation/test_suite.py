from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import PROMPTS, ConstantEncoder, DivergedEncoder, OracleEncoder, ToyVocabulary, held_out

from fedmix.evaluation import retrieval, suite
from fedmix.evaluation.features import EvaluationContext, Findings
from fedmix.evaluation.suite import Evaluation, EvaluationSettings, evaluate, quick

SETTINGS = EvaluationSettings(num_bootstrap=20, num_few_train=40)
CLASSIFICATION = {place for place in suite.TASKS if place.startswith("classification")} - suite.ASKED.keys()


def run(encoder: OracleEncoder, **changes: Any) -> Evaluation:
    return evaluate(encoder, held_out(**changes), tokenizer=ToyVocabulary(), settings=SETTINGS, prompts=PROMPTS)


@pytest.fixture(scope="module")
def oracle() -> Evaluation:
    return run(OracleEncoder())


@pytest.fixture(scope="module")
def oracle_report(oracle: Evaluation) -> dict[str, Any]:
    return oracle.as_report()


def floats(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        for item in tree.values():
            yield from floats(item)
    elif isinstance(tree, list):
        for item in tree:
            yield from floats(item)
    elif isinstance(tree, float):
        yield tree


def test_the_report_has_the_layout_of_report_json(oracle_report):
    assert set(oracle_report) == {"classification", "retrieval", "regeneration", "language", "skipped"}
    for name in ("linear_probe", "raw_pixels", "zero_shot", "text_probe"):
        part = oracle_report["classification"][name]
        assert set(part) >= {"macro_auroc", "ci95", "per_label", "num_train", "num_test"}
        assert len(part["ci95"]) == 2
    for name in ("image_to_text", "text_to_image"):
        assert set(oracle_report["retrieval"][name]) >= {"r@1", "r@5", "r@10", "gallery", "label_precision@10"}
    regeneration = oracle_report["regeneration"]
    assert set(regeneration) >= {"psnr_db", "ssim", "mask_ratio", "with_report", "baselines"}
    for part in (regeneration["with_report"], *regeneration["baselines"].values()):
        assert set(part) >= {"psnr_db", "ssim"}
    assert set(regeneration["baselines"]) >= {"mean_image", "mean_image_fitted", "interpolation"}
    assert set(oracle_report["language"]) >= {"bits_per_token", "top1", "with_image"}
    assert oracle_report["skipped"] == {}


def test_the_report_is_plain_json_without_nan(oracle_report):
    assert json.loads(json.dumps(oracle_report, allow_nan=False)) == oracle_report


def test_an_exact_encoder_solves_every_task(oracle_report):
    for name in ("linear_probe", "zero_shot", "text_probe"):
        assert oracle_report["classification"][name]["macro_auroc"] == 1.0
    assert oracle_report["retrieval"]["image_to_text"]["r@1"] == 1.0
    assert oracle_report["retrieval"]["text_to_image"]["r@1"] == 1.0
    assert oracle_report["regeneration"]["ssim"] == pytest.approx(1.0)
    assert oracle_report["language"]["with_image"]["top1"] == 1.0


def test_a_constant_encoder_is_at_chance_everywhere():
    report = run(ConstantEncoder()).as_report()
    for name in ("linear_probe", "zero_shot", "text_probe"):
        assert report["classification"][name]["macro_auroc"] == 0.5
    assert report["retrieval"]["image_to_text"]["r@10"] == pytest.approx(10 / 80)
    assert report["regeneration"]["gain_over_best_baseline_db"] < 0


def test_the_same_evaluation_twice_is_the_same_and_leaves_the_encoder_training(oracle_report):
    encoder = OracleEncoder().train()
    state = torch.get_rng_state()
    assert run(encoder).as_report() == oracle_report
    assert encoder.training
    assert encoder.scale.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_examples_hold_the_pictures_of_the_report(oracle):
    examples = oracle.examples
    assert set(examples) == {"retrieval", "regeneration"}
    assert len(examples["retrieval"]) == len(examples["regeneration"].original) == SETTINGS.num_examples


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        (
            {"images": None, "mean_image": None},
            {
                "classification/linear_probe",
                "classification/few_label_probe",
                "classification/label_shares",
                "classification/subgroups",
                "classification/calibration",
                "classification/raw_pixels",
                "classification/few_label_raw_pixels",
                "classification/zero_shot",
                "classification/mined_prompts",
                "classification/triggers",
                "retrieval",
                "regeneration",
                "language/with_image",
            },
        ),
        (
            {"words": None},
            {
                "classification/mined_prompts",
                "classification/text_probe",
                "retrieval",
                "regeneration/with_report",
                "language",
            },
        ),
        ({"labels": None, "label_names": ()}, CLASSIFICATION),
        ({"is_probe_train": np.zeros(160, bool)}, CLASSIFICATION - {"classification/zero_shot", "classification/triggers"}),
    ],
)
def test_what_the_held_out_set_lacks_is_skipped_with_a_reason(changes, left_out):
    report = run(OracleEncoder(), **changes).as_report()
    assert set(report["skipped"]) == left_out
    assert all(report["skipped"].values())
    for place in left_out:
        branch: Any = report
        for part in place.split("/"):
            branch = branch.get(part, {})
        assert branch == {}


def test_images_and_reports_of_different_studies_are_no_pairs():
    words = [ids if i % 2 else None for i, ids in enumerate(held_out().words)]
    image_row = np.where(np.arange(160) % 2 == 0, np.arange(160), -1)
    report = run(OracleEncoder(), words=words, image_row=image_row).as_report()
    assert set(report["skipped"]) == {"retrieval", "regeneration/with_report", "language/with_image"}


def test_a_diverged_encoder_gives_a_report_that_says_so():
    report = run(DivergedEncoder()).as_report()
    reasons = report["skipped"]
    assert {"classification/linear_probe", "classification/zero_shot", "retrieval", "regeneration", "language"} <= set(reasons)
    assert all("finite" in reasons[place] for place in reasons)
    json.dumps(report, allow_nan=False)


def test_numbers_that_are_not_finite_become_null_with_a_reason():
    evaluation = Evaluation(
        values={"a/b": {"x": float("nan"), "fine": 1.0, "deep": {"y": float("inf")}, "both": [1.0, float("nan")]}},
        examples={},
        skipped={},
        seconds={},
    )
    assert evaluation.as_report()["a"]["b"] == {
        "x": None,
        "x_reason": "not a finite number",
        "fine": 1.0,
        "deep": {"y": None, "y_reason": "not a finite number"},
        "both": [1.0, None],
    }


def test_progress_names_each_task_before_it_starts(monkeypatch):
    monkeypatch.setattr(suite, "TASKS", {"first/task": lambda context: Findings({}), "second": retrieval.evaluate_retrieval})
    heard: list[tuple[str, int, int]] = []
    evaluate(
        OracleEncoder(),
        held_out(),
        tokenizer=ToyVocabulary(),
        settings=SETTINGS,
        prompts=PROMPTS,
        on_progress=lambda *event: heard.append(event),
    )
    assert heard == [("first/task", 0, 2), ("second", 1, 2), ("done", 2, 2)]


def test_a_new_task_is_one_line(monkeypatch):
    def count_studies(context: EvaluationContext) -> Findings:
        return Findings({"num_studies": len(context.held_out)})

    monkeypatch.setattr(suite, "TASKS", {"counting/studies": count_studies})
    assert run(OracleEncoder()).as_report()["counting"] == {"studies": {"num_studies": 160}}


def test_the_quick_numbers_have_the_names_of_the_learning_curves():
    numbers = quick(OracleEncoder(), held_out(), tokenizer=ToyVocabulary(), prompts=PROMPTS)
    assert set(numbers) == {"zero_shot/macro_auroc", "retrieval/r@10", "regeneration/psnr_db", "language/bits_per_token"}
    assert numbers["zero_shot/macro_auroc"] == 1.0
    assert numbers["retrieval/r@10"] == 1.0
    assert all(isinstance(value, float) for value in numbers.values())


def test_the_quick_numbers_leave_out_what_cannot_be_computed():
    texts_only = held_out(images=None, mean_image=None)
    numbers = quick(OracleEncoder(), texts_only, tokenizer=ToyVocabulary(), prompts=PROMPTS)
    assert set(numbers) == {"language/bits_per_token"}
    assert quick(DivergedEncoder(), held_out(), tokenizer=ToyVocabulary(), prompts=PROMPTS) == {}


def test_the_quick_numbers_look_at_a_fixed_part_of_the_test():
    class Counting(OracleEncoder):
        num_images = 0

        def encode_image(self, image_BSS: torch.Tensor) -> torch.Tensor:
            self.num_images += len(image_BSS)
            return super().encode_image(image_BSS)

    encoder = Counting()
    first, again = (quick(encoder, held_out(), tokenizer=ToyVocabulary(), prompts=PROMPTS, num_studies=30) for _ in range(2))
    assert first == again
    assert encoder.num_images == 60


@pytest.mark.parametrize(
    ("trained_on", "missing"),
    [
        (
            ("mvm",),
            {
                "classification/zero_shot",
                "classification/mined_prompts",
                "classification/triggers",
                "retrieval",
                "language",
            },
        ),
        (("contrast",), {"regeneration", "language"}),
        (("mlm", "semantic"), {"regeneration"}),
        ((), set()),
        (None, set()),
    ],
)
def test_what_a_model_has_not_learnt_has_no_number_and_the_reason(
    trained_on: tuple[str, ...] | None, missing: set[str]
) -> None:
    """A model that learnt nothing at all is measured everywhere: it is the floor. So is one of which nobody knows."""
    settings = replace(SETTINGS, trained_on=trained_on)
    found = evaluate(OracleEncoder(), held_out(), tokenizer=ToyVocabulary(), settings=settings, prompts=PROMPTS)
    assert set(found.skipped) == missing
    assert not missing & set(found.values)
    assert all("the model learnt" in why for why in found.skipped.values())
