from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.objectives.alignment import contrast_term, match_term

TENTH = torch.tensor(0.1)


def pairs(num: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = tiny.generator(seed)
    image, text = torch.randn(num, 6, generator=chance), torch.randn(num, 6, generator=chance)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 0.313262), (0.5, 0.126928)])
def test_contrast_of_two_pairs_by_hand(temperature: float, expected: float) -> None:
    """Right pairs are equal and wrong ones at a right angle: ln(1 + exp(-1 / temperature)) a pair."""
    term = contrast_term(torch.eye(2), torch.eye(2), torch.tensor(temperature))
    assert term.mean().item() == pytest.approx(expected, abs=1e-6)
    assert term.weight.item() == 2


def test_contrast_of_two_swapped_pairs_by_hand() -> None:
    term = contrast_term(torch.eye(2), torch.eye(2).flip(0), torch.tensor(1.0))
    assert term.mean().item() == pytest.approx(math.log(1 + math.e), abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_contrast_equals_a_loop_over_pairs(label_smoothing: float) -> None:
    image, text = pairs(5)
    total = 0.0
    for own, other in ((image, text), (text, image)):
        for i in range(5):
            scores = [float(own[i] @ other[j]) / 0.1 for j in range(5)]
            log_sum = math.log(sum(math.exp(score) for score in scores))
            for j in range(5):
                target = label_smoothing / 5 + (1 - label_smoothing) * (i == j)
                total -= 0.5 * target * (scores[j] - log_sum)
    term = contrast_term(image, text, TENTH, label_smoothing=label_smoothing)
    assert term.total.item() == pytest.approx(total, rel=1e-5)


def test_contrast_is_symmetric_in_image_and_text() -> None:
    image, text = pairs(6)
    torch.testing.assert_close(contrast_term(image, text, TENTH).total, contrast_term(text, image, TENTH).total)


def test_contrast_does_not_depend_on_the_order_of_the_pairs() -> None:
    image, text = pairs(6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(contrast_term(image[order], text[order], TENTH).total, contrast_term(image, text, TENTH).total)


def test_one_pair_alone_teaches_nothing() -> None:
    image, text = pairs(1)
    image.requires_grad_()
    term = contrast_term(image, text, TENTH, label_smoothing=0.1)
    term.total.backward()
    assert term.total == 0
    assert image.grad is not None
    assert (image.grad == 0).all()


def test_contrast_is_float32_to_the_bit_under_autocast() -> None:
    """In bfloat16 a similarity has three digits; divided by a temperature of .01 the error would be a whole nat."""
    image, text = pairs(6)
    expected = contrast_term(image, text, torch.tensor(0.01)).total
    with torch.autocast("cpu", torch.bfloat16):
        found = contrast_term(image, text, torch.tensor(0.01)).total
    assert torch.equal(found, expected)


def test_match_equals_binary_cross_entropy() -> None:
    logits, belongs = torch.randn(7), torch.tensor([True, False, True, True, False, False, True])
    term = match_term(logits, belongs)
    torch.testing.assert_close(term.mean(), F.binary_cross_entropy(logits.sigmoid(), belongs.float()))
    assert term.weight.item() == 7


def test_match_by_hand() -> None:
    """A logit of ln 3 says 3/4: right about a pair costs ln 4/3, wrong about a mismatch ln 4."""
    term = match_term(torch.tensor([math.log(3), math.log(3)]), torch.tensor([True, False]))
    assert term.total.item() == pytest.approx(math.log(4 / 3) + math.log(4), abs=1e-6)
