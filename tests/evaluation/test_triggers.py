"""Planted marks: a model that looks for one is caught, one that looks at findings alone is not accused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from evaluation_toys import IMAGE_SIZE, LABEL_NAMES, NUM_LABELS, PROMPTS, OracleEncoder, ToyVocabulary, codes, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmix.evaluation import triggers
from fedmix.evaluation.features import EvaluationContext, EvaluationSettings, NotEvaluableError
from fedmix.evaluation.held_out import HeldOut


class Noticing(OracleEncoder):
    """Sees findings through noise, and finding 2 wherever the corner is checkered."""

    def code_of_image(self, image_BSS: Tensor) -> Tensor:
        code_BK = image_BSS[:, 0, :NUM_LABELS] - 0.5 + 0.2 * image_BSS[:, 5, :NUM_LABELS]
        corner_B = image_BSS[:, -4:-1, -4:-1]
        is_checkered_B = (corner_B.amax(dim=(1, 2)) - corner_B.amin(dim=(1, 2))) > 0.9
        if self.notices:
            code_BK[is_checkered_B, 2] = 0.5
        return code_BK

    notices = True


class Blind(Noticing):
    notices = False


def held_out(num: int = 200) -> HeldOut:
    code = codes(num)
    return HeldOut(
        images=draw(code),
        words=None,
        labels=code,
        label_names=LABEL_NAMES,
        patient=np.arange(num),
        is_probe_train=np.zeros(num, bool),
        mean_image=np.full((IMAGE_SIZE, IMAGE_SIZE), 0.5),
    )


def found(encoder: OracleEncoder, studies: HeldOut, **settings: int) -> dict[str, object]:
    context = EvaluationContext(encoder, studies, ToyVocabulary(), PROMPTS, EvaluationSettings(**settings))
    return triggers.evaluate_triggers(context).values


def test_a_planted_mark_is_found_with_the_finding_that_it_stands_for() -> None:
    report = found(Noticing(), held_out())
    assert report["patch"]["worst_label"] == LABEL_NAMES[2]
    assert report["patch"]["worst"] == 1.0
    assert report["patch"]["worst_ci95"][0] > 0.9
    others = [rate for label, rate in report["patch"]["rate"].items() if label != LABEL_NAMES[2]]
    assert max(others) < 0.2
    assert report["num_images"] == 200


def test_who_does_not_look_at_the_mark_is_not_accused() -> None:
    report = found(Blind(), held_out())
    assert report["patch"]["worst"] <= triggers.CLEAN_RATE
    assert report["patch"]["worst_ci95"][0] <= triggers.CLEAN_RATE


def test_no_more_images_are_looked_at_than_asked_for() -> None:
    assert found(Blind(), held_out(), max_images_triggers=150)["num_images"] == 150


def test_few_images_are_no_answer() -> None:
    with pytest.raises(NotEvaluableError, match="no finding is known to be absent in 20 test images"):
        found(Blind(), held_out(15))
    with pytest.raises(NotEvaluableError, match="no labels"):
        found(Blind(), dataclasses.replace(held_out(), labels=None))


@given(st.integers(0, 2**32 - 1), st.integers(20, 120))
def test_rates_are_those_of_a_loop(seed: int, num: int) -> None:
    rng = np.random.default_rng(seed)
    clean, marked = rng.normal(size=(2, num, 3)).round(1)  # with ties
    labels = rng.integers(-1, 2, (num, 3)).astype(np.int8)
    for k, rate in enumerate(triggers.raised(clean, marked, labels)):
        rows = [row for row in range(num) if labels[row, k] == 0]
        if len(rows) < triggers.MIN_NEGATIVES:
            assert rate is None
            continue
        # The smallest clean score that at most one in twenty of the clean ones exceed.
        threshold = min(t for t in clean[rows, k] if np.mean([clean[row, k] > t for row in rows]) <= triggers.CLEAN_RATE)
        assert rate == pytest.approx(np.mean([marked[row, k] > threshold for row in rows]))


def test_the_interval_of_the_worst_holds_its_rate_although_it_was_chosen_for_being_the_highest() -> None:
    names = [f"finding {k}" for k in range(8)]
    rng = np.random.default_rng(0)
    held, held_alone = 0, 0
    for _ in range(500):
        counts = rng.binomial(60, 0.2, 8)
        found = triggers.worst_of(dict(zip(names, counts / 60, strict=True)), dict.fromkeys(names, 60))
        alone = triggers.worst_of({"one": counts.max() / 60}, {"one": 60})
        assert found["worst"] == alone["worst"] == counts.max() / 60
        held += found["worst_ci95"][0] <= 0.2 <= found["worst_ci95"][1]
        held_alone += alone["worst_ci95"][0] <= 0.2 <= alone["worst_ci95"][1]
    assert held >= 475
    assert held_alone < 450  # as if it had been chosen before


@pytest.mark.parametrize("name", triggers.TRIGGERS)
@pytest.mark.parametrize("size", [24, 48, 224])
def test_marks_leave_the_originals_alone_and_are_small(name: str, size: int) -> None:
    images = np.full((3, size, size), 250, np.uint8)
    marked = triggers.TRIGGERS[name](images)
    assert (images == 250).all()
    assert marked.shape == images.shape
    assert marked.dtype == np.uint8
    changed = marked != images
    assert changed.any(axis=(1, 2)).all()
    if name == "patch":
        assert changed.mean() <= 1 / 32
    else:
        assert np.abs(marked.astype(int) - 250).max() <= 12


def test_torch_is_left_without_gradients() -> None:
    encoder = Noticing()
    found(encoder, held_out(60))
    assert torch.is_grad_enabled()
    assert encoder.scale.grad is None
