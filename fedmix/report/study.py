"""A study read from its folder: every method's numbers over seeds, their intervals, and differences seed by seed.

Intervals are Student's t over seeds (mean plus or minus t s / sqrt n), so they cover initial weights, batches and the
draw of phantom sites' data, and not the draw of the held-out set, which all share. Differences are taken within a seed, where
both methods had the same sites and start, before their mean and interval. What is read is the cells' own run folders, so
an unfinished study is read as far as it has come: a number says over how many seeds it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scipy import stats

from fedmix import config
from fedmix.errors import ConfigError, RunError
from fedmix.report import measures, quantities
from fedmix.report.evaluated import Evaluation
from fedmix.report.files import read_json
from fedmix.report.measures import Measure
from fedmix.report.summary import Site

SCHEMA = 1
MAIN, BEST_SITE, POOLED = "fedmix", "best_site", ("centralised", "centralised_steps")
COSTS = "costs.json"
ALONE = "site_"  # begins the name of a method that is one site by itself
SLOWING = {"precision", "device", "micro_batch", "checkpoint_activations"}  # keys of federation that a step's time depends on
UNMEASURED = "not measured with this version of fedmix; `fedmix simulate CONFIG --out FOLDER --resume` measures it"
NOT_PLAIN = "not measured: a step with noise or with adapters takes other times than the plain step that is measured"
State = Literal["completed", "failed", "unfinished"]
Mark = tuple[str, str]  # a trigger, and the finding that it is to pass for

MEASURES: dict[str, Measure] = {  # names in study.json
    "zero_shot_auroc": measures.MEASURES[measures.ZERO_SHOT],
    "probe_auroc": measures.MEASURES[measures.LINEAR_PROBE],
    "few_label_probe_auroc": measures.FEW_LABEL_PROBE,
    "image_to_text_r10": measures.MEASURES[measures.IMAGE_TO_TEXT],
    "text_to_image_r10": measures.MEASURES[measures.TEXT_TO_IMAGE],
    "psnr_db": measures.MEASURES[measures.PSNR],
    "bits_per_token": measures.MEASURES[measures.BITS],
    "membership_auc": measures.MEMBERSHIP,
    "planted_mark": measures.PLANTED,
}
ABOUT = measures.ABOUT_METHOD | {
    MAIN: "the method of this study",
    "median": "each number's median over the sites",
    "trimmed_mean": "each number's mean without its extremes",
    "unguarded_mean": "the plain mean: nothing clipped or refused",
}
PLANTED = "planted_mark"
ATTACKS = ("membership_auc", PLANTED)  # what a model gives away, what was slipped into it; most studies attack none


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds and its 95 % interval; one seed has no interval."""

    mean: float
    interval: tuple[float, float] | None
    by_seed: Mapping[int, float]

    @property
    def num_seeds(self) -> int:
        """Over how many seeds."""
        return len(self.by_seed)

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out; what is asked of a difference."""
        return self.interval is not None and self.interval[0] * self.interval[1] > 0


@dataclass(frozen=True)
class Cost:
    """What a method's training took: steps of all sites, studies by stream, CPU seconds (None: ``why``), bytes sent."""

    steps: int = 0
    examples: Mapping[str, int] = field(default_factory=dict)
    core_s: float | None = None
    bytes_up: int | None = None
    why: str | None = None


@dataclass(frozen=True)
class Result:
    """One method in one cell."""

    scores: Mapping[str, float]
    cost: Cost
    site: str | None = None  # of best_site: which it was


@dataclass(frozen=True)
class Cell:
    """One regime with one seed, as far as it has come."""

    regime: str
    seed: int
    state: State
    cause: str | None
    methods: Mapping[str, Result]
    sites: tuple[Site, ...] = ()  # of a completed cell
    judged_on: str = ""  # sample sizes of its evaluation


