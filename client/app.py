"""The ClientApp: what runs at a hospital when the server asks who is there or orders a round of training.

It reads the experiment the hospital was given (not one that travels with an order), trains on the hospital's prepared
shard, and answers with an update or with a reason. The same app runs in-process, on Ray and under a SuperNode; only
``locate`` differs, which says where this node's files are.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client import gate, messages, parameters, ranks
from client.home import Home
from client.secure import SecureSite
from client.secure_state import Attempt
from client.state import SiteState
from fedmix import config
from fedmix.data.loading import Indices, Sampler, sampler_of
from fedmix.data.shard import Shard
from fedmix.data.tokenizer import Tokenizer
from fedmix.errors import ConfigError, DataError, FedmixError, PolicyError
from fedmix.federation import compression, local
from fedmix.federation.local import Start
from fedmix.federation.microbatch import parts_of
from fedmix.federation.optimisers import OptimiserState
from fedmix.federation.trainable import narrowed
from fedmix.federation.update import Update
from fedmix.objectives.masking import WordIds
from fedmix.objectives.mixture import Learner

if TYPE_CHECKING:
    from client.noisy_updates import SpentUpdate
    from client.private import Spent


@dataclass(frozen=True)
class Place:
    """Where a node's files are: its name, the experiment it agreed to, its prepared shard, and its own state folder.

    ``key``: the file of its registered key, and ``registered``: all sites' public keys; a simulated place has neither.
    """

    site: str
    experiment: Path
    shard: Path
    state: Path
    key: Path | None = None
    registered: Mapping[str, str] | None = None


Locate = Callable[[Context], Place | Home]
Job = Callable[[Message, Place], Message]
PHASES = ("keys", "shares", "unmask")  # of a secure sum, beside the order to train


def build_app(locate: Locate) -> ClientApp:
    """A ClientApp for the node that ``locate`` describes: a simulated place, or a hospital's home, whose policy rules."""
    return _app(_greet, _train, {"keys": _keys, "shares": _shares, "unmask": _unmask}, locate)


def build_refusal(why: str, locate: Locate) -> ClientApp:
    """A ClientApp that answers everything with a refusal, which is in the ledger of a home."""

    def refuse(message: Message, place: Place) -> Message:
        raise PolicyError(why)

    return _app(refuse, refuse, dict.fromkeys(PHASES, refuse), locate)


def _app(greet: Job, train: Job, phases: Mapping[str, Job], locate: Locate) -> ClientApp:
    """A ClientApp of one job for each kind of message; ``phases``: those of a secure sum, by name."""
    app = ClientApp()
    app.query()(partial(_answer, greet, locate))
    app.train()(partial(_answer, train, locate))
    for name, job in phases.items():
        app.query(name)(partial(_answer, job, locate))
    return app


def _answer(job: Job, locate: Locate, message: Message, context: Context) -> Message:
    """A job's reply, or a refusal; what a bug raises is named by its kind only, for its text may quote data."""
    place: Place | Home | None = None
    try:
        place = locate(context)
        if isinstance(place, Place):
            return _sealed(message, job(message, place), place)
        return gate.guarded(
            place,
            message,
            lambda admitted: job(message, _place(place, admitted)),
            _trained_shapes,
            lambda admitted, answer: _sealed(message, answer, _place(place, admitted)),
        )
    except parameters.NeedsAllError as error:
        return messages.refusal(message, str(error), messages.NEEDS_ALL)
    except FedmixError as error:
        return messages.refusal(message, str(error))
    except Exception as error:  # it must reach the server as a reply, or the round would wait for it
        if place is not None:
            _keep_details(place.state)
        return messages.refusal(
            message, f"the site's job failed with {type(error).__name__}; last_error.txt in its state folder has the details"
        )


def _keep_details(state: Path) -> None:
    """Leave the traceback where the site's engineer finds it, and nobody else."""
    with contextlib.suppress(OSError):
        state.mkdir(parents=True, exist_ok=True)
        (state / "last_error.txt").write_text(traceback.format_exc())


