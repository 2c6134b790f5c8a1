"""report.json as typed values: what it must hold, put together from its pieces, written whole or not at all.

Scripts read this file, so the names and the schema number change together or not at all. ``evaluation``, ``run`` and
``sites`` may carry more keys than the ones named here; everything else is closed. A number that could not be computed is
null, with its ``reason`` beside it: NaN and infinity are not JSON and are refused with the path of the culprit.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedmix.errors import RunError

SCHEMA = 1
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0.0)]
Interval = tuple[float, float]


class Open(BaseModel):
    """A block that may carry more than is named here."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)


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
    scores: dict[str, SiteScore] = {}
    unscored: str | None = None
    shares: dict[str, Fraction] = {}


class Block(Open):
    """A part of the evaluation; for a value that is null, ``NAME_reason`` or ``reason`` says why."""

    reason: str | None = None

    def reason_for(self, name: str) -> str | None:
        """Why the value ``name`` is null, if the block says so."""
        found = (self.model_extra or {}).get(f"{name}_reason")
        return str(found) if found else self.reason


class Classifier(Block):
    """AUROC over findings: the mean over labels, its interval over patients, each label."""

    macro_auroc: Fraction | None = None
    ci95: Interval | None = None
    per_label: dict[str, Fraction | None] = {}
    num_train: Count | None = None
    num_test: Count | None = None


class ShareOfLabels(Classifier):
    """What learns from a share of the labels: the mean over ``draws``, each of other studies, and for all but the linear
    probe what it gains over that on the same studies.
    """

    draws: tuple[Fraction, ...] = ()
    gain_over_probe: float | None = None
    gain_over_probe_ci95: Interval | None = None


class MinedPrompts(Classifier):
    """Zero-shot in the words of reports, and what it gains over fixed prompts on the same findings."""

    num_labels_scored: Count | None = None
    num_reports: Count | None = None
    fixed_prompts: Fraction | None = None
    gain_over_fixed: float | None = None
    gain_over_fixed_ci95: Interval | None = None


class Subgroup(Classifier):
    """The probe on some of the test studies, and how far it is above (or below) the rest of them."""

    difference: float | None = None
    difference_ci95: Interval | None = None
    num_patients: Count | None = None


class Calibration(Block):
    """Whether the probe's probabilities can be taken at their word, beside what calibrated ones and prevalence would give."""

    ece: Fraction | None = None
    ece_if_calibrated: Interval | None = None
    brier: Fraction | None = None
    brier_ci95: Interval | None = None
    brier_of_prevalence: Fraction | None = None


class Trigger(Block):
    """A mark on images that lack a finding: how many of them pass for positive then, at worst and of each finding."""

    worst: Fraction | None = None
    worst_ci95: Interval | None = None
    worst_label: str | None = None
    rate: dict[str, Fraction | None] = {}


class Triggers(Block):
    """Marks that somebody may have planted; of unmarked images ``clean_rate`` pass."""

    clean_rate: Fraction | None = None
    patch: Trigger | None = None
    wave: Trigger | None = None


class Classification(Open):
    """Readings of the same features, and the probe on plain pixels that they have to beat."""

    linear_probe: Classifier | None = None
    label_shares: dict[str, ShareOfLabels] = {}
    subgroups: dict[str, dict[str, Subgroup]] = {}
    calibration: Calibration | None = None
    few_label_probe: Classifier | None = None
    fine_tune: dict[str, ShareOfLabels] = {}
    prompt_tune: dict[str, ShareOfLabels] = {}
    zero_shot: Classifier | None = None
    mined_prompts: MinedPrompts | None = None
    raw_pixels: Classifier | None = None
    triggers: Triggers | None = None


class Ranking(Block):
    """One direction of retrieval; recalls are fractions of the queries whose own partner is among the first k."""

    recall_1: Fraction | None = Field(default=None, alias="r@1")
    recall_5: Fraction | None = Field(default=None, alias="r@5")
    recall_10: Fraction | None = Field(default=None, alias="r@10")
    recall_10_ci95: Interval | None = Field(default=None, alias="r@10_ci95")
    gallery: Count | None = None
    label_precision_10: Fraction | None = Field(default=None, alias="label_precision@10")
    duplicate_aware: dict[str, Fraction] = {}
    chance: dict[str, Fraction | None] = {}


class Reranked(Block):
    """One direction with the first candidates in the match head's order, and what that gains at the first place."""

    recall_1: Fraction | None = Field(default=None, alias="r@1")
    recall_5: Fraction | None = Field(default=None, alias="r@5")
    recall_10: Fraction | None = Field(default=None, alias="r@10")
    gain_1: float | None = Field(default=None, alias="gain_r@1")
    gain_1_ci95: Interval | None = Field(default=None, alias="gain_r@1_ci95")


