"""What a node answers when it is asked how good the run's last model is on patients that it never trained on."""

from __future__ import annotations

import torch
from flwr.app import Message

from client import messages, parameters
from client.place import Place, check_shard, experiment_of, learner_of, site_of
from fedmix import config
from fedmix.data.loading import Indices
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError
from fedmix.federation import scoring
from fedmix.federation.local import seed_of


def scores(message: Message, place: Place) -> Message:
    """Sums over this site's held-out studies, of every measure that its kind of data and the model's objectives allow."""
    order = messages.read_order(message)
    experiment = experiment_of(place.experiment)
    site = site_of(experiment, place.site)
    check_asked(order.fingerprint, order.round_number, experiment)
    torch.set_num_threads(experiment.federation.threads_per_site)
    shard = Shard.open(place.shard, verify=False)
    check_shard(shard, site, experiment)
    learner = learner_of(place.experiment, experiment.stages[-1].name)
    parameters.load_whole(learner.model, order)
    seed, rows = asked_of(shard, site, experiment)
    held = scoring.Held(shard, rows, learner.word_ids, seed)
    names = scoring.measures_of(site.stream, experiment.trained_on)
    return messages.scores_reply(
        message, order, site.name, scoring.score(learner.model, held, names, min_patients=place.min_patients)
    )


def asked_of(shard: Shard, site: config.Site, experiment: config.Experiment) -> tuple[int, Indices]:
    """The seed that decides what is hidden, and the held-out studies that a site scores a model on."""
    seed = seed_of(experiment.seed, site.name, "scores")
    return seed, scoring.held_out(shard, site.stream, seed)


def check_asked(fingerprint: str, round_number: int, experiment: config.Experiment) -> None:
    """Refuse to score but the last model of an experiment that says that its sites do."""
    if fingerprint != experiment.fingerprint():
        raise ConfigError("the server runs another experiment than the one given to this site (fingerprints differ)")
    if not experiment.evaluation.at_sites or round_number != experiment.num_rounds:
        raise ConfigError("the experiment given to this site has it score the last round's model at most, and no other")
