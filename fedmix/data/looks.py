"""Invented hospitals: how each one's phantoms look, how its radiologists write and what its patients have.

The numbers are settings of a simulation, chosen so that sites differ as much as real ones do in kind (exposure, framing,
phrasing, prevalence); none was measured at a hospital. Every look writes with the same words, in its own proportions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

SentenceOrder = Literal["positive first", "negative first", "mixed"]


@dataclass(frozen=True)
class Appearance:
    """Exposure and framing of one hospital's images; grey values before levelling run from 0 to about 1."""

    gamma: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    noise: float = 0.016  # standard deviation of the pixel noise
    blur: float = 0.0  # standard deviation, in half image widths
    rotation_deg: float = 4.0  # standard deviation of the patient's tilt
    zoom: float = 1.0
    portable_rate: float = 0.2  # portable (AP) films enlarge the heart's shadow
    collimation: float = 0.0  # widest dark border, in half image widths


@dataclass(frozen=True)
class Phrasing:
    """Habits of one hospital's radiologists, as the probability of each habit."""

    dialect: int  # which of several synonyms comes first to mind
    hedge_rate: float
    negation_rate: float
    history_rate: float
    order: SentenceOrder


@dataclass(frozen=True)
class Look:
    """One invented hospital."""

    appearance: Appearance
    phrasing: Phrasing
    prevalence: float = 1.0  # of every finding, against the generator's base rate
    emphasis: Mapping[str, float] = field(default_factory=dict)  # label -> further factor: a trauma centre, a heart clinic


LOOKS: dict[str, Look] = {
    "north": Look(
        Appearance(noise=0.012, rotation_deg=3.0, portable_rate=0.0),
        Phrasing(dialect=0, hedge_rate=0.35, negation_rate=0.7, history_rate=0.5, order="positive first"),
    ),
    "east": Look(
        Appearance(
            gamma=1.5,
            contrast=0.75,
            brightness=0.08,
            noise=0.024,
            blur=0.022,
            rotation_deg=7.0,
            zoom=0.9,
            portable_rate=0.6,
            collimation=0.06,
        ),
        Phrasing(dialect=1, hedge_rate=0.15, negation_rate=0.45, history_rate=0.8, order="negative first"),
        prevalence=1.25,
        emphasis={"tube": 1.4, "edema": 1.2},
    ),
    "south": Look(
        Appearance(gamma=0.8, contrast=0.9, brightness=-0.05, zoom=1.05),
        Phrasing(dialect=2, hedge_rate=0.1, negation_rate=0.5, history_rate=0.2, order="positive first"),
        prevalence=0.9,
    ),
    "west": Look(
        Appearance(
            gamma=1.2,
            contrast=1.1,
            brightness=0.03,
            noise=0.02,
            blur=0.022,
            rotation_deg=5.0,
            portable_rate=0.4,
            collimation=0.06,
        ),
        Phrasing(dialect=3, hedge_rate=0.5, negation_rate=0.6, history_rate=0.6, order="mixed"),
        prevalence=1.1,
    ),
    "coast": Look(
        Appearance(gamma=0.9, contrast=0.85, rotation_deg=5.0, zoom=0.95, portable_rate=0.3),
        Phrasing(dialect=4, hedge_rate=0.25, negation_rate=0.4, history_rate=0.3, order="positive first"),
    ),
    "valley": Look(
        Appearance(gamma=1.3, brightness=-0.02, noise=0.02, rotation_deg=6.0, zoom=1.04, portable_rate=0.5),
        Phrasing(dialect=5, hedge_rate=0.2, negation_rate=0.55, history_rate=0.4, order="mixed"),
        emphasis={"pneumothorax_right": 1.5, "pneumothorax_left": 1.5, "tube": 1.3},
    ),
    "heights": Look(
        Appearance(gamma=0.85, contrast=1.05, noise=0.012, blur=0.014, zoom=0.96, portable_rate=0.1, collimation=0.04),
        Phrasing(dialect=6, hedge_rate=0.3, negation_rate=0.6, history_rate=0.5, order="negative first"),
        emphasis={"cardiomegaly": 1.3, "edema": 1.2, "pacemaker": 1.6},
    ),
    # Reserved: no site trains on this look, so a test on it measures transfer and not memory of an appearance.
    "unseen": Look(
        Appearance(gamma=1.1, contrast=0.95, brightness=0.02, noise=0.018, rotation_deg=5.0, zoom=0.98, portable_rate=0.3),
        Phrasing(dialect=7, hedge_rate=0.25, negation_rate=0.55, history_rate=0.4, order="mixed"),
    ),
}
