"""What else one could do with the same sites, by name: an empty mapping under ``baselines:`` is enough for these.

| name | what it is |
|---|---|
| random_init | the untrained model |
| public_init | what training begins with: the files of model.warm_start, never trained here |
| fedavg_all, modality_exact, fedcola | this experiment's stages under that rule of aggregation |
| paired_only | the stages of the paired sites alone, averaged by FedAvg |
| local_only, best_site | each paired site for itself (each site where none has pairs, or where sites score models |
| | themselves: evaluation.at_sites); the better one of the former is the best site |
| leave_one_out | for each site a federation without it; what the central evaluation loses is what the site gave |
| one_shot | every stage as one round: a site takes all of its steps at once, and models are averaged once |
| centralised | all data in one place, EQUAL SAMPLES and batch size: every batch the sites would see, one after the other, |
| | so as many steps in sequence as all sites together take |
| centralised_steps | all data in one place, EQUAL STEPS and samples: a step's batch is the union of the sites' batches of |
| | that step, so as many steps in sequence as one site takes |

Both pooled baselines see each study as often as the federation does and follow one cosine a stage. The first holds the
batch size and lets the steps grow with the number of sites; the second holds the steps and lets the batch grow.
Overrides are merged before the name is looked at, so ``one_shot: {seed: 5}`` means both.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from fedmix import config
from fedmix.batch import Batch
from fedmix.data.loading import Sampler, pad, sampler_of
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError
from fedmix.federation import local
from fedmix.federation.microbatch import parts_of
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner
from fedmix.report.site_value import WITHOUT
from server import held_out as central
from server.store import Parameters

RANDOM_INIT, PUBLIC_INIT, BEST_SITE = "random_init", "public_init", "best_site"
UNTRAINED = (RANDOM_INIT, PUBLIC_INIT)
LOCAL_ONLY = ("local_only", BEST_SITE)
LEAVE_ONE_OUT = "leave_one_out"
RULES = get_args(config.Aggregation.model_fields["rule"].annotation)
# By which number the best site is chosen: the first that all of them have. It is read from the test studies, which
# flatters the best site and nobody else.
BEST_BY = (
    ("classification", "zero_shot", "macro_auroc"),
    ("classification", "linear_probe", "macro_auroc"),
    ("regeneration", "psnr_db"),
)


@dataclass(frozen=True)
class Interleaved:
    """The batches of several sites in turn, one a step: equal samples, more steps."""

    samplers: Sequence[Sampler]

    def batch(self, step: int) -> Batch:
        """Site ``step mod number of sites``'s next batch."""
        turn, site = divmod(step, len(self.samplers))
        return self.samplers[site].batch(turn)


@dataclass(frozen=True)
class Union:
    """The batches of several sites as one, every step: equal samples, equal steps."""

    samplers: Sequence[Sampler]

    def batch(self, step: int) -> Batch:
        """All sites' batches of this step."""
        return union([sampler.batch(step) for sampler in self.samplers])


def union(batches: Sequence[Batch]) -> Batch:
    """Batches as one, study after study; reports padded to the longest of all."""
    images = [batch.image for batch in batches if batch.image is not None]
    texts = [row for batch in batches if batch.text is not None for row in batch.text]
    patients = [batch.patient for batch in batches if batch.patient is not None]
    findings = [batch.findings for batch in batches if batch.findings is not None]
    return Batch(
        image=torch.cat(images) if images else None,
        text=pad(texts) if texts else None,
        has_image=torch.cat([batch.has_image for batch in batches]),
        has_text=torch.cat([batch.has_text for batch in batches]),
        patient=torch.cat(patients) if len(patients) == len(batches) else None,
        findings=torch.cat(findings) if len(findings) == len(batches) else None,
    )


@dataclass(frozen=True)
class Pooled:
    """What pooled training gave and took: parameters, optimiser steps, studies by stream, CPU seconds."""

    parameters: Parameters
    steps: int
    examples: dict[str, int]
    core_s: float


