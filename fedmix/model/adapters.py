"""Low-rank adapters of the trunk: linear maps that stay, plus narrow ones that learn, merged again when a round ends.

    W x + B A x                B [E, R] learns from zero; A [R, D] is fixed, its rows orthonormal and drawn by a seed

B alone learns (FFA-LoRA, 2403.12313). So the change of W is linear in what was learned: the mean of the sites' changes is the
change of their mean B, which does not hold where A learns too, and noise on B is not multiplied by noise on A. What leaves a
site is B A of W's own shape: whoever receives it needs to know nothing of adapters. B A is as long as B, for A keeps lengths.

Shapes: D what a map reads, E what it gives, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from fedmix.model.encoder import MixedModel

LEARNED, FIXED = "up", "fixed"


class Adapted(nn.Module):
    """A linear map with an adapter."""

    basis_RD: Tensor

    def __init__(self, fixed: nn.Linear, basis_RD: Tensor) -> None:
        super().__init__()
        self.fixed = fixed
        self.register_buffer("basis_RD", basis_RD.to(fixed.weight.device), persistent=False)
        self.up = nn.Linear(len(basis_RD), fixed.out_features, bias=False, device=fixed.weight.device)
        nn.init.zeros_(self.up.weight)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """The map and its adapter, [B, T, E]."""
        given_BTE: Tensor = self.fixed(tokens_BTD) + self.up(F.linear(tokens_BTD, self.basis_RD))
        return given_BTE


def learns(parameter: str) -> bool:
    """Whether a parameter of a model with adapters is one of theirs."""
    return parameter.endswith(f".{LEARNED}.weight")


@contextmanager
def adapted(model: MixedModel, rank: int, chance_of: Callable[[str], Generator]) -> Iterator[dict[str, Tensor]]:
    """Every linear map of the trunk with an adapter within, afterwards as before; yields the bases [R, D] by map.

    ``chance_of`` gives the generator of a map's basis by its name: the same at all sites and in all rounds of a stage.
    """
    maps = {name: module for name, module in model.named_modules() if name.startswith("blocks.") and type(module) is nn.Linear}
    bases = {name: _basis(rank, one.in_features, chance_of(name)) for name, one in maps.items()}
    for name, one in maps.items():
        _put(model, name, Adapted(one, bases[name]))
    try:
        yield bases
    finally:
        for name, one in maps.items():
            _put(model, name, one)


def merged(deltas: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of a model with adapters under the names of the model without: of W it is B A."""
    found = {name.replace(f".{FIXED}.", "."): delta for name, delta in deltas.items() if not learns(name)}
    for name, basis_RD in bases.items():
        if f"{name}.{LEARNED}.weight" in deltas:
            found[f"{name}.weight"] = deltas[f"{name}.{LEARNED}.weight"] @ basis_RD
    return found


def _basis(rank: int, width: int, chance: Generator) -> Tensor:
    """Orthonormal rows [R, D] of a random subspace; all of it where the rank is no smaller than the width."""
    columns_DR, _ = torch.linalg.qr(torch.randn(width, min(rank, width), generator=chance))
    basis_RD: Tensor = columns_DR.T.contiguous()
    return basis_RD


def _put(model: MixedModel, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
