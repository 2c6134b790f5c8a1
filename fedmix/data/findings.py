"""What is wrong with invented patients: findings with side, severity and place, correlated the way real ones are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Label -> base rate before correlations. Settings of a simulation: common enough that 100 labels hold some of each.
PREVALENCE: dict[str, float] = {
    "cardiomegaly": 0.22,
    "effusion_right": 0.14,
    "effusion_left": 0.15,
    "pneumothorax_right": 0.08,
    "pneumothorax_left": 0.08,
    "consolidation": 0.25,
    "nodule": 0.14,
    "edema": 0.14,
    "pacemaker": 0.10,
    "tube": 0.12,
}
LABELS: tuple[str, ...] = tuple(PREVALENCE)
COLUMN: dict[str, int] = {label: column for column, label in enumerate(LABELS)}
CHRONIC = ("cardiomegaly", "nodule", "pacemaker")  # still there when the patient comes back
NUM_SEVERITIES = 3
ZONES = ("right upper", "right mid", "right lower", "left upper", "left mid", "left lower")


@dataclass(frozen=True)
class Findings:
    """Every fact about N studies, F labels in the order of ``LABELS``; details are drawn for absent findings too."""

    present: NDArray[np.bool_]  # [N, F]
    severity: NDArray[np.int64]  # [N, F], 0 least to 2 worst; for the tube: tip high, well placed, low
    consolidation_zone: NDArray[np.int64]  # [N], index into ZONES
    nodule_zone: NDArray[np.int64]  # [N], index into ZONES
    jitter: NDArray[np.float32]  # [N, F, 3], standard normals that move and resize each finding


def sample_patients(rng: np.random.Generator, num_studies: int) -> NDArray[np.int64]:
    """Return for each study the row [N] of its patient's first one; about one patient in five comes two or three times."""
    visits = rng.choice([1, 2, 3], size=num_studies, p=[0.8, 0.14, 0.06])
    first_row = np.cumsum(visits) - visits
    return np.repeat(first_row, visits)[:num_studies].astype(np.int64)


def sample_findings(rng: np.random.Generator, first_row: NDArray[np.int64], rates: Mapping[str, float]) -> Findings:
    """Draw findings for studies whose patients first appear in rows ``first_row`` [N]; ``rates`` is label -> probability."""
    num_studies = len(first_row)
    present = rng.random((num_studies, len(LABELS))) < np.array([rates[label] for label in LABELS])
    severity = rng.integers(0, NUM_SEVERITIES, (num_studies, len(LABELS)))
    consolidation_zone = rng.integers(0, len(ZONES), num_studies)
    nodule_zone = rng.integers(0, len(ZONES), num_studies)[first_row]
    jitter = rng.standard_normal((num_studies, len(LABELS), 3), dtype=np.float32)
    for label in CHRONIC:
        column = COLUMN[label]
        for detail in (present, severity, jitter):
            detail[:, column] = detail[first_row, column]
    _correlate(rng, present)
    return Findings(present, severity, consolidation_zone, nodule_zone, jitter)


def _correlate(rng: np.random.Generator, present: NDArray[np.bool_]) -> None:
    """Let oedema bring a large heart and effusions, in place; no study has air on both sides, or air and fluid on one."""
    edema = present[:, COLUMN["edema"]]
    for label, rate in (("cardiomegaly", 0.45), ("effusion_right", 0.30), ("effusion_left", 0.30)):
        present[:, COLUMN[label]] |= edema & (rng.random(len(present)) < rate)
    air_right, air_left = COLUMN["pneumothorax_right"], COLUMN["pneumothorax_left"]
    present[:, air_right] &= ~present[:, air_left]
    present[:, COLUMN["effusion_right"]] &= ~present[:, air_right]
    present[:, COLUMN["effusion_left"]] &= ~present[:, air_left]
