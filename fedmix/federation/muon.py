"""Muon for many small matrices: one Newton-Schulz iteration for all matrices of a shape, where torch.optim.Muon takes one each.

A transformer's blocks repeat few shapes, and at small widths the calls cost more than the arithmetic (Jordan et al. 2024).

Shapes: N matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


class BatchedMuon(torch.optim.Muon):
    """``torch.optim.Muon`` with its settings and its state, and the same steps to within bfloat16's rounding."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would be for line searches
        """Move every matrix that has a gradient; the others keep their bits, and their momentum if they have one."""
        for group in self.param_groups:
            for matrices in _by_shape(group["params"]):
                self._move(matrices, group)

    def _move(self, matrices: list[Tensor], settings: Mapping[str, Any]) -> None:
        """Decay matrices of one shape and move them along their orthogonalised Nesterov momentum."""
        lr, momentum = settings["lr"], settings["momentum"]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        kept = [self._momentum(matrix) for matrix in matrices]
        torch._foreach_lerp_(kept, gradients, 1 - momentum)
        ahead_NRC = torch.stack(torch._foreach_lerp(gradients, kept, momentum))
        directions = orthogonal(ahead_NRC, settings["ns_coefficients"], settings["ns_steps"], settings["eps"]).float().unbind()
        num_rows, num_columns = matrices[0].shape
        torch._foreach_mul_(matrices, 1 - lr * settings["weight_decay"])
        torch._foreach_add_(matrices, directions, alpha=-lr * math.sqrt(max(1.0, num_rows / num_columns)))

    def _momentum(self, matrix: Tensor) -> Tensor:
        """The running mean of a matrix's gradients, under the name that torch.optim.Muon gives it."""
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum_buffer"]
        return momentum


def orthogonal(matrices_NRC: Tensor, coefficients: tuple[float, float, float], num_steps: int, smallest_norm: float) -> Tensor:
    """Each matrix with its singular values brought near 1, [N, R, C] bfloat16, by Newton-Schulz's quintic iteration.

    The coefficients trade exactness for speed: singular values end in about .7 to 1.2, which serves as well (Jordan et al.).
    """
    a, b, c = coefficients
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    near = (matrices_NRC.mT if is_tall else matrices_NRC).bfloat16()
    near = near / near.norm(dim=(1, 2), keepdim=True).clamp_min(smallest_norm)  # no singular value above 1, or it diverges
    for _ in range(num_steps):
        gram = near @ near.mT
        near = torch.baddbmm(near, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), near, beta=a)
    return near.mT if is_tall else near


def _by_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """The parameters that have a gradient, those of a shape together."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(parameter.shape, []).append(parameter)
    return list(groups.values())
