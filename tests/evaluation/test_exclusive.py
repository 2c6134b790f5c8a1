from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evaluation_toys import PROMPTS, ConstantEncoder, OracleEncoder, ToyVocabulary, draw, held_out, write
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom

from fedmix.evaluation import exclusive
from fedmix.evaluation.exclusive import FINDINGS, evaluate_exclusive, rank_by_finding, sole_finding
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings
from fedmix.evaluation.held_out import HeldOut
from fedmix.evaluation.suite import ASKED, EXCLUSIVE

NAMES = (*FINDINGS, "No Finding", "Fracture", "Support Devices")


def sentence(code: np.ndarray) -> str:
    return " ".join((said if present else denied)[0] for present, (said, denied) in zip(code, PROMPTS.values(), strict=True))


def studies(*num_each: int, **changes: Any) -> HeldOut:
    """So many pairs of each finding alone, then as many with two findings; a patient each, and all of them tested."""
    alone = np.repeat(np.eye(5, 8, dtype=bool), num_each, axis=0)
    both = alone.copy()
    both[:, 6] = True  # a fracture beside it
    code = np.concatenate([alone, both])
    parts = {"labels": code.astype(np.int8), "label_names": NAMES, "patient": np.arange(len(code))}
    parts |= {"images": draw(code), "words": write(code), "is_probe_train": np.zeros(len(code), bool), "groups": {}}
    return held_out(**(parts | changes))


def evaluated(encoder: OracleEncoder, those: HeldOut) -> dict[str, Any]:
    prompts = {name: ((sentence(np.eye(5, 8)[k]),), (sentence(np.zeros(8)),)) for k, name in enumerate(FINDINGS)}
    settings = EvaluationSettings(num_bootstrap=20)
    return evaluate_exclusive(EvaluationContext(encoder, those, ToyVocabulary(), prompts, settings)).values


def test_who_reads_every_finding_makes_no_error_on_as_many_pairs_of_each() -> None:
    found = evaluated(OracleEncoder(), studies(12, 14, 11, 13, 12))
    assert found["available"] == dict(zip(FINDINGS, (12, 14, 11, 13, 12), strict=True))
    assert (found["num_each"], found["gallery"]) == (11, 55)
    for direction in ("image_to_text", "text_to_image"):
        assert all(found[direction][f"{letter}@{depth}"] == pytest.approx(1.0) for letter in "ph" for depth in (1, 5, 10))
    assert found["zero_shot"]["accuracy"] == 1.0
    assert found["zero_shot"]["per_label"] == dict.fromkeys(FINDINGS, 1.0)


def test_who_says_the_same_of_everything_gets_chance() -> None:
    found = evaluated(ConstantEncoder(), studies(*[12] * 5))
    ranking = found["image_to_text"]
    assert ranking["p@1"] == ranking["p@10"] == pytest.approx(0.2)
    assert ranking["h@5"] == pytest.approx(1 - hypergeom.pmf(0, 60, 12, 5))
    assert all(ranking[name] == pytest.approx(value) for name, value in ranking["chance"].items())
    assert found["zero_shot"]["accuracy"] == pytest.approx(found["zero_shot"]["chance"])


def test_no_more_are_drawn_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "MOST_EACH", 10)
    found = evaluated(OracleEncoder(), studies(*[12] * 5))
    assert (found["num_each"], found["gallery"]) == (10, 50)


def test_too_few_pairs_of_one_finding_are_said_with_the_numbers() -> None:
    found = evaluated(OracleEncoder(), studies(12, 12, 3, 12, 12))
    assert found["reason"] == "not enough data: 3 test pairs have Consolidation alone, at least 10 are needed"
    assert found["available"]["Consolidation"] == found["num_each"] == 3
    assert "image_to_text" not in found


def test_only_a_set_that_knows_all_five_findings_is_asked() -> None:
    context = EvaluationContext(OracleEncoder(), studies(*[2] * 5), ToyVocabulary(), {}, EvaluationSettings())
    assert ASKED[EXCLUSIVE](context)
    names = tuple(name.replace("Edema", "Oedema") for name in NAMES)
    assert not ASKED[EXCLUSIVE](replace(context, held_out=studies(*[2] * 5, label_names=names)))


def test_no_finding_and_what_is_not_mentioned_do_not_stand_beside_a_finding() -> None:
    column = {name: place for place, name in enumerate(NAMES)}
    rows: list[tuple[dict[str, int], int]] = [
        ({"Edema": 1}, 3),
        ({"Edema": 1, "No Finding": 1, "Fracture": 0}, 3),
        ({"Edema": 1, "Support Devices": 1}, -1),
        ({"Edema": 1, "Atelectasis": 1}, -1),
        ({"Fracture": 1}, -1),
        ({"No Finding": 1}, -1),
        ({"Pleural Effusion": 1, "Edema": -1}, 4),
    ]
    labels = np.full((len(rows), len(NAMES)), -1, np.int8)
    for row, (said, _) in zip(labels, rows, strict=True):
        row[[column[name] for name in said]] = list(said.values())
    assert sole_finding(labels, NAMES).tolist() == [expected for _, expected in rows]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_precision_and_hits_are_those_of_a_plain_ranking(seed: int, num_each: int) -> None:
    rng = np.random.default_rng(seed)
    finding = np.repeat(np.arange(5), num_each)
    scores = rng.permutation(len(finding) ** 2).reshape(len(finding), -1).astype(float)  # no two are equal
    found = rank_by_finding(scores, finding, np.zeros((0, len(finding))))
    for depth in (1, 5, 10):
        first = np.argsort(-scores, axis=1)[:, :depth]
        is_right = finding[first] == finding[:, None]
        assert found[f"p@{depth}"] == pytest.approx(is_right.mean())
        assert found[f"h@{depth}"] == pytest.approx(is_right.any(axis=1).mean())
