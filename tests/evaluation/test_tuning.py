"""Gradient steps on labels: the loss, the schedule and the loop that fine-tuning and prompt tuning share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmix.evaluation.tuning import batches, has_both_classes, known_label_loss, minimise, rate


def test_the_loss_is_the_mean_over_known_labels_as_a_loop_has_it() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)), rng.integers(-1, 2, (20, 4))
    terms = [math.log1p(math.exp(-z if y else z)) for z, y in zip(logits.flat, labels.flat, strict=True) if y >= 0]
    found = known_label_loss(torch.from_numpy(logits), torch.from_numpy(labels).double())
    assert float(found) == pytest.approx(np.mean(terms))
    assert float(known_label_loss(torch.ones(2, 3), -torch.ones(2, 3))) == 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 30))
def test_batches_are_full_where_they_can_be_and_repeat_no_row_in_an_epoch(num_rows: int, size: int, num_steps: int) -> None:
    found = batches(num_rows, size, num_steps, np.random.default_rng(0))
    assert len(found) == num_steps
    assert {len(rows) for rows in found} == {min(size, num_rows)}
    epoch = np.concatenate(found[: max(1, num_rows // size)])
    assert len(np.unique(epoch)) == len(epoch)


@given(st.integers(1, 500))
def test_the_rate_rises_to_its_highest_and_falls_towards_zero(num_steps: int) -> None:
    rates = [rate(step, num_steps) for step in range(num_steps)]
    top = int(np.argmax(rates))
    assert rates[top] == 1.0
    assert min(rates) > 0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_only_the_given_parameters_move_and_others_are_left_without_a_gradient() -> None:
    wanted, other = (torch.nn.Parameter(torch.tensor([4.0])) for _ in range(2))
    with torch.no_grad():  # as evaluation runs
        minimise([{"params": [wanted], "lr": 0.1, "weight_decay": 0.0}], lambda _: ((wanted * other - 8) ** 2).sum(), 200)
    assert wanted.item() == pytest.approx(2.0, abs=0.01)
    assert (other.item(), other.grad) == (4.0, None)


def test_labels_of_one_class_teach_nothing() -> None:
    labels = np.array([[1, 0, -1, -1], [0, 0, 1, -1], [-1, -1, 0, -1]], np.int8)
    assert has_both_classes(labels).tolist() == [True, False, True, False]
