"""The server's optimiser against torch's and against the paper's algorithm in plain numbers."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor

from fedmix import config
from fedmix.federation.outer import outer_step


@pytest.mark.parametrize(
    ("momentum", "nesterov"),
    [(0.0, False), (0.0, True), (0.9, False), (0.9, True)],
    ids=["plain", "plain+", "heavy", "nesterov"],
)
def test_sgd_equals_torchs_over_several_rounds(momentum: float, nesterov: bool) -> None:
    settings = config.Outer(lr=0.7, momentum=momentum, nesterov=nesterov)
    chance = tiny.generator(5)
    parameter = torch.randn(4, generator=chance)
    reference = torch.nn.Parameter(parameter.clone())
    optimiser = torch.optim.SGD([reference], lr=0.7, momentum=momentum, nesterov=nesterov and momentum > 0)
    state: dict[str, Tensor] = {}
    for _ in range(5):
        delta = torch.randn(4, generator=chance)
        parameter, state = outer_step(parameter, delta, state, settings)
        reference.grad = -delta  # torch walks against a gradient, the server along a change
        optimiser.step()
        torch.testing.assert_close(parameter, reference.detach())
    assert set(state) == ({"velocity"} if momentum else set())


def test_rate_of_one_without_momentum_is_plain_averaging_to_the_bit() -> None:
    parameter, delta = torch.randn(4), torch.randn(4)
    moved, state = outer_step(parameter, delta, {}, config.Outer())
    assert torch.equal(moved, parameter + delta)
    assert state == {}


def test_adam_by_hand() -> None:
    """Beta .5 and .75, tau .1: m = 1, v = .75 x .01 + .25 x 4 = 1.0075; then m = 0, v = .75 x 1.0075 + .25 = 1.005625."""
    settings = config.Outer(kind="adam", lr=0.5, momentum=0.5, beta2=0.75, epsilon=0.1)
    moved, state = outer_step(torch.tensor([3.0]), torch.tensor([2.0]), {}, settings)
    assert state["first"].item() == pytest.approx(1.0)
    assert state["second"].item() == pytest.approx(1.0075)
    assert moved.item() == pytest.approx(3 + 0.5 * 1.0 / (1.0075**0.5 + 0.1))
    again, state = outer_step(moved, torch.tensor([-1.0]), state, settings)
    assert state["second"].item() == pytest.approx(1.005625)
    assert again.item() == pytest.approx(moved.item())


def test_adam_equals_the_papers_algorithm_in_float64_over_several_rounds() -> None:
    settings = config.Outer(kind="adam", lr=0.3, momentum=0.9, beta2=0.99, epsilon=1e-3)
    chance = tiny.generator(6)
    parameter = torch.randn(3, generator=chance)
    expected = parameter.tolist()
    first, second = [0.0] * 3, [1e-6] * 3
    state: dict[str, Tensor] = {}
    for _ in range(6):
        delta = 0.1 * torch.randn(3, generator=chance)
        parameter, state = outer_step(parameter, delta, state, settings)
        for place, change in enumerate(delta.tolist()):
            first[place] = 0.9 * first[place] + 0.1 * change
            second[place] = 0.99 * second[place] + 0.01 * change**2
            expected[place] += 0.3 * first[place] / (second[place] ** 0.5 + 1e-3)
    torch.testing.assert_close(parameter, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_adam_does_not_blow_small_changes_up() -> None:
    """A change far below tau moves by at most lr x change / tau."""
    settings = config.Outer(kind="adam", lr=1.0, momentum=0.0, epsilon=1e-3)
    moved, _ = outer_step(torch.zeros(1), torch.tensor([1e-9]), {}, settings)
    assert 0 < moved.item() <= 1e-9 / 1e-3


@pytest.mark.parametrize(
    "settings", [config.Outer(momentum=0.9), config.Outer(momentum=0.9, nesterov=False), config.Outer(kind="adam")]
)
def test_what_was_given_is_left_alone(settings: config.Outer) -> None:
    parameter, delta = torch.ones(4), torch.ones(4)
    _, state = outer_step(parameter, delta, {}, settings)
    kept = {name: value.clone() for name, value in state.items()}
    outer_step(parameter, delta, state, settings)
    assert parameter.tolist() == delta.tolist() == [1.0] * 4
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    assert all(value.data_ptr() != delta.data_ptr() for value in state.values())