def centralised(experiment: config.Experiment, shards: Mapping[str, Path], tokenizer: Tokenizer) -> Pooled:
    """Pooled training on the same examples at the same batch size: every batch of every site, one after the other.

    Equal samples, but as many sequential steps as all sites together take; its lead is not the cost of federation alone.
    """
    return _pooled(experiment, shards, tokenizer, Interleaved)


def centralised_steps(experiment: config.Experiment, shards: Mapping[str, Path], tokenizer: Tokenizer) -> Pooled:
    """Pooled training on the same examples in as many steps as one site takes: every step sees all sites' batches.

    What is left of its lead is the cost of federation: sites that step apart for a round instead of together.
    """
    return _pooled(experiment, shards, tokenizer, Union)


# Baselines that are no federation. Everything else is a federated run with other values: ``federated``.
SPECIAL: dict[str, Callable[[config.Experiment, Mapping[str, Path], Tokenizer], Pooled]] = {
    "centralised": centralised,
    "centralised_steps": centralised_steps,
}


def check(experiment: config.Experiment) -> None:
    """Raise ConfigError if a baseline's meaning does not fit the experiment, before anything is trained."""
    for name in experiment.baselines:
        if name not in SPECIAL:
            federated(experiment, name)


def federated(experiment: config.Experiment, name: str) -> dict[str, config.Experiment]:
    """The runs that a baseline stands for, by their names in the report: one, or for local_only and leave_one_out one a site.

    Raises ConfigError if the name's meaning does not fit the experiment.
    """
    other, wanted = config.variant(experiment, name), experiment.baselines[name]
    if name in LOCAL_ONLY:
        sites = other.data.sites if other.evaluation.at_sites else lonely(other)
        return {alone_name(site): _alone(other, site) for site in sites}
    if name == LEAVE_ONE_OUT:
        return {f"{WITHOUT}{site.name}": _without(other, site) for site in other.data.sites}
    if name == "one_shot":
        return {name: one_shot(other)}
    if name in RULES and "rule" not in _section(wanted, "aggregation"):
        return {name: _under_rule(other, name, keep_stages="stages" in wanted)}
    return {name: other}


def one_shot(experiment: config.Experiment) -> config.Experiment:
    """Every stage as one round with all of its steps: one average of the sites' models a stage."""
    stages = [
        stage.model_dump(mode="json") | {"rounds": 1, "local_steps": stage.rounds * stage.local_steps}
        for stage in experiment.stages
    ]
    return _changed(experiment, stages=stages)


