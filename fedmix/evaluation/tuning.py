"""Gradient steps on labels, as fine_tuning.py and prompt_tuning.py take them: the loss, the schedule, the loop.

Shapes: N, B studies, K labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

WARMUP = 0.1  # share of the steps
CLIP_NORM = 1.0


def known_label_loss(logits_BK: Tensor, labels_BK: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over known labels; 0 without one. Labels are 1, 0 or -1 for not known."""
    is_known_BK = labels_BK >= 0
    loss_BK = F.binary_cross_entropy_with_logits(logits_BK, labels_BK.clamp_min(0.0), reduction="none")
    return (loss_BK * is_known_BK).sum() / is_known_BK.sum().clamp_min(1)


def minimise(groups: list[dict[str, Any]], loss: Callable[[int], Tensor], num_steps: int) -> None:
    """Take AdamW's steps on parameter groups, each with its own highest "lr": a linear warm-up, then a cosine to zero.

    ``loss`` gives the loss of a step, by its number. Gradients are taken also where the caller has switched them off.
    """
    optimiser = torch.optim.AdamW(groups)
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    peaks = [float(group["lr"]) for group in optimiser.param_groups]
    with torch.enable_grad():
        for step in range(num_steps):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * rate(step, num_steps)
            optimiser.zero_grad(set_to_none=True)
            loss(step).backward(inputs=parameters)  # and into nothing else that was on the way
            torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
            optimiser.step()


def rate(step: int, num_steps: int) -> float:
    """The learning rate of a step as a share of its highest, more than 0 at the first."""
    num_warm = max(1, round(WARMUP * num_steps))
    if step < num_warm:
        return (step + 1) / num_warm
    return 0.5 + 0.5 * math.cos(math.pi * (step - num_warm + 1) / (num_steps - num_warm + 1))


def batches(num_rows: int, batch_size: int, num_steps: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """The rows of each step: epoch after epoch in another order, whole batches only, all rows where they fill none."""
    found: list[NDArray[np.int64]] = []
    while len(found) < num_steps:
        order = rng.permutation(num_rows)
        found += [order[start : start + batch_size] for start in range(0, max(num_rows - batch_size, 0) + 1, batch_size)]
    return found[:num_steps]


def has_both_classes(labels: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Bool [K]: labels of which the rows [N, K] hold a case with and one without."""
    return np.asarray((labels == 1).any(axis=0) & (labels == 0).any(axis=0))