def from_node_config(context: Context) -> Place | Home:
    """What a SuperNode's ``--node-config`` describes: a place by site, experiment, shard, state; a home by site, home."""
    if "home" in context.node_config:
        home = Home(Path(str(context.node_config["home"])))
        if home.settings().name != context.node_config.get("site"):
            raise ConfigError("the SuperNode's --node-config names another site than its home's site.yaml")
        return home
    missing = [key for key in ("site", "experiment", "shard", "state") if key not in context.node_config]
    if missing:
        raise ConfigError(f"the SuperNode's --node-config lacks {', '.join(missing)}")
    values = {key: str(context.node_config[key]) for key in ("site", "experiment", "shard", "state")}
    return Place(values["site"], Path(values["experiment"]), Path(values["shard"]), Path(values["state"]))


def _place(home: Home, admitted: gate.Admitted) -> Place:
    """Where a job that the gate has admitted finds its files."""
    return Place(admitted.site, admitted.experiment_file, admitted.shard, home.state, home.key, admitted.keys)


def _trained_shapes(admitted: gate.Admitted, round_number: int) -> gate.Shapes:
    """The parameters of which this site may send a change, and their shapes."""
    stage, _ = admitted.experiment.stage_of(round_number)
    model = _learner(admitted.experiment_file, stage.name).model
    return {name: value.shape for name, value in parameters.reached(model, admitted.stream).items()}


def _greet(message: Message, place: Place) -> Message:
    """Say who this site is, once everything it was given has been found to fit."""
    experiment = _experiment(place.experiment)
    site = _site(experiment, place.site)
    try:
        shard = Shard.open(place.shard)  # reads every byte once: damage is found before hours of training
        _check(shard, site, experiment)
        local.device_named(experiment.federation.device)
    except DataError as error:
        raise DataError(f"site {site.name}: {error}") from None
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
    site = _site(experiment, place.site)
    stage, stage_began = _stage_of(order, experiment, site)
    if experiment.secure_sum is not None:
        _opened(message, place)  # before hours of training whose update could not leave
    torch.set_num_threads(experiment.federation.threads_per_site)
    job = materials(place, stage.name)
    state = SiteState(place.state, order.run)
    state.prepare()
    received = parameters.load(job.learner.model, order, site.stream, state)
    memory = state.before(order.round_number, stage_began=stage_began)
    if not stage.optimiser.keep_state:
        memory = replace(memory, moments={})
    first_step = (order.round_number - stage_began) * stage.local_steps
    spent, noise = _spend(place, job, order), _spend_update(place, job, order)
    with ThreadPoolExecutor(max_workers=1) as disk:  # a large model's files are written while the site computes
        kept = [disk.submit(state.keep_received, received)] if order.parameters else []
        started = time.time()
        with narrowed(job.learner.model, experiment.privacy, experiment.seed, stage.name) as whole:
            if spent is None:
                update, moments = _steps(place, job, first_step, memory.moments, order.second_moments)
            else:
                update, moments = _private_steps(place, job, first_step, Start(memory.moments, order.second_moments), spent)
        update = whole(update) if noise is None else noise.cover(whole(update))
        trained_s = (started, time.time())
        kept.append(disk.submit(state.keep_moments, order.round_number, moments if stage.optimiser.keep_state else {}))
        # The seed holds the round and nothing that a repeat of it would change.
        chance = torch.Generator().manual_seed(local.seed_of(experiment.seed, site.name, order.round_number, "wire"))
        coded, residual = compression.encode(update.deltas, memory.residual, experiment.wire, chance)
        for written in kept:
            written.result()
    # Before the reply: a committed round must find it.
    state.finish(order.round_number, residual)
    counted = spent or noise
    return messages.reply(message, order, update, coded, trained_s=trained_s, privacy=counted.facts() if counted else {})


def _secure_site(message: Message, place: Place) -> SecureSite:
    """This site in the attempt at a round's secure sum that a message is of."""
    phase, experiment = messages.read_phase(message), _experiment(place.experiment)
    site = _site(experiment, place.site)
    stage, _ = _stage_of(phase, experiment, site)
    if experiment.secure_sum is None:
        raise PolicyError("the experiment given to this site has no secure sum")
    return SecureSite(
        site=site.name,
        phase=phase,
        streams={one.name: one.stream for one in config.sites_of(stage, experiment.data.sites)},
        studies=len(_rows(Shard.open(place.shard, verify=False), site.stream)),
        stage=stage,
        settings=experiment.secure_sum,
        aggregation=experiment.aggregation,
        state=place.state,
        key=place.key,
        registered=place.registered,
    )


def _keys(message: Message, place: Place) -> Message:
    secure = _secure_site(message, place)
    signed = secure.make_keys()
    keys = ConfigRecord({"content": signed.content, "signature": signed.signature, "signer": signed.signer})
    return messages.phase_reply(message, secure.phase, secure.site, "keys", keys)


