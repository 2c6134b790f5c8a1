"""What varies between invented patients and between their films: anatomy, pose, exposure, and the random fields of one picture.

Drawn here as numbers, turned into pixels in ``radiograph``. Lengths are in half image widths: the canonical film runs from
-1 to 1, x to the right and y downwards. Shapes: N studies, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmix.data.looks import Appearance

Field = NDArray[np.floating[Any]]  # float32 throughout; numpy's stubs lose the width in mixed arithmetic


@dataclass(frozen=True)
class Anatomy:
    """What a patient keeps from film to film; each [N]."""

    body_width: Field
    lung_width: Field
    lung_height: Field
    lung_x: Field
    lung_y: Field
    diaphragm_y: Field
    rib_phase: Field
    rib_frequency: Field
    rib_grey: Field
    spine_grey: Field
    heart_x: Field
    heart_size: Field
    aspect: Field


@dataclass(frozen=True)
class Film:
    """How one exposure was taken; each [N] or as noted."""

    rotation: Field  # radians
    zoom: Field
    shift_x: Field
    shift_y: Field
    inspiration: Field  # moves the diaphragm
    heart_enlargement: Field  # factor of the heart's shadow on portable films
    scatter: Field
    contrast: Field
    brightness: Field
    gamma: Field
    noise: Field
    border: Field  # half image widths at which collimation begins
    electrodes: Field  # [N, 2, 2] places (x, y) of two dots; far outside the film where there are none


def sample_anatomy(rng: np.random.Generator, first_row: NDArray[np.int64], variation: float) -> Anatomy:
    """Draw one body per patient; studies with equal ``first_row`` [N] share it. ``variation`` scales how bodies differ."""

    def varied(mean: float, deviation: float) -> Field:
        draws = rng.standard_normal(len(first_row), dtype=np.float32)
        return (mean + deviation * draws).astype(np.float32)[first_row]

    return Anatomy(
        body_width=varied(0.86, 0.04 * variation),
        lung_width=varied(0.33, 0.025 * variation),
        lung_height=varied(0.62, 0.04 * variation),
        lung_x=varied(0.43, 0.02 * variation),
        lung_y=varied(-0.10, 0.03 * variation),
        diaphragm_y=varied(0.47, 0.045 * variation),
        rib_phase=varied(0.0, 1.0),
        rib_frequency=varied(17.8, 0.9),
        rib_grey=varied(0.085, 0.02),
        spine_grey=varied(0.17, 0.02),
        heart_x=varied(0.13, 0.025),
        heart_size=varied(0.0, 0.08 * variation),
        aspect=varied(1.0, 0.05 * variation),
    )


def sample_film(rng: np.random.Generator, num_studies: int, look: Appearance, variation: float) -> Film:
    """Draw pose, exposure and electrodes for each study [N]; ``variation`` scales how much the pose differs."""

    def varied(mean: float, deviation: float) -> Field:
        return (mean + deviation * rng.standard_normal(num_studies, dtype=np.float32)).astype(np.float32)

    has_electrodes = rng.random((num_studies, 1, 1)) < 0.25
    places = rng.uniform(-1, 1, (num_studies, 2, 2)) * np.array([0.7, 0.6])
    return Film(
        rotation=varied(0.0, variation * np.deg2rad(look.rotation_deg)),
        zoom=varied(1 / look.zoom, 0.06 * variation),
        shift_x=varied(0.0, 0.05 * variation),
        shift_y=varied(0.0, 0.05 * variation),
        inspiration=varied(0.0, 0.02 * variation),
        heart_enlargement=np.where(rng.random(num_studies) < look.portable_rate, 1.1, 1.0).astype(np.float32),
        scatter=varied(0.0, 0.036),
        contrast=varied(look.contrast, 0.10),
        brightness=varied(0.12 + look.brightness, 0.04),
        gamma=np.clip(varied(look.gamma, 0.12), 0.4, 2.5),
        noise=np.clip(varied(look.noise, 0.004), 0.004, 0.2),
        border=(1.0 - look.collimation * (0.5 + rng.random(num_studies))).astype(np.float32),
        electrodes=np.where(has_electrodes, places, 9.0).astype(np.float32),
    )


@dataclass(frozen=True)
class Grain:
    """Random fields of a block [N, S, S]: lung texture, oedema's grain, scatter over the film, and pixel noise."""

    lung: Field
    edema: Field
    scatter: Field
    noise: Field


_GRIDS = (24, 12, 32, 3)  # coarse grids behind lung texture (two octaves), oedema and scatter


def sample_grain(rng: np.random.Generator, num_studies: int, size: int) -> Grain:
    """Draw the fields study by study, so that the first studies of a long block equal those of a short one."""
    counts = [*(grid * grid for grid in _GRIDS), size * size]
    draws = np.split(rng.standard_normal((num_studies, sum(counts)), dtype=np.float32), np.cumsum(counts)[:-1], axis=1)
    fine, coarse, edema, scatter = (
        _stretched(draw.reshape(-1, grid, grid), size) for grid, draw in zip(_GRIDS, draws[:-1], strict=True)
    )
    return Grain(lung=0.4 * fine + 0.5 * coarse, edema=edema, scatter=scatter, noise=draws[-1].reshape(-1, size, size))


def _stretched(grid: Field, size: int) -> Field:
    """Interpolate grids [N, G, G] to [N, S, S] linearly; the narrow axis first, so that the wide one copies whole rows."""
    place = np.linspace(0, grid.shape[-1] - 1, size, dtype=np.float32)
    lower = np.minimum(place.astype(np.intp), grid.shape[-1] - 2)
    weight = place - lower.astype(np.float32)
    wide: Field = grid[:, :, lower] * (1 - weight) + grid[:, :, lower + 1] * weight
    tall: Field = wide[:, lower] * (1 - weight)[:, None] + wide[:, lower + 1] * weight[:, None]
    return tall
