from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.objectives.alignment import Past, contrast_term, soft_targets
from fedmix.objectives.memory import PastPairs

QUEUE = {"contrast": 1.0, "same_patient": "left_out", "queue": 6}


def unit(num: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, 5, generator=tiny.generator(seed)), dim=-1)


def test_newest_pairs_are_kept_in_order_and_without_gradients() -> None:
    past = PastPairs(3)
    assert past.kept is None
    for step in range(3):
        image = torch.full((2, 5), float(step), requires_grad=True)
        past.remember(image, 2 * image, torch.tensor([2 * step, 2 * step + 1]))
    image_QE, text_QE, patient_Q = past.kept
    assert patient_Q.tolist() == [3, 4, 5]
    assert image_QE[:, 0].tolist() == [1, 2, 2]
    assert text_QE[:, 0].tolist() == [2, 4, 4]
    assert not image_QE.requires_grad


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_contrast_with_a_past_equals_a_loop(share: float) -> None:
    """Three pairs and four earlier ones, the second of which is of the first pair's patient."""
    image, text, old_image, old_text = unit(3, 0), unit(3, 1), unit(4, 2), unit(4, 3)
    compared = torch.ones(3, 4, dtype=torch.bool)
    compared[0, 1] = False
    target = soft_targets(unit(3, 4), share=share, temperature=0.5)
    total = 0.0
    for own, other, old in ((image, text, old_text), (text, image, old_image)):
        for i in range(3):
            here = [float(own[i] @ other[j]) / 0.1 for j in range(3)]
            before = [float(own[i] @ old[j]) / 0.1 for j in range(4) if compared[i, j]]
            log_sum = math.log(sum(math.exp(score) for score in here + before))
            total -= sum(0.5 * float(target[i, j]) * (here[j] - log_sum) for j in range(3))
    past = Past(old_image, old_text, compared)
    found = contrast_term(image, text, torch.tensor(0.1), target_BB=target if share else None, past=past)
    assert found.total.item() == pytest.approx(total, rel=1e-5)
    assert found.weight.item() == 3


def test_step_meets_the_pairs_of_the_steps_before_and_a_round_begins_with_none() -> None:
    learner = tiny.learner(**QUEUE).at_round_start()
    first, second = tiny.batch("ippp", patients=(0, 1, 2, 3)), tiny.batch("ppp", 1, patients=(4, 5, 6))
    alone = tiny.learner(**(QUEUE | {"queue": 0})).terms(second, tiny.generator())["contrast"].total
    assert torch.equal(learner.terms(second, tiny.generator())["contrast"].total, alone)

    learner = learner.at_round_start()
    learner.terms(first, tiny.generator())
    assert learner.past.kept[2].tolist() == [1, 2, 3]
    met = learner.terms(second, tiny.generator())["contrast"].total
    assert met > alone + 0.1
    assert learner.past.kept[2].tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(learner.at_round_start().terms(second, tiny.generator())["contrast"].total, alone)


def test_earlier_reading_of_the_same_pairs_is_no_negative_of_its_own() -> None:
    """One pair seen again: all that the queue holds is of its patient, so nothing is left to compare."""
    learner = tiny.learner(**QUEUE).at_round_start()
    for seed in range(3):
        assert learner.terms(tiny.batch("p"), tiny.generator(seed))["contrast"].total == 0


def test_no_gradient_goes_to_the_past() -> None:
    """A second backward pass through an earlier step would be an error of torch."""
    learner = tiny.learner(**QUEUE).at_round_start()
    for seed in range(3):
        learner.loss(learner.terms(tiny.batch("ppp", seed), tiny.generator(seed))).backward()
    assert learner.past is not None
    assert learner.past.kept is not None
    assert not any(rows.requires_grad for rows in learner.past.kept)


def test_learner_without_a_queue_remembers_nothing() -> None:
    assert tiny.learner(contrast=1.0, same_patient="left_out").at_round_start().past is None
