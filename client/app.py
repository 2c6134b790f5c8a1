"""The ClientApp: what runs at a hospital when the server asks who is there or orders a round of training.

It reads the experiment the hospital was given (not one that travels with an order), trains on the hospital's prepared
shard, and answers with an update or with a reason. The same app runs in-process, on Ray and under a SuperNode; only
``locate`` differs, which says where this node's files are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import messages
from client.state import OptimiserStore
from fedmix import config
from fedmix.data.loading import Indices, Sampler
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError, FedmixError
from fedmix.federation import local
from fedmix.federation.update import digest
from fedmix.model.encoder import MixedModel
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner


@dataclass(frozen=True)
class Place:
    """Where a node's files are: its name, the experiment it agreed to, its prepared shard, and its own state folder."""

    site: str
    experiment: Path
    shard: Path
    state: Path


def build_app(locate: Callable[[Context], Place]) -> ClientApp:
    """A ClientApp for the node that ``locate`` describes."""
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        try:
            return _greet(message, locate(context))
        except FedmixError as error:
            return messages.refusal(message, str(error))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            return _train(message, locate(context))
        except FedmixError as error:
            return messages.refusal(message, str(error))

    return app


def from_node_config(context: Context) -> Place:
    """The place that a SuperNode's ``--node-config`` describes: site, experiment, shard, state."""
    missing = [key for key in ("site", "experiment", "shard", "state") if key not in context.node_config]
    if missing:
        raise ConfigError(f"the SuperNode's --node-config lacks {', '.join(missing)}")
    values = {key: str(context.node_config[key]) for key in ("site", "experiment", "shard", "state")}
    return Place(values["site"], Path(values["experiment"]), Path(values["shard"]), Path(values["state"]))


app = build_app(from_node_config)


def _greet(message: Message, place: Place) -> Message:
    experiment = _experiment(place.experiment)
    site = _site(experiment, place.site)
    shard = _shard(place.shard)
    _check(shard, site, experiment)
    return messages.greeting(
        message,
        site=site.name,
        stream=site.stream,
        fingerprint=experiment.fingerprint(),
        studies=len(_rows(shard, site.stream)),
    )


def _train(message: Message, place: Place) -> Message:
    order = messages.read_order(message)
    experiment = _experiment(place.experiment)
    fingerprint = experiment.fingerprint()
    if order.fingerprint != fingerprint:
        raise ConfigError("the server runs another experiment than the one given to this site (fingerprints differ)")
    site = _site(experiment, place.site)
    stage, round_in_stage = experiment.stage_of(order.round_number)
    torch.set_num_threads(experiment.federation.threads_per_site)
    learner = _learner(experiment, stage)
    _load(learner.model, order)
    first_step = round_in_stage * stage.local_steps
    store = OptimiserStore(place.state, order.run)
    keeps_state = stage.optimiser.keep_state and round_in_stage > 0
    optimiser_state = store.before(order.round_number) if keeps_state else None
    sampler = _sampler(place.shard, site, stage, experiment.seed)
    started = time.time()
    update, optimiser_state = local.train(
        learner,
        sampler,
        local.Assignment(site.name, stage, first_step, experiment.seed),
        optimiser_state=optimiser_state,
        precision=experiment.federation.precision,
    )
    trained_s = (started, time.time())
    if stage.optimiser.keep_state:
        store.save(order.round_number, optimiser_state)
    return messages.reply(message, order, update, fingerprint=fingerprint, trained_s=trained_s)


def _load(model: MixedModel, order: messages.Order) -> None:
    """Copy the server's parameters in; those it left out belong to towers that this site does not train."""
    if digest(order.parameters) != order.base:
        raise DataError("the server's parameters were damaged on the way (hash differs); the next round sends them again")
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in order.parameters.items():
            if name not in own or own[name].shape != value.shape:
                raise ConfigError(f"the server's model has {name} as {tuple(value.shape)}, this experiment's has not")
            own[name].copy_(value)


def _check(shard: Shard, site: config.Site, experiment: config.Experiment) -> None:
    """Refuse a shard that was prepared for something else, before hours of training."""
    if shard.image_size != experiment.data.image_size and bool(shard.has_image.any()):
        raise DataError(
            f"site {site.name}: its shard holds images of {shard.image_size} px, the experiment wants "
            f"{experiment.data.image_size}; prepare it again with --size {experiment.data.image_size}"
        )
    wanted = _tokenizer(experiment.data.tokenizer).fingerprint
    if bool(shard.has_text.any()) and shard.tokenizer_fingerprint != wanted:
        raise DataError(
            f"site {site.name}: its shard was prepared with another tokenizer; prepare it again with this experiment's"
        )
    if len(_rows(shard, site.stream)) == 0:
        counts = ", ".join(f"{count} {name}" for name, count in shard.stream_counts.items() if count) or "nothing"
        raise DataError(
            f"site {site.name} is to train on {site.stream} studies, but its shard's training split holds none "
            f"({counts} over all splits); give the site the stream it holds, or another shard"
        )


# Processes that serve several rounds open things once; a deployed node's process serves one message and pays once.


@lru_cache(maxsize=4)
def _experiment(path: Path) -> config.Experiment:
    return config.load(path)


@lru_cache(maxsize=4)
def _tokenizer(path: Path | None) -> Tokenizer:
    return Tokenizer.load(path)


@lru_cache(maxsize=32)
def _shard(path: Path) -> Shard:
    return Shard.open(path)


@lru_cache(maxsize=32)
def _sampler(path: Path, site: config.Site, stage: config.Stage, seed: int) -> Sampler:
    shard = _shard(path)
    return Sampler(
        shard,
        _rows(shard, site.stream),
        batch_size=stage.batch_size,
        seed=local.seed_of(seed, site.name, stage.name, "batches"),
    )


def _rows(shard: Shard, stream: config.StreamName) -> Indices:
    return shard.select("train", stream)


def _site(experiment: config.Experiment, name: str) -> config.Site:
    for site in experiment.data.sites:
        if site.name == name:
            return site
    raise ConfigError(f"the experiment knows no site {name!r}; add it to data.sites")


def _learner(experiment: config.Experiment, stage: config.Stage) -> Learner:
    tokenizer = _tokenizer(experiment.data.tokenizer)
    model = MixedModel(
        experiment.model,
        image_size=experiment.data.image_size,
        max_words=experiment.data.max_words,
        vocabulary=tokenizer.vocab_size,
    )
    return Learner(model, stage.objectives, WordIds(tokenizer.mask_id, tuple(sorted(tokenizer.special_ids))))
