"""The server's optimiser: one parameter's step along the aggregated change.

It is called only for parameters that somebody trained, so the others and their moments stay as they are to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmix import config


def outer_step(
    parameter: Tensor, delta: Tensor, state: Mapping[str, Tensor], settings: config.Outer
) -> tuple[Tensor, dict[str, Tensor]]:
    """The new parameter and the new state; ``state`` is empty at the start of a stage, and nothing given is changed."""
    if settings.kind == "adam":
        return _adam(parameter, delta, state, settings)
    if settings.momentum == 0:
        return parameter + settings.lr * delta, {}
    velocity = settings.momentum * state["velocity"] + delta if state else delta.clone()
    step = delta + settings.momentum * velocity if settings.nesterov else velocity
    return parameter + settings.lr * step, {"velocity": velocity}


def _adam(
    parameter: Tensor, delta: Tensor, state: Mapping[str, Tensor], settings: config.Outer
) -> tuple[Tensor, dict[str, Tensor]]:
    """FedAdam (2003.00295, algorithm 2): no bias correction, and a second moment that starts at epsilon squared."""
    first = state["first"] if state else torch.zeros_like(delta)
    second = state["second"] if state else torch.full_like(delta, settings.epsilon**2)
    first = settings.momentum * first + (1 - settings.momentum) * delta
    second = settings.beta2 * second + (1 - settings.beta2) * delta.square()
    return parameter + settings.lr * first / (second.sqrt() + settings.epsilon), {"first": first, "second": second}
