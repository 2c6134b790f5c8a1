"""Noise on whole updates: how far they reach, how much is added, and what rounds of it spend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from fedmix.privacy.accountant import Steps, account_of, noise_for
from fedmix.privacy.updates import covered, deviation, factors

SHAPES = {"a.x": (7, 3), "a.y": (5,), "b.x": (40, 2)}


def group_of(name: str) -> str:
    return name[0]


def update(scale: float, seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}


def length(deltas: dict[str, torch.Tensor], group: str) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for name, one in deltas.items() if name[0] == group))


def cut(deltas: dict[str, torch.Tensor], clip: float) -> dict[str, torch.Tensor]:
    """The update without its noise, which is as small as can be."""
    return covered(deltas, group_of, clip=clip, noise_multiplier=1e-30, chance=torch.Generator().manual_seed(0))


@given(st.floats(1e-3, 1e3), st.floats(1e-2, 10.0))
def test_every_group_is_cut_to_its_length_and_a_short_one_is_left_alone(scale: float, clip: float) -> None:
    deltas = update(scale)
    found = cut(deltas, clip)
    for group in "ab":
        before = length(deltas, group)
        assert length(found, group) == pytest.approx(min(before, clip), rel=1e-5)
        for name in (name for name in SHAPES if name[0] == group):
            torch.testing.assert_close(found[name], deltas[name] * min(1.0, clip / before), rtol=1e-5, atol=1e-9)


def test_a_group_that_is_not_finite_adds_nothing_but_noise() -> None:
    deltas = update(1.0)
    deltas["a.x"][0, 0] = math.inf
    found = cut(deltas, 1.0)
    assert length(found, "a") < 1e-20
    assert length(found, "b") == pytest.approx(1.0, rel=1e-5)
    assert factors({"a": math.nan, "b": 0.0}, 1.0) == {"a": 0.0, "b": 1.0}


def test_noise_has_the_stated_deviation_on_every_number() -> None:
    zeros = {"a.x": torch.zeros(300, 200), "b.x": torch.zeros(40_000)}
    found = covered(zeros, group_of, clip=0.5, noise_multiplier=1.5, chance=torch.Generator().manual_seed(3))
    expected = deviation(1.5, 0.5, 2)
    assert expected == pytest.approx(1.5 * 2 * 0.5 * math.sqrt(2))
    for one in found.values():  # six standard errors of a deviation, and of a mean
        assert float(one.std()) == pytest.approx(expected, rel=6 / math.sqrt(2 * one.numel()))
        assert abs(float(one.mean())) < 6 * expected / math.sqrt(one.numel())


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    """The exact epsilon of one Gaussian (Balle and Wang 2018, 1805.06530, theorem 8), sensitivity 1."""
    half = 1 / (2 * noise_multiplier)

    def excess(epsilon: float) -> float:
        shift = epsilon * noise_multiplier
        return float(norm.cdf(half - shift) - math.exp(epsilon) * norm.cdf(-half - shift)) - delta

    return float(brentq(excess, 0.0, 200.0))


@pytest.mark.parametrize(("sigma", "rounds"), [(2.0, 1), (4.0, 9), (8.0, 30)])
def test_rounds_compose_to_the_one_gaussian_that_they_are(sigma: float, rounds: int) -> None:
    """T rounds of sigma are one of sigma / sqrt(T); the accountant's upper end is above it by its stated error at most."""
    exact = analytic_epsilon(sigma / math.sqrt(rounds), 1e-5)
    found = account_of([Steps(sigma, 1.0, rounds)], 1e-5).epsilon
    assert exact - 1e-3 <= found <= exact + 0.02


def test_planned_rounds_spend_the_budget_and_no_more() -> None:
    sigma = noise_for([(1.0, 12)], epsilon=2.0, delta=1e-5)
    assert 1.95 < analytic_epsilon(sigma / math.sqrt(12), 1e-5) <= 2.0