def best(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Which of several sites' evaluations (branches of report.json) is the best by BEST_BY."""
    for path in BEST_BY:
        values = {name: _at(evaluation, path) for name, evaluation in evaluations.items()}
        found = {name: value for name, value in values.items() if isinstance(value, float)}
        if found and len(found) == len(evaluations):
            return max(found, key=found.__getitem__)
    return next(iter(evaluations))


def alone_name(site: config.Site) -> str:
    """What the run of a site that trains for itself is called in the report."""
    return f"site_{site.name}"


def lonely(experiment: config.Experiment) -> list[config.Site]:
    """The sites among which the best is looked for: those with pairs, for no other learns both kinds; all where none has."""
    paired = [site for site in experiment.data.sites if site.stream == "paired"]
    return paired or list(experiment.data.sites)


def _alone(experiment: config.Experiment, site: config.Site) -> config.Experiment:
    stages = [
        stage.model_dump(mode="json") | {"sites": [site.name]}
        for stage in experiment.stages
        if site in config.sites_of(stage, experiment.data.sites)
    ]
    if not stages:
        raise ConfigError(f"baselines.local_only: site {site.name} takes part in no stage, so it cannot be trained alone")
    return _changed(experiment, stages=stages, federation=_quorum_of(experiment, [[site]]), secure_sum=None)


def _without(experiment: config.Experiment, left_out: config.Site) -> config.Experiment:
    """The stages with their other sites; one that only this site trains in falls away."""
    stages, sites_of_stage = [], []
    for stage in experiment.stages:
        others = [site for site in config.sites_of(stage, experiment.data.sites) if site != left_out]
        if others:
            stages.append(stage.model_dump(mode="json") | {"sites": [site.name for site in others]})
            sites_of_stage.append(others)
    if not stages:
        raise ConfigError(f"baselines.leave_one_out: without {left_out.name} no site is left; take this baseline out")
    return _changed(experiment, stages=stages, federation=_quorum_of(experiment, sites_of_stage))


def _quorum_of(experiment: config.Experiment, sites_of_stage: Sequence[Sequence[config.Site]]) -> dict[str, Any]:
    """The federation with a quorum that the sites of every stage can meet; a smaller one stays as it is."""
    federation = experiment.federation
    streams: Counter[str] = Counter(
        site.stream for site in {site.name: site for sites in sites_of_stage for site in sites}.values()
    )
    quorum = {
        "min_sites": min(federation.min_sites, *map(len, sites_of_stage)),
        "min_sites_of_stream": {
            stream: min(count, streams[stream]) for stream, count in federation.min_sites_of_stream.model_dump().items()
        },
    }
    return federation.model_dump(mode="json") | quorum


def _under_rule(experiment: config.Experiment, rule: str, *, keep_stages: bool) -> config.Experiment:
    """The experiment under another rule; FedAvg among paired sites takes part in nothing but their stages."""
    aggregation = experiment.aggregation.model_dump(mode="json") | {"rule": rule}
    if rule != "paired_only" or keep_stages:
        return _changed(experiment, aggregation=aggregation)
    sites = experiment.data.sites
    stages = [
        stage.model_dump(mode="json") | {"streams": ["paired"]}
        for stage in experiment.stages
        if any(site.stream == "paired" for site in config.sites_of(stage, sites))
    ]
    if not stages:
        raise ConfigError("baselines.paired_only: no stage has a paired site; give one pairs, or take this baseline out")
    return _changed(experiment, stages=stages, aggregation=aggregation)


def _changed(experiment: config.Experiment, **sections: Any) -> config.Experiment:
    return config.build(experiment.model_dump(mode="json") | sections, source=f"baselines.{experiment.name}")


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _pooled(
    experiment: config.Experiment,
    shards: Mapping[str, Path],
    tokenizer: Tokenizer,
    together: type[Interleaved] | type[Union],
) -> Pooled:
    model = central.initial_model(experiment, tokenizer)
    word_ids = WordIds.of(tokenizer)
    steps, examples, before = 0, dict.fromkeys(("image", "text", "paired"), 0), time.process_time()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(experiment.federation.threads_per_site)  # as at a site: the number is part of the result
    try:
        for stage in experiment.stages:
            sites = config.sites_of(stage, experiment.data.sites)
            batches = together([_sampler(shards[site.name], site, stage, experiment.seed, tokenizer) for site in sites])
            turns = len(sites) if together is Interleaved else 1
            pooled = stage.model_copy(update={"rounds": 1, "local_steps": stage.rounds * stage.local_steps * turns})
            update, _ = local.train(
                Learner(model, stage.objectives, word_ids),
                batches,
                local.Assignment("pooled", pooled, 0, experiment.seed),
                precision=experiment.federation.precision,
                parts=parts_of(experiment.federation),
            )
            steps += update.steps
            for stream, count in update.examples.items():
                examples[stream] += count
    finally:
        torch.set_num_threads(num_threads)
    return Pooled(central.parameters_of(model), steps, examples, time.process_time() - before)


def _sampler(path: Path, site: config.Site, stage: config.Stage, seed: int, tokenizer: Tokenizer) -> Sampler:
    shard = Shard.open(path)
    rows = shard.select("train", site.stream)
    if not len(rows):
        raise DataError(f"site {site.name} has no {site.stream} study in its training split")
    draws = local.seed_of(seed, site.name, stage.name, "batches")
    return sampler_of(stage, shard, rows, seed=draws, tokenizer=tokenizer)