class Reranking(Block):
    """Retrieval both ways once more: the first ``top`` candidates of each query in the match head's order."""

    image_to_text: Reranked | None = None
    text_to_image: Reranked | None = None
    top: Count | None = None
    note: str | None = None


class Retrieval(Open):
    """Retrieval both ways."""

    image_to_text: Ranking | None = None
    text_to_image: Ranking | None = None
    reranked: Reranking | None = None


class RankingByFinding(Block):
    """One direction of retrieval where a candidate of the query's finding is right: shares of the first k, and hits."""

    precision_1: Fraction | None = Field(default=None, alias="p@1")
    precision_5: Fraction | None = Field(default=None, alias="p@5")
    precision_10: Fraction | None = Field(default=None, alias="p@10")
    hits_1: Fraction | None = Field(default=None, alias="h@1")
    hits_5: Fraction | None = Field(default=None, alias="h@5")
    hits_10: Fraction | None = Field(default=None, alias="h@10")
    chance: dict[str, Fraction] = {}


class ClassAccuracy(Block):
    """How often the nearest class is the right one: over all, and within each class."""

    accuracy: Fraction | None = None
    ci95: Interval | None = None
    per_label: dict[str, Fraction] = {}
    chance: Fraction | None = None


class Exclusive(Block):
    """Pairs with one of five findings alone, ``num_each`` of each where there were as many as ``available`` says."""

    num_each: Count | None = None
    available: dict[str, Count] = {}
    image_to_text: RankingByFinding | None = None
    text_to_image: RankingByFinding | None = None
    zero_shot: ClassAccuracy | None = None


class Fidelity(Block):
    """How close a drawn image comes to the real one on the hidden patches."""

    psnr_db: float | None = None
    psnr_db_ci95: Interval | None = None
    ssim: float | None = None


class ToldFidelity(Fidelity):
    """The same with the report in view, and what the report gained on the same images and masks."""

    gain_psnr_db: float | None = None
    gain_psnr_db_ci95: Interval | None = None


class Regeneration(Fidelity):
    """Regenerated images, alone and with the report in view, beside guesses that need no model."""

    mask_ratio: Fraction | None = None
    with_report: ToldFidelity | None = None
    baselines: dict[str, Fidelity] = {}


class Words(Block):
    """How well hidden words are told."""

    bits_per_token: float | None = None
    ci95: Interval | None = None
    top1: Fraction | None = None


class SeeingWords(Words):
    """The same with the image in view, and the bits that it saved on the same hidden words."""

    bits_saved: float | None = None
    bits_saved_ci95: Interval | None = None


class Language(Words):
    """Hidden words, from the report alone and with the image in view, beside guesses that need no model."""

    mask_ratio: Fraction | None = None
    with_image: SeeingWords | None = None
    baselines: dict[str, Words] = {}


class Membership(Block):
    """The attack on whole patients: AUC of telling those trained on from others; half is chance."""

    auc: float | None = None
    auc_ci95: Interval | None = None
    num_members: int | None = None
    num_non_members: int | None = None


class Evaluation(Open):
    """What the central evaluation found; ``skipped`` maps the place of a part that is absent to the reason.

    ``also``: the same of further held-out sets, by their names.
    """

    classification: Classification | None = None
    retrieval: Retrieval | None = None
    exclusive: Exclusive | None = None
    regeneration: Regeneration | None = None
    language: Language | None = None
    membership: Membership | None = None
    also: dict[str, Evaluation] = {}
    skipped: dict[str, str] = {}


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
    if culprit := _first_non_finite(values, ""):
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


def read_json(path: Path) -> Any:
    """Parsed JSON, None where there is no such file; raises RunError if it cannot be read or parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path.name}: {type(error).__name__}; expected one JSON document in UTF-8") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half; raises RunError on NaN or infinity."""
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise RunError(f"{path.name}: {_first_non_finite(data, '') or 'a value'} cannot be written as JSON; use null") from None
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Write, flush to disk and rename over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # JSON may spell half a character (a lone surrogate); it must not keep a report from being written.
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _first_non_finite(value: Any, path: str) -> str | None:
    """Where in nested JSON values the first NaN or infinity is."""
    if isinstance(value, float):
        return None if math.isfinite(value) else path
    if isinstance(value, Mapping):
        items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{position}]", item) for position, item in enumerate(value)]
    else:
        return None
    return next((culprit for key, item in items if (culprit := _first_non_finite(item, key))), None)
