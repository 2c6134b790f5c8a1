"""The matrix products and attentions of a training step, done again alone: the floor that no step of the model goes below."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fedmix.batch import Batch
from fedmix.federation.local import arithmetic
from fedmix.objectives.mixture import Learner

# Where attention is not one kernel, its softmax stands between its two products and is as much a part of it.
SOFTMAX = (torch.ops.aten._softmax, torch.ops.aten._softmax_backward_data)


class Products:
    """What ``of`` saw a step do, forward and backward, with the very operands; calling it does them again and nothing else.

    ``flops``: floating-point operations in them, two for a multiplication and its addition.
    """

    def __init__(self, calls: Sequence[tuple[Callable[..., object], Sequence[Any], Mapping[str, Any]]], flops: int) -> None:
        self._calls, self.flops = calls, flops

    @classmethod
    def of(cls, learner: Learner, batch: Batch, precision: str) -> Products:
        """Of a step of training with this batch, without its optimiser; the model's gradients are dropped."""
        learner.model.train()
        learner.model.skips_padding = True
        with _Recorder() as seen:
            with arithmetic(precision, learner.model.device.type):
                loss = learner.loss(learner.at_round_start().terms(batch, torch.Generator().manual_seed(0)))
            loss.backward()
        learner.model.zero_grad(set_to_none=True)
        return cls(seen.calls, seen.flops)

    def __call__(self) -> None:
        """Once through all of them."""
        with torch.no_grad():
            for function, operands, options in self._calls:
                function(*operands, **options)


class _Recorder(TorchDispatchMode):
    """Keeps every call of an operator that torch's own FLOP counter knows, and of softmax."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., object], Sequence[Any], Mapping[str, Any]]] = []
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = function(*args, **options)
        packet = function.overloadpacket
        if packet in flop_registry or packet in SOFTMAX:
            self.calls.append((function, args, options))
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **options, out_val=result)
        return result