@dataclass(frozen=True)
class Study:
    """All cells of a study; ``methods`` are those that any cell has, the main one first."""

    name: str
    seeds: tuple[int, ...]
    regimes: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    attacks: Mapping[str, config.Attack] = field(default_factory=dict)  # by regime; honest ones are not in it

    @property
    def num_done(self) -> int:
        """Completed cells."""
        return sum(cell.state == "completed" for cell in self.cells)

    @property
    def standing(self) -> str:
        """How far it is, as a sentence."""
        regimes, seeds = quantities.plural(len(self.regimes), "regime"), quantities.plural(len(self.seeds), "seed")
        failed = sum(cell.state == "failed" for cell in self.cells)
        text = (
            f"{self.num_done} of {quantities.plural(len(self.cells), 'run')} complete{f', {failed} failed' if failed else ''}"
        )
        return f"{text}: {regimes}, {seeds}{' each' if len(self.regimes) > 1 else ''}."

    @property
    def judged_on(self) -> str:
        """On how many held-out studies, as a sentence; runs that differ in it are told one after the other."""
        return " Other runs: ".join(dict.fromkeys(cell.judged_on for cell in self.cells if cell.judged_on))

    def estimate(self, regime: str, method: str, measure: str) -> Estimate | None:
        """A method's number over the seeds that have it; None if none has."""
        return estimate(self._values(regime, method, measure))

    def num_seeds(self, regime: str, method: str) -> int:
        """How many seeds have any of a method's numbers."""
        return sum(cell.regime == regime and method in cell.methods for cell in self.cells)

    def difference(self, regime: str, method: str, measure: str, *, of: str = MAIN) -> Estimate | None:
        """The main method, or another one, less a method, seed by seed; None if no seed has both."""
        ours, theirs = self._values(regime, of, measure), self._values(regime, method, measure)
        return estimate({seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs})

    def change(self, before: str, after: str, method: str, measure: str) -> Estimate | None:
        """A method's number in one regime less that in another, seed by seed; None if no seed has both."""
        then, now = self._values(before, method, measure), self._values(after, method, measure)
        return estimate({seed: now[seed] - then[seed] for seed in now if seed in then})

    def recovered_gap(self, regime: str, measure: str, pooled: str) -> float | None:
        """(main - best site) / (pooled - best site) of the means over the seeds that have all three.

        None without such seeds, and where pooling the data brought nothing over the best site: the ratio then says nothing.
        """
        ours, alone, together = (self._values(regime, method, measure) for method in (MAIN, BEST_SITE, pooled))
        seeds = ours.keys() & alone.keys() & together.keys()
        sign = 1 if MEASURES[measure].better == "higher" else -1
        whole = sign * sum(together[seed] - alone[seed] for seed in seeds)
        return sign * sum(ours[seed] - alone[seed] for seed in seeds) / whole if whole > 0 else None

    def cost(self, regime: str, method: str) -> Cost | None:
        """What a method took in the first cell that has it; seeds differ by nothing but the best site's name."""
        found = (cell.methods.get(method) for cell in self.cells if cell.regime == regime)
        return next((result.cost for result in found if result), None)

    def _values(self, regime: str, method: str, measure: str) -> dict[int, float]:
        found = {cell.seed: cell.methods.get(method) for cell in self.cells if cell.regime == regime}
        return {seed: result.scores[measure] for seed, result in found.items() if result and measure in result.scores}


def estimate(by_seed: Mapping[int, float]) -> Estimate | None:
    """Mean and Student's t interval of one number a seed; None without any."""
    values = list(by_seed.values())
    if not values:
        return None
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None, dict(by_seed))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Estimate(mean, (mean - half, mean + half), dict(by_seed))


def about_method(name: str) -> str:
    """What a method is, for readers of a study who do not know its name."""
    return ABOUT.get(name, "one site for itself" if name.startswith(ALONE) else "")


def is_study(folder: Path) -> bool:
    """Whether a folder holds a study and not one run: its config has seeds."""
    if (folder / "manifest.json").exists() or (folder / "report.json").exists():
        return False
    return (folder / "config.yaml").exists()


def read_study(folder: Path) -> Study:
    """A study as far as it has come; raises RunError if the folder holds none."""
    try:
        experiment = config.load(folder / "config.yaml")
        attacks = _attacks(experiment)
    except ConfigError as error:
        raise RunError(f"{folder} holds no readable study: {error}") from None
    if experiment.study is None:
        raise RunError(f"{folder} holds no study: its config.yaml has no seeds; give the folder of a study or of a run")
    step_costs = _step_costs(folder)
    cells = tuple(
        _read_cell(folder / regime / f"seed-{seed}", regime, seed, step_costs, _marks(attacks, regime))
        for regime in experiment.study.regimes
        for seed in experiment.study.seeds
    )
    methods = dict.fromkeys([MAIN, *(name for cell in cells for name in cell.methods)])
    return Study(experiment.name, experiment.study.seeds, tuple(experiment.study.regimes), tuple(methods), cells, attacks)


