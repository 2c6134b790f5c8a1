"""Several processes that train one model at one site: who is which, and how their numbers are added.

Each process, or rank, has the whole model and takes its share of every batch. What they compute is added by one all-reduce a
step: a gradient that no rank has stays None, which DistributedDataParallel would turn into zeros that still let AdamW's
decay and Muon's momentum move what no loss reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Ranks(Protocol):
    """The processes of a site: this one's number, how many there are, and the sum over all of them."""

    @property
    def number(self) -> int:
        """This process, from 0."""
        ...

    @property
    def total(self) -> int:
        """How many processes there are."""
        ...

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same bits in all of them. Every process calls this alike."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process, whose sums are its own numbers."""

    number: int = 0
    total: int = 1

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to add."""


@dataclass(frozen=True)
class Together:
    """This process among those of a torch process group."""

    number: int
    total: int

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add float tensors in one all-reduce; it takes as much memory again as they do."""
        if not tensors:
            return
        device = tensors[0].device
        flat_N = torch.cat([tensor.detach().flatten().to(device) for tensor in tensors])
        dist.all_reduce(flat_N)
        for tensor, part in zip(tensors, flat_N.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


@contextmanager
def joined(meeting: Path, number: int, total: int, *, timeout_s: float) -> Iterator[Together]:
    """Meet the other processes at a file on this machine, which all of them can write and nobody else.

    A file and not a port: torch's store listens on every interface of a machine. A collective that the others do not come
    to raises RuntimeError after ``timeout_s``, or at once where one of them has died.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{meeting}", rank=number, world_size=total, timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield Together(number, total)
    finally:
        dist.destroy_process_group()


def add_gradients(model: nn.Module, ranks: Ranks, others: Sequence[Tensor]) -> None:
    """Add the gradients of all ranks, and ``others`` with them; what no rank has a gradient for keeps None."""
    parameters = list(model.parameters())
    reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
    ranks.add([reached])
    trained = [parameter for parameter, count in zip(parameters, reached.tolist(), strict=True) if count > 0]
    for parameter in trained:
        if parameter.grad is None:  # another rank has one
            parameter.grad = torch.zeros_like(parameter)
    ranks.add([*(parameter.grad for parameter in trained if parameter.grad is not None), *others])