def _shares(message: Message, place: Place) -> Message:
    secure = _secure_site(message, place)
    letters = secure.write_letters(messages.read_roster(message))
    return messages.phase_reply(message, secure.phase, secure.site, "shares", ConfigRecord(dict(letters)))


def _unmask(message: Message, place: Place) -> Message:
    secure = _secure_site(message, place)
    revealed = secure.reveal(messages.read_by_site(message, "signatures"))
    shares = ConfigRecord({str(tower): each for tower, each in revealed.items()})
    return messages.phase_reply(message, secure.phase, secure.site, "unmask", shares)


def _opened(message: Message, place: Place) -> tuple[SecureSite, Attempt]:
    """This site in its attempt at a secure sum, with the shares that the order brings from the other sites."""
    secure = _secure_site(message, place)
    return secure, secure.read_letters(messages.read_by_site(message, "letters"))


def _sealed(message: Message, answer: Message, place: Place) -> Message:
    """The answer as it leaves: an update with masks over it, if the experiment has secure sums, and any other as it is."""
    experiment = _experiment(place.experiment)
    if message.metadata.message_type != "train" or experiment.secure_sum is None:
        return answer
    secure, attempt = _opened(message, place)
    stage, _ = _stage_of(secure.phase, experiment, _site(experiment, place.site))
    model = _learner(place.experiment, stage.name).model
    shapes = {name: value.shape for name, value in parameters.reached(model, secure.streams[secure.site]).items()}
    record = answer.content.array_records["deltas"]
    changes, base = {name: array.numpy() for name, array in record.items()}, messages.read_base(message)
    vectors, clipped, signature = secure.mask(attempt, changes, shapes, base)
    return messages.sealed(message, answer, secure.phase, vectors, clipped, signature)


def _spend(place: Place, job: Materials, order: messages.Order) -> Spent | None:
    """The round in the ledger of the site's patients, before anything of it is computed; None where none is kept."""
    if job.experiment.privacy.mode != "dp":
        return None
    from client import private  # Opacus takes seconds to import, and most experiments need none of it

    return private.spend(
        job.experiment,
        _site(job.experiment, place.site),
        job.stage,
        shard=place.shard,
        state=place.state,
        run=order.run,
        round_number=order.round_number,
    )


def _spend_update(place: Place, job: Materials, order: messages.Order) -> SpentUpdate | None:
    """The round in the ledger of the site's whole updates, before anything of it is computed; None where none is kept."""
    if job.experiment.privacy.mode != "noisy_updates":
        return None
    from client import noisy_updates  # Opacus again

    return noisy_updates.spend(
        job.experiment,
        _site(job.experiment, place.site),
        job.stage,
        shard=place.shard,
        state=place.state,
        run=order.run,
        round_number=order.round_number,
    )


def _private_steps(place: Place, job: Materials, first_step: int, start: Start, spent: Spent) -> tuple[Update, OptimiserState]:
    """A round's steps on patients drawn in secret, with noise."""
    from fedmix.federation import private

    return private.train(
        job.learner,
        spent.patients,
        local.Assignment(place.site, job.stage, first_step, job.experiment.seed),
        _site(job.experiment, place.site).stream,
        spent.protection,
        start=start,
        precision=job.experiment.federation.precision,
    )


def _steps(
    place: Place, job: Materials, first_step: int, moments: Mapping[str, Tensor], second_moments: Mapping[str, float]
) -> tuple[Update, OptimiserState]:
    """A round's steps, in this process or by several that share its batches."""
    settings = job.experiment.federation
    if settings.processes_per_site > 1:
        task = ranks.Task(
            place.site,
            str(place.experiment),
            str(place.shard),
            job.stage.name,
            first_step,
            dict(second_moments),
            settings.processes_per_site,
            settings.deadline_s,
        )
        return ranks.train(task, dict(job.learner.model.named_parameters()), moments, state=place.state)
    return local.train(
        job.learner,
        job.sampler,
        local.Assignment(place.site, job.stage, first_step, job.experiment.seed),
        optimiser_state=moments,
        second_moments=second_moments,
        precision=settings.precision,
        parts=parts_of(settings),
    )