def as_json(study: Study) -> dict[str, Any]:
    """study.json: what scripts read. Keys change together with ``schema`` or not at all.

    ``cells`` hold each method's scores and cost; ``summary`` holds, by regime, method and measure, the mean over seeds, its
    95 % interval (null for one seed), the number of seeds, and ``less``: the same of main method less this one.
    """
    return {
        "schema": SCHEMA,
        "name": study.name,
        "written": time.time(),
        "seeds": list(study.seeds),
        "regimes": list(study.regimes),
        "methods": list(study.methods),
        "measures": {name: {"title": one.title, "unit": one.unit, "better": one.better} for name, one in MEASURES.items()},
        "interval": "Student's t over seeds, 95 %",
        "cells": [_cell_json(cell) for cell in study.cells],
        "summary": {
            regime: {method: _method_json(study, regime, method) for method in study.methods} for regime in study.regimes
        },
        "recovered_gap": {
            regime: {
                pooled: {measure: study.recovered_gap(regime, measure, pooled) for measure in MEASURES} for pooled in POOLED
            }
            for regime in study.regimes
        },
    }


def step_key(experiment: config.Experiment, stage: config.Stage, stream: str) -> str:
    """What decides how long an optimiser step of a stage takes at a site of a stream; the key of costs.json.

    Values that are no default count, so that the costs of a study are still found after a later version gained keys.
    """
    decides = [
        experiment.model.model_dump(mode="json", exclude_defaults=True, exclude={"size", "warm_start"}),
        [experiment.data.image_size, experiment.data.max_words],
        experiment.federation.model_dump(mode="json", exclude_defaults=True, include=SLOWING),
        stage.objectives.model_dump(mode="json", exclude_defaults=True),
        stage.augment.model_dump(mode="json", exclude_defaults=True),
        stage.optimiser.kind,
    ]
    short = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
    return f"{stream}/{stage.batch_size}/{short}"


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "regime": cell.regime,
        "seed": cell.seed,
        "state": cell.state,
        "cause": cell.cause,
        "folder": f"{cell.regime}/seed-{cell.seed}",
        "methods": {
            name: {
                "scores": dict(result.scores),
                "steps": result.cost.steps,
                "examples": dict(result.cost.examples),
                "core_s": result.cost.core_s,
                "bytes_up": result.cost.bytes_up,
                "site": result.site,
            }
            for name, result in cell.methods.items()
        },
    }


def _method_json(study: Study, regime: str, method: str) -> dict[str, Any]:
    found = {}
    for measure in MEASURES:
        own = study.estimate(regime, method, measure)
        if own is not None:
            less = study.difference(regime, method, measure) if method != MAIN else None
            found[measure] = estimate_json(own) | {"less": None if less is None else estimate_json(less)}
    return found


def estimate_json(one: Estimate) -> dict[str, Any]:
    """An estimate as study.json tells it."""
    interval = None if one.interval is None else list(one.interval)
    return {
        "mean": one.mean,
        "ci95": interval,
        "n": one.num_seeds,
        "by_seed": {str(key): value for key, value in one.by_seed.items()},
    }


def _step_costs(folder: Path) -> dict[str, float]:
    """CPU seconds of an optimiser step by ``step_key``; empty where nobody measured them."""
    found = read_json(folder / COSTS)
    steps = found.get("steps") if isinstance(found, dict) else None
    return {str(key): float(value) for key, value in steps.items()} if isinstance(steps, dict) else {}


def _attacks(experiment: config.Experiment) -> dict[str, config.Attack]:
    """The attack of every regime that has one."""
    regimes = experiment.study.regimes if experiment.study else ()
    found = {name: config.regime(experiment, name).attack for name in regimes}
    return {name: attack for name, attack in found.items() if attack is not None}


def _marks(attacks: Mapping[str, config.Attack], regime: str) -> list[Mark]:
    """The mark that a regime plants, and the finding it is to pass for; where all are honest, any that others plant."""
    chosen = list(attacks.values()) if regime not in attacks else [attacks[regime]]
    return [(attack.trigger, attack.finding) for attack in chosen if attack.finding is not None]


