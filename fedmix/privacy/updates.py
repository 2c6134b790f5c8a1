"""Noise on whole updates, where what is hidden is not a patient but everything that a site holds.

A site's update is cut group by group to length C, so that with G groups it is at most C sqrt(G) long, and any two data sets
of the site give updates at most 2 C sqrt(G) apart. The Gaussian mechanism adds N(0, (sigma 2 C sqrt(G))^2) to every number.
No site is drawn by chance, so nothing is gained from sampling: each round is a Gaussian of noise multiplier sigma, and rounds
compose (accountant.py, with a sample rate of 1).

The noise does not shrink with a site's number of patients. Of d numbers it is sigma 2 sqrt(G d) times as long as the longest
update: with few sites it is as large as what they say, or much larger. Use it where a site may not trust the coordinator at
all (``noisy_updates``), or to publish a model of many sites (``central_noise``), and DP-SGD where patients are to be hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor


def factors(lengths: Mapping[str, float], clip: float) -> dict[str, float]:
    """By what each group of an update is multiplied to be at most ``clip`` long; zero where its length is not finite."""
    return {group: min(1.0, clip / max(length, clip)) if math.isfinite(length) else 0.0 for group, length in lengths.items()}


def deviation(noise_multiplier: float, clip: float, num_groups: int) -> float:
    """Standard deviation of the noise on every number of an update of so many groups: sigma 2 C sqrt(G)."""
    return noise_multiplier * 2.0 * clip * math.sqrt(num_groups)


def covered(
    deltas: Mapping[str, Tensor], group_of: Callable[[str], str], *, clip: float, noise_multiplier: float, chance: Generator
) -> dict[str, Tensor]:
    """An update cut and noised, float32. ``chance`` is secret, or whoever knows it subtracts the noise."""
    squares: dict[str, float] = {}
    for name, delta in deltas.items():
        squares[group_of(name)] = squares.get(group_of(name), 0.0) + float(delta.double().square().sum())
    kept = factors({group: math.sqrt(square) for group, square in squares.items()}, clip)
    std = deviation(noise_multiplier, clip, len(kept))
    found = {}
    for name, delta in deltas.items():
        factor = kept[group_of(name)]
        cut = delta.float() * factor if factor else torch.zeros(delta.shape)  # zero times infinity is not zero
        found[name] = cut + std * torch.randn(delta.shape, generator=chance)
    return found
