from __future__ import annotations

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from fedmix.objectives.alignment import (
    MARGIN,
    contrast_term,
    hard_negatives,
    margin_contrast_term,
    match_term,
    other_patients,
    sigmoid_contrast_term,
    soft_targets,
)

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


# ---- soft targets and pairs that are not compared


def test_soft_targets_of_three_reports_by_hand() -> None:
    """Two reports alike and one at a right angle: softmax of (1, 1, 0) at temperature 1 is (e, e, 1) / (2 e + 1)."""
    text = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    e, share = math.e, 0.3
    alike, apart = share * e / (2 * e + 1), share / (2 * e + 1)
    odd, own = share / (e + 2), 0.7 + share * e / (e + 2)
    expected = torch.tensor([[0.7 + alike, alike, apart], [alike, 0.7 + alike, apart], [odd, odd, own]])
    torch.testing.assert_close(soft_targets(text, share=share, temperature=1.0), expected)


def test_soft_contrast_with_pairs_left_out_equals_a_loop() -> None:
    """Pairs 0 and 3, and 1 and 4, are of one patient each: neither in the other's denominator nor in its target."""
    image, text = pairs(5)
    features, _ = pairs(5, seed=9)
    patient = [7, 8, 9, 7, 8]
    compared = other_patients(torch.tensor(patient))
    allowed = [[j for j in range(5) if j == i or patient[j] != patient[i]] for i in range(5)]
    total = 0.0
    for own, other in ((image, text), (text, image)):
        for i in range(5):
            log_sum = math.log(sum(math.exp(float(own[i] @ other[j]) / 0.1) for j in allowed[i]))
            alike = {j: math.exp(float(features[i] @ features[j]) / 0.2) for j in allowed[i]}
            for j in allowed[i]:
                target = 0.8 * (i == j) + 0.2 * alike[j] / sum(alike.values())
                total -= 0.5 * target * (float(own[i] @ other[j]) / 0.1 - log_sum)
    target = soft_targets(features, share=0.2, temperature=0.2, compared_BB=compared)
    term = contrast_term(image, text, TENTH, target_BB=target, compared_BB=compared)
    assert term.total.item() == pytest.approx(total, rel=1e-5)
    assert term.weight.item() == 5


def test_soft_targets_of_no_share_are_the_hard_ones() -> None:
    image, text = pairs(6)
    target = soft_targets(text, share=0.0, temperature=0.1)
    torch.testing.assert_close(
        contrast_term(image, text, TENTH, target_BB=target).total, contrast_term(image, text, TENTH).total
    )


def test_soft_targets_carry_no_gradient() -> None:
    _, text = pairs(4)
    assert not soft_targets(text.requires_grad_(), share=0.2, temperature=0.1).requires_grad


def test_pair_left_out_gets_no_gradient_from_the_other() -> None:
    """Two pairs of one patient: nothing is left to compare, so nothing moves."""
    image, text = pairs(2)
    term = contrast_term(image.requires_grad_(), text, TENTH, compared_BB=other_patients(torch.tensor([5, 5])))
    term.total.backward()
    assert term.total == 0
    assert image.grad is not None
    assert not image.grad.any()


# ---- the sigmoid form


def test_sigmoid_contrast_of_two_pairs_by_hand() -> None:
    """Logits of 1 - 1 for right pairs and 0 - 1 for wrong ones: two of ln 2 and two of ln(1 + 1 / e), over two pairs."""
    term = sigmoid_contrast_term(torch.eye(2), torch.eye(2), torch.tensor(1.0), torch.tensor(-1.0))
    assert term.mean().item() == pytest.approx(math.log(2) + math.log(1 + 1 / math.e), abs=1e-6)
    assert term.weight.item() == 2


@pytest.mark.parametrize("patient", [[1, 2, 3, 4, 5], [7, 8, 9, 7, 8]])
def test_sigmoid_contrast_equals_a_loop_over_binary_questions(patient: list[int]) -> None:
    image, text = pairs(5)
    total = 0.0
    for i in range(5):
        for j in range(5):
            yes = 1 / (1 + math.exp(-(float(image[i] @ text[j]) / 0.1 - 2.0)))
            if i == j:
                total -= math.log(yes)
            elif patient[i] != patient[j]:
                total -= math.log(1 - yes)
    compared = other_patients(torch.tensor(patient))
    term = sigmoid_contrast_term(image, text, TENTH, torch.tensor(-2.0), compared_BB=compared)
    assert term.total.item() == pytest.approx(total, rel=1e-5)


