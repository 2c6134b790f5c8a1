"""report.json as typed values: what it must hold, put together from its pieces, written whole or not at all.

Scripts read this file, so the names and the schema number change together or not at all. ``evaluation``, ``run`` and
``sites`` may carry more keys than the ones named here; everything else is closed. A number that could not be computed is
null, with its ``reason`` beside it: NaN and infinity are not JSON and are refused with the path of the culprit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmix.errors import RunError
from fedmix.report.evaluated import Count, Evaluation, Fraction, Interval, Open
from fedmix.report.files import first_non_finite, read_json

SCHEMA = 1
Seconds = Annotated[float, Field(ge=0.0)]


class Closed(BaseModel):
    """A block that holds exactly what is named here."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Run(Open):
    """Which run this is and how it ended; ``started`` and ``finished`` are unix seconds or ISO 8601."""

    name: str
    state: Literal["running", "completed", "failed"]
    cause: str | None = None
    seed: int | None = None
    started: float | str | None = None
    finished: float | str | None = None
    rounds: int | None = None


class SiteScore(Closed):
    """A measure on a site's own held-out patients: the federation's mean over ``weight`` images, words or queries.

    ``alone``: that of the model which the site trained for itself, None where nobody trained one.
    """

    value: float
    weight: float
    alone: float | None = None


class Site(Open):
    """One site: what it held, what it trained on in all rounds together, what it sent and received.

    ``scores``: what it found out about the model, by measure; ``unscored``: why it did not. ``shares``: its part of all weights
    by part of the model. All three are empty where the sites were not asked.
    """

    name: str
    stream: str
    studies: Count | None
    examples: Count | None
    bytes_up: Count | None
    bytes_down: Count | None
    scores: dict[str, SiteScore] = Field(default_factory=dict)
    unscored: str | None = None
    shares: dict[str, Fraction] = Field(default_factory=dict)


class Baseline(Open):
    """Another way to train, evaluated on the same studies."""

    evaluation: Evaluation


class Communication(Closed):
    """Bytes of all sites and rounds; ``bytes_full_fp32`` is what the uploads would weigh as whole float32 models."""

    bytes_up: Count | None
    bytes_down: Count | None
    bytes_full_fp32: Count | None


class PrivateSite(Open):
    """What one site's patients have borne, by the site's word: over all rounds and runs in its ledger."""

    name: str
    epsilon: float
    epsilon_rdp: float
    steps: float
    noise_multiplier: float
    sample_rate: float


class SummedTower(Open):
    """In how many rounds a tower's sum was revealed, and over how few sites at least; 0 and 0 if it never was."""

    rounds: int
    fewest_sites: int


class SecureSum(Open):
    """What the coordinator saw of updates: sums of ``threshold`` sites or more, in whole steps from -clip to clip.

    ``clipped``: changes of single parameters that were larger and were cut. ``switched_off``: what needs each site's own.
    """

    threshold: int
    clip: float
    bits: int
    step: float
    rounds: int
    clipped: int
    towers: dict[str, SummedTower]
    switched_off: tuple[str, ...]


class Privacy(Open):
    """Which protection the updates had; ``unit`` is what one epsilon covers, such as a patient.

    ``relation``: when two data sets are neighbours. ``epsilon`` and ``steps`` are the largest of the sites'. ``secure_sum``:
    None where the coordinator saw each site's update.
    """

    mode: str
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    relation: str | None = None
    accountant: str | None = None
    steps: float | None = None
    sites: tuple[PrivateSite, ...] = ()
    secure_sum: SecureSum | None = None


class Aggregation(Open):
    """How updates were added up, and what that promises against wrong sites, one sentence a tower and stage."""

    rule: str
    combine: str
    promises: tuple[str, ...] = ()


class Timing(Closed):
    """Seconds; ``overhead_ratio`` is wall time of the rounds over time in which at least one site was training."""

    wall_s: Seconds | None
    local_train_s: Seconds | None
    aggregate_s: Seconds | None
    evaluate_s: Seconds | None
    overhead_ratio: float | None


class Energy(Closed):
    """Kilowatt-hours of the run as low and high with ``how`` they were reckoned, or null with the ``reason``."""

    kwh: Interval | None
    how: str | None = None
    reason: str | None = None


class Report(Closed):
    """report.json."""

    schema_number: Literal[1] = Field(alias="schema")
    run: Run
    sites: tuple[Site, ...]
    evaluation: Evaluation
    baselines: dict[str, Baseline]
    communication: Communication
    privacy: Privacy
    timing: Timing
    aggregation: Aggregation | None = None
    energy: Energy | None = None


def build_report(
    *,
    run: Mapping[str, Any],
    sites: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
    baselines: Mapping[str, Any],
    communication: Mapping[str, Any],
    privacy: Mapping[str, Any],
    timing: Mapping[str, Any],
    aggregation: Mapping[str, Any] | None = None,
    energy: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The checked content of report.json from its pieces, one argument for each of its blocks, hence nine.

    ``baselines`` maps a name to ``{"evaluation": {...}}``. Raises RunError that names every wrong key.
    """
    pieces = {
        "schema": SCHEMA,
        "run": dict(run),
        "sites": [dict(site) for site in sites],
        "evaluation": dict(evaluation),
        "baselines": dict(baselines),
        "communication": dict(communication),
        "privacy": dict(privacy),
        "timing": dict(timing),
    }
    pieces |= {name: dict(one) for name, one in (("aggregation", aggregation), ("energy", energy)) if one is not None}
    return parse_report(pieces).model_dump(mode="json", by_alias=True, exclude_unset=True)


def parse_report(values: Mapping[str, Any], *, source: str = "report") -> Report:
    """The report that parsed JSON describes; raises RunError that names every wrong key, and ``source``."""
    if values.get("schema") != SCHEMA:
        raise RunError(
            f"{source}: schema is {values.get('schema')!r}, this fedmix reads {SCHEMA}; "
            "use the fedmix version that wrote it, manifest.json names it"
        )
    if culprit := first_non_finite(values, ""):
        raise RunError(f"{source}: {culprit} is NaN or infinite; a value that could not be computed is null, with a reason")
    try:
        return Report.model_validate(values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())
        raise RunError(f"{source}: " + "; ".join(problems)) from None


def read_report(run_dir: Path) -> Report:
    """The report of a run folder; raises RunError if it is absent, not JSON or not a report."""
    path = run_dir / "report.json"
    values = read_json(path)
    if not isinstance(values, dict):
        raise RunError(f"no readable report at {path}; a completed run has one, `fedmix simulate --resume` completes a run")
    return parse_report(values, source=str(path))
