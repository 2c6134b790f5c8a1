"""Where a node's files are, and what its jobs read from them: the experiment, the shard, a model and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from client import parameters
from client.messages import Order, Phase
from fedmix import config
from fedmix.config.evaluating import MIN_PATIENTS
from fedmix.data.loading import Indices, Sampler, sampler_of
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError
from fedmix.federation import local
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner


@dataclass(frozen=True)
class Place:
    """Where a node's files are: its name, the experiment it agreed to, its prepared shard, and its own state folder.

    ``key``: the file of its registered key, and ``registered``: all sites' public keys; a simulated place has neither.
    ``min_patients``: fewest patients of whom a score may leave.
    """

    site: str
    experiment: Path
    shard: Path
    state: Path
    key: Path | None = None
    registered: Mapping[str, str] | None = None
    min_patients: int = MIN_PATIENTS


@dataclass(frozen=True)
class Materials:
    """What a job works with: the experiment and its stage, a model with what it is to learn, and batches."""

    experiment: config.Experiment
    stage: config.Stage
    learner: Learner
    sampler: Sampler


def materials(place: Place, stage_name: str) -> Materials:
    """What the site at a place trains a stage with."""
    experiment = experiment_of(place.experiment)
    return Materials(
        experiment,
        stage_named(experiment, stage_name),
        learner_of(place.experiment, stage_name),
        sampler_at(place.shard, place.experiment, place.site, stage_name),
    )


# Processes that serve several rounds open things once; a deployed node's process serves one message and pays once.


@lru_cache(maxsize=4)
def experiment_of(path: Path) -> config.Experiment:
    """The experiment in a file. Raises ConfigError whose words do not name the file."""
    try:
        return config.load(path)
    except ConfigError as error:  # a refusal leaves the site, and a path may name a patient or a person
        raise ConfigError(str(error).replace(str(path), "the site's experiment file")) from None


@lru_cache(maxsize=4)
def tokenizer_of(path: Path | None) -> Tokenizer:
    """A tokenizer's folder, None for the shipped one."""
    return Tokenizer.load(path)


@lru_cache(maxsize=32)
def sampler_at(shard_path: Path, experiment_path: Path, site_name: str, stage_name: str) -> Sampler:
    """A site's batches in a stage. The greeting has compared the shard's hashes; here its sizes are enough."""
    experiment = experiment_of(experiment_path)
    site, stage = site_of(experiment, site_name), stage_named(experiment, stage_name)
    shard = Shard.open(shard_path, verify=False)
    check_shard(shard, site, experiment)
    draws = local.seed_of(experiment.seed, site.name, stage.name, "batches")
    tokenizer = tokenizer_of(experiment.data.tokenizer)
    return sampler_of(stage, shard, rows_of(shard, site.stream), seed=draws, tokenizer=tokenizer)


@lru_cache(maxsize=1)
def learner_of(experiment_path: Path, stage_name: str) -> Learner:
    """A model to load an order's parameters into. Nothing of an earlier order is left that a later one could read:
    what a site's stream reaches is overwritten, and the rest stays out of its losses.
    """
    experiment = experiment_of(experiment_path)
    tokenizer = tokenizer_of(experiment.data.tokenizer)
    model = parameters.model_of(experiment, tokenizer)
    word_ids = WordIds.of(tokenizer)
    model.to(local.device_named(experiment.federation.device))
    return Learner(model, stage_named(experiment, stage_name).objectives, word_ids)


def rows_of(shard: Shard, stream: config.StreamName) -> Indices:
    """The studies of a shard that a site of a stream trains on."""
    return shard.select("train", stream)


def site_of(experiment: config.Experiment, name: str) -> config.Site:
    """A site by name. Raises ConfigError for one that the experiment does not know."""
    for site in experiment.data.sites:
        if site.name == name:
            return site
    raise ConfigError(f"the experiment knows no site {name!r}; add it to data.sites")


def stage_named(experiment: config.Experiment, name: str) -> config.Stage:
    """A stage by name."""
    return next(stage for stage in experiment.stages if stage.name == name)


def stage_of(order: Order | Phase, experiment: config.Experiment, site: config.Site) -> tuple[config.Stage, int]:
    """The stage that an order belongs to and the stage's first round, if this site agreed to take part in it."""
    if order.fingerprint != experiment.fingerprint():
        raise ConfigError("the server runs another experiment than the one given to this site (fingerprints differ)")
    stage, round_in_stage = experiment.stage_of(order.round_number)
    if site not in config.sites_of(stage, experiment.data.sites):
        raise ConfigError(f"the server asks for stage {stage.name}, in which this site takes no part")
    return stage, order.round_number - round_in_stage


def check_shard(shard: Shard, site: config.Site, experiment: config.Experiment) -> None:
    """Refuse a shard that was prepared for something else, before hours of training."""
    if shard.image_size != experiment.data.image_size and bool(shard.has_image.any()):
        raise DataError(
            f"its shard holds images of {shard.image_size} px, the experiment wants "
            f"{experiment.data.image_size}; prepare it again with --size {experiment.data.image_size}"
        )
    wanted = tokenizer_of(experiment.data.tokenizer).fingerprint
    if bool(shard.has_text.any()) and shard.tokenizer_fingerprint != wanted:
        raise DataError("its shard was prepared with another tokenizer than the experiment's; prepare it again with that one")
    if len(rows_of(shard, site.stream)) == 0:
        counts = ", ".join(f"{count} {name}" for name, count in shard.stream_counts.items() if count) or "nothing"
        raise DataError(
            f"it is to train on {site.stream} studies, but its shard's training split holds none "
            f"({counts} over all splits); give it the stream it holds, or another shard"
        )