def _read_cell(folder: Path, regime: str, seed: int, step_costs: Mapping[str, float], marks: Sequence[Mark]) -> Cell:
    manifest, report = read_json(folder / "manifest.json"), read_json(folder / "report.json")
    said = manifest if isinstance(manifest, dict) else {}
    state: State = "unfinished"
    if said.get("state") == "failed":
        state = "failed"
    elif said.get("state") == "completed" and isinstance(report, dict):
        state = "completed"
    branches = _branches(report) if state == "completed" else _finished(folder)
    methods = {}
    for name, branch in branches.items():
        run = folder if name == MAIN else folder / "baselines" / branch.get("site", name)
        cost = _cost(run, step_costs)
        cost = replace(cost, bytes_up=0) if name == BEST_SITE or name.startswith(ALONE) else cost  # nothing leaves it
        methods[name] = Result(_scores(branch["evaluation"], marks), cost, branch.get("site"))
    sites = tuple(Site.model_validate(site) for site in report["sites"]) if state == "completed" else ()
    sizes = next((judged_on(Evaluation.model_validate(branch["evaluation"])) for branch in branches.values()), "")
    return Cell(regime, seed, state, said.get("cause"), methods, sites, sizes)


def judged_on(evaluation: Evaluation) -> str:
    """The sample sizes of an evaluation that it tells."""
    classified, found = evaluation.classification, evaluation.retrieval and evaluation.retrieval.image_to_text
    read = classified and (classified.zero_shot or classified.linear_probe)
    parts = []
    if read and read.num_test:
        parts.append(f"findings in {quantities.plural(read.num_test, 'held-out test study', 'held-out test studies')}")
    if found and found.gallery:
        chance = quantities.percent(measures.chance_at_10(found))
        parts.append(f"R@10 among {found.gallery:,} candidates, where guessing gives {chance}")
    if classified and classified.few_label_probe and classified.few_label_probe.num_train:
        parts.append(f"few labels are {classified.few_label_probe.num_train:,} labelled studies")
    return f"Judged on: {'; '.join(parts)}." if parts else ""


def _branches(report: Mapping[str, Any]) -> dict[str, Any]:
    """The main method and its baselines from report.json, in its order."""
    return {MAIN: {"evaluation": report["evaluation"]}} | dict(report["baselines"])


def _finished(folder: Path) -> dict[str, Any]:
    """What an unfinished cell has evaluated so far, oldest first."""
    places = {MAIN: folder} | {path.name: path for path in (folder / "baselines").glob("*")}
    found = {}
    for name, place in places.items():
        path = place / "evaluation" / "evaluation.json"
        kept = read_json(path)
        if isinstance(kept, dict) and "report" in kept:
            found[name] = (path.stat().st_mtime, {"evaluation": kept["report"]})
    return {name: branch for name, (_, branch) in sorted(found.items(), key=lambda item: item[1][0])}


def _scores(evaluation: Mapping[str, Any], marks: Sequence[Mark]) -> dict[str, float]:
    parsed = Evaluation.model_validate(evaluation)
    values = {name: measure.read(parsed).value for name, measure in MEASURES.items()}
    rates = [measures.passing_mark(parsed, trigger, finding) for trigger, finding in marks]
    values[PLANTED] = max((rate for rate in rates if rate is not None), default=None)
    return {name: value for name, value in values.items() if value is not None}


def _cost(run: Path, step_costs: Mapping[str, float]) -> Cost:
    """From what the run folder recorded: a pooled run says it itself, a federated one in the rows of its sites."""
    training = read_json(run / "training.json")
    if isinstance(training, dict):
        return Cost(int(training["steps"]), dict(training["examples"]), float(training["core_s"]), 0)
    if not (run / "metrics.jsonl").exists():
        return Cost(core_s=0.0, bytes_up=0)  # never trained
    experiment = config.load(run / "config.yaml")
    stages = {stage.name: stage for stage in experiment.stages}
    streams = {site.name: site.stream for site in experiment.data.sites}
    is_plain = experiment.privacy.mode != "dp" and experiment.privacy.trainable == "all"
    step_costs = step_costs if is_plain else {}
    steps, bytes_up, examples, core_s = 0, 0, dict[str, int](), 0.0
    for row in _site_rows(run / "metrics.jsonl"):
        stage = stages[row["stage"]]
        steps += stage.local_steps
        core_s += stage.local_steps * step_costs.get(step_key(experiment, stage, streams[row["site"]]), math.nan)
        bytes_up += int(row["values"].get("comm/bytes_up", 0))
        for stream in ("image", "text", "paired"):
            examples[stream] = examples.get(stream, 0) + int(row["values"].get(f"data/{stream}", 0))
    if math.isfinite(core_s):
        return Cost(steps, examples, core_s, bytes_up)
    return Cost(steps, examples, None, bytes_up, UNMEASURED if is_plain else NOT_PLAIN)


def _site_rows(path: Path) -> list[dict[str, Any]]:
    """One row for every update that was taken; a line torn by a kill is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("event") == "site":
            rows.append(row)
    return rows
