"""Our Muon against torch's, step by step, on matrices of the shapes that a model has."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from fedmix.federation.muon import BatchedMuon, orthogonal

SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices(copies: int, seed: int = 0) -> list[nn.Parameter]:
    chance = tiny.generator(seed)
    return [nn.Parameter(torch.randn(shape, generator=chance)) for shape in SHAPES for _ in range(copies)]


def take_steps(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], num_steps: int) -> None:
    for step in range(num_steps):
        chance = tiny.generator(100 + step)
        for number, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=chance) * 10.0 ** (number % 5 - 2)
            parameter.grad = None if (number + step) % 4 == 0 else gradient  # not every loss reaches every matrix
        optimiser.step()


@pytest.mark.parametrize("copies", [1, 3])
def test_steps_are_those_of_torchs_muon(copies: int) -> None:
    ours, theirs = matrices(copies), matrices(copies)
    options = {"lr": 0.02, "weight_decay": 0.1}
    batched, plain = BatchedMuon(ours, **options), torch.optim.Muon(theirs, **options)
    take_steps(batched, ours, 5)
    take_steps(plain, theirs, 5)
    for start, one, other in zip(matrices(copies), ours, theirs, strict=True):
        moved = (other - start).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.01 * moved  # bfloat16 rounds to 1 in 256, here and there
        torch.testing.assert_close(momentum(batched, one), momentum(plain, other), rtol=0, atol=0)


def momentum(optimiser: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    state = optimiser.state[parameter]
    assert set(state) == {"momentum_buffer"}  # checkpoints, and what stays at a site, hold it under this name
    kept: Tensor = state["momentum_buffer"]
    return kept


def test_matrices_without_a_gradient_keep_their_bits_and_get_no_momentum() -> None:
    parameters = matrices(2)
    before = [parameter.detach().clone() for parameter in parameters]
    optimiser = BatchedMuon(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimiser.step()
    assert not torch.equal(parameters[0], before[0])
    assert all(torch.equal(one, other) for one, other in zip(parameters[1:], before[1:], strict=True))
    assert set(optimiser.state) == {parameters[0]}


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_brings_every_singular_value_near_one_and_keeps_its_directions(shape: tuple[int, int]) -> None:
    """Of a stack, whatever the scale of each: the matrix that U V^T is, within what the coefficients allow."""
    stack_NRC = torch.randn(4, *shape, generator=tiny.generator(5)) * torch.tensor([1e-3, 1.0, 5.0, 1e3])[:, None, None]
    found_NRC = orthogonal(stack_NRC, COEFFICIENTS, 5, 1e-7).float()
    left_NRK, values_NK, right_NKC = torch.linalg.svd(stack_NRC, full_matrices=False)
    in_its_directions_NKK = left_NRK.mT @ found_NRC @ right_NKC.mT
    stretched_NK = in_its_directions_NKK.diagonal(dim1=1, dim2=2)
    large_NK = values_NK > 0.1 * values_NK[:, :1]  # five steps do not bring the smallest up
    assert bool(((stretched_NK > 0.6) & (stretched_NK < 1.3))[large_NK].all())
    beside_NKK = in_its_directions_NKK - torch.diag_embed(stretched_NK)
    assert float(beside_NKK.abs().max()) < 0.06


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not orthogonal(torch.zeros(2, 8, 4), COEFFICIENTS, 5, 1e-7).any()