def _stage_of(
    order: messages.Order | messages.Phase, experiment: config.Experiment, site: config.Site
) -> tuple[config.Stage, int]:
    """The stage that an order belongs to and the stage's first round, if this site agreed to take part in it."""
    if order.fingerprint != experiment.fingerprint():
        raise ConfigError("the server runs another experiment than the one given to this site (fingerprints differ)")
    stage, round_in_stage = experiment.stage_of(order.round_number)
    if site not in config.sites_of(stage, experiment.data.sites):
        raise ConfigError(f"the server asks for stage {stage.name}, in which this site takes no part")
    return stage, order.round_number - round_in_stage


def _check(shard: Shard, site: config.Site, experiment: config.Experiment) -> None:
    """Refuse a shard that was prepared for something else, before hours of training."""
    if shard.image_size != experiment.data.image_size and bool(shard.has_image.any()):
        raise DataError(
            f"its shard holds images of {shard.image_size} px, the experiment wants "
            f"{experiment.data.image_size}; prepare it again with --size {experiment.data.image_size}"
        )
    wanted = _tokenizer(experiment.data.tokenizer).fingerprint
    if bool(shard.has_text.any()) and shard.tokenizer_fingerprint != wanted:
        raise DataError("its shard was prepared with another tokenizer than the experiment's; prepare it again with that one")
    if len(_rows(shard, site.stream)) == 0:
        counts = ", ".join(f"{count} {name}" for name, count in shard.stream_counts.items() if count) or "nothing"
        raise DataError(
            f"it is to train on {site.stream} studies, but its shard's training split holds none "
            f"({counts} over all splits); give it the stream it holds, or another shard"
        )


@dataclass(frozen=True)
class Materials:
    """What a job works with: the experiment and its stage, a model with what it is to learn, and batches."""

    experiment: config.Experiment
    stage: config.Stage
    learner: Learner
    sampler: Sampler


def materials(place: Place, stage_name: str) -> Materials:
    """What the site at a place trains a stage with."""
    experiment = _experiment(place.experiment)
    return Materials(
        experiment,
        _stage(experiment, stage_name),
        _learner(place.experiment, stage_name),
        _sampler(place.shard, place.experiment, place.site, stage_name),
    )


# Processes that serve several rounds open things once; a deployed node's process serves one message and pays once.


@lru_cache(maxsize=4)
def _experiment(path: Path) -> config.Experiment:
    try:
        return config.load(path)
    except ConfigError as error:  # a refusal leaves the site, and a path may name a patient or a person
        raise ConfigError(str(error).replace(str(path), "the site's experiment file")) from None


@lru_cache(maxsize=4)
def _tokenizer(path: Path | None) -> Tokenizer:
    return Tokenizer.load(path)


@lru_cache(maxsize=32)
def _sampler(shard_path: Path, experiment_path: Path, site_name: str, stage_name: str) -> Sampler:
    """A site's batches in a stage. The greeting has compared the shard's hashes; here its sizes are enough."""
    experiment = _experiment(experiment_path)
    site, stage = _site(experiment, site_name), _stage(experiment, stage_name)
    shard = Shard.open(shard_path, verify=False)
    _check(shard, site, experiment)
    draws = local.seed_of(experiment.seed, site.name, stage.name, "batches")
    tokenizer = _tokenizer(experiment.data.tokenizer)
    return sampler_of(stage, shard, _rows(shard, site.stream), seed=draws, tokenizer=tokenizer)


@lru_cache(maxsize=1)
def _learner(experiment_path: Path, stage_name: str) -> Learner:
    """A model to load an order's parameters into. Nothing of an earlier order is left that a later one could read:
    what a site's stream reaches is overwritten, and the rest stays out of its losses.
    """
    experiment = _experiment(experiment_path)
    tokenizer = _tokenizer(experiment.data.tokenizer)
    model = parameters.model_of(experiment, tokenizer)
    word_ids = WordIds.of(tokenizer)
    model.to(local.device_named(experiment.federation.device))
    return Learner(model, _stage(experiment, stage_name).objectives, word_ids)


def _rows(shard: Shard, stream: config.StreamName) -> Indices:
    return shard.select("train", stream)


def _site(experiment: config.Experiment, name: str) -> config.Site:
    for site in experiment.data.sites:
        if site.name == name:
            return site
    raise ConfigError(f"the experiment knows no site {name!r}; add it to data.sites")


def _stage(experiment: config.Experiment, name: str) -> config.Stage:
    return next(stage for stage in experiment.stages if stage.name == name)


app = build_app(from_node_config)