# ---- matching


def test_hard_negatives_are_drawn_as_often_as_the_softmax_without_the_own_report_says() -> None:
    """Logits of ln 1, ln 2, ln 5 beside the own: shares of 1/8, 2/8 and 5/8, however well the own report fits."""
    logits = torch.tensor([9.0, 0.0, math.log(2), math.log(5)]).expand(4, -1).clone()
    draws = [hard_negatives(logits, tiny.generator(seed))[0].item() for seed in range(2000)]
    shares = [draws.count(number) / 2000 for number in range(4)]
    assert shares == pytest.approx([0.0, 0.125, 0.25, 0.625], abs=0.05)  # four standard deviations and a half


def test_hard_negatives_are_never_the_pair_itself_nor_of_the_same_patient() -> None:
    compared = other_patients(torch.tensor([5, 5, 6, 7]))
    allowed = {0: {2, 3}, 1: {2, 3}, 2: {0, 1, 3}, 3: {0, 1, 2}}
    for seed in range(50):
        logits = 20 * torch.randn(4, 4, generator=tiny.generator(seed))
        found = hard_negatives(logits, tiny.generator(seed), compared_BB=compared).tolist()
        assert all(other in allowed[own] for own, other in enumerate(found))


def test_pair_with_nothing_to_compare_has_no_hard_negative() -> None:
    assert hard_negatives(torch.ones(1, 1), tiny.generator()).tolist() == [-1]
    compared = other_patients(torch.tensor([4, 4]))
    assert hard_negatives(torch.ones(2, 2), tiny.generator(), compared_BB=compared).tolist() == [-1, -1]


def test_match_equals_binary_cross_entropy() -> None:
    logits, belongs = torch.randn(7), torch.tensor([True, False, True, True, False, False, True])
    term = match_term(logits, belongs)
    torch.testing.assert_close(term.mean(), F.binary_cross_entropy(logits.sigmoid(), belongs.float()))
    assert term.weight.item() == 7


def test_match_by_hand() -> None:
    """A logit of ln 3 says 3/4: right about a pair costs ln 4/3, wrong about a mismatch ln 4."""
    term = match_term(torch.tensor([math.log(3), math.log(3)]), torch.tensor([True, False]))
    assert term.total.item() == pytest.approx(math.log(4 / 3) + math.log(4), abs=1e-6)


# ---- the margin form


def test_margin_contrast_equals_torchs_multi_margin_loss_both_ways() -> None:
    image, text = pairs(5)
    alike = image @ text.T
    own = torch.arange(5)
    expected = sum(F.multi_margin_loss(way, own, margin=MARGIN, reduction="sum") for way in (alike, alike.T))
    term = margin_contrast_term(image, text)
    assert term.total.item() == pytest.approx(0.5 * float(expected), rel=1e-5)
    assert term.weight.item() == 5


def test_margin_contrast_leaves_alone_what_is_far_enough_apart() -> None:
    """Right pairs are equal and wrong ones at a right angle: no gradient, where InfoNCE would still pull."""
    image = torch.eye(3).requires_grad_()
    margin_contrast_term(image, torch.eye(3)).total.backward()
    assert image.grad is not None
    assert (image.grad == 0).all()


def test_margin_contrast_leaves_out_what_is_not_compared() -> None:
    image, text = pairs(4)
    apart = torch.eye(4, dtype=torch.bool)
    apart[0, 1:], apart[1:, 0] = True, True
    term = margin_contrast_term(image, text, compared_BB=apart)
    alike, total = image @ text.T, 0.0
    for i, j in apart.nonzero().tolist():
        if i != j:
            total += float(F.relu(MARGIN - alike[i, i] + alike[i, j]) + F.relu(MARGIN - alike[j, j] + alike[i, j]))
    assert term.total.item() == pytest.approx(0.5 * total / 4, rel=1e-5)
