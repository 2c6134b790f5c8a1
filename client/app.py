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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from client import gate, messages, parameters, ranks, secure_jobs
from client.home import Home
from client.place import Materials, Place, check_shard, experiment_of, learner_of, materials, rows_of, site_of, stage_of
from client.scores import scores
from client.state import SiteState
from fedmix.data.shard import Shard
from fedmix.errors import ConfigError, DataError, FedmixError, PolicyError
from fedmix.federation import compression, local
from fedmix.federation.local import Start
from fedmix.federation.microbatch import parts_of
from fedmix.federation.optimisers import OptimiserState
from fedmix.federation.trainable import narrowed
from fedmix.federation.update import Update

if TYPE_CHECKING:
    from client.spending import Spent


Locate = Callable[[Context], Place | Home]
Job = Callable[[Message, Place], Message]


def build_app(locate: Locate) -> ClientApp:
    """A ClientApp for the node that ``locate`` describes: a simulated place, or a hospital's home, whose policy rules."""
    return _app(_greet, _train, scores, secure_jobs.PHASES, locate)


def build_refusal(why: str, locate: Locate) -> ClientApp:
    """A ClientApp that answers everything with a refusal, which is in the ledger of a home."""

    def refuse(message: Message, place: Place) -> Message:
        raise PolicyError(why)

    return _app(refuse, refuse, refuse, dict.fromkeys(secure_jobs.PHASES, refuse), locate)


def _app(greet: Job, train: Job, score: Job, phases: Mapping[str, Job], locate: Locate) -> ClientApp:
    """A ClientApp of one job for each kind of message; ``phases``: those of a secure sum, by name."""
    app = ClientApp()
    app.query()(partial(_answer, greet, locate))
    app.train()(partial(_answer, train, locate))
    app.evaluate()(partial(_answer, score, locate))
    for name, job in phases.items():
        app.query(name)(partial(_answer, job, locate))
    return app


def _answer(job: Job, locate: Locate, message: Message, context: Context) -> Message:
    """A job's reply, or a refusal; what a bug raises is named by its kind only, for its text may quote data."""
    place: Place | Home | None = None
    try:
        place = locate(context)
        if isinstance(place, Place):
            return secure_jobs.sealed(message, job(message, place), place)
        return gate.guarded(
            place,
            message,
            lambda admitted: job(message, _place(place, admitted)),
            _trained_shapes,
            lambda admitted, answer: secure_jobs.sealed(message, answer, _place(place, admitted)),
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
    return Place(
        admitted.site,
        admitted.experiment_file,
        admitted.shard,
        home.state,
        home.key,
        admitted.keys,
        admitted.policy.min_patients,
    )


def _trained_shapes(admitted: gate.Admitted, round_number: int) -> gate.Shapes:
    """The parameters of which this site may send a change, and their shapes."""
    stage, _ = admitted.experiment.stage_of(round_number)
    model = learner_of(admitted.experiment_file, stage.name).model
    return {name: value.shape for name, value in parameters.reached(model, admitted.stream).items()}


def _greet(message: Message, place: Place) -> Message:
    """Say who this site is, once everything it was given has been found to fit."""
    experiment = experiment_of(place.experiment)
    site = site_of(experiment, place.site)
    try:
        shard = Shard.open(place.shard)  # reads every byte once: damage is found before hours of training
        check_shard(shard, site, experiment)
        local.device_named(experiment.federation.device)
    except DataError as error:
        raise DataError(f"site {site.name}: {error}") from None
    return messages.greeting(
        message,
        site=site.name,
        stream=site.stream,
        fingerprint=experiment.fingerprint(),
        studies=len(rows_of(shard, site.stream)),
    )


def _train(message: Message, place: Place) -> Message:
    order = messages.read_order(message)
    experiment = experiment_of(place.experiment)
    site = site_of(experiment, place.site)
    stage, stage_began = stage_of(order, experiment, site)
    if experiment.secure_sum is not None:
        secure_jobs.opened(message, place)  # before hours of training whose update could not leave
    torch.set_num_threads(experiment.federation.threads_per_site)
    job = materials(place, stage.name)
    state = SiteState(place.state, order.run)
    state.prepare()
    received = parameters.load(job.learner.model, order, site.stream, state)
    memory = state.before(order.round_number, stage_began=stage_began)
    if not stage.optimiser.keep_state:
        memory = replace(memory, moments={})
    first_step = (order.round_number - stage_began) * stage.local_steps
    spent = _spend(place, job, order)
    with ThreadPoolExecutor(max_workers=1) as disk:  # a large model's files are written while the site computes
        kept = [disk.submit(state.keep_received, received)] if order.parameters else []
        started = time.time()
        with narrowed(job.learner.model, experiment.privacy, experiment.seed, stage.name) as whole:
            if experiment.privacy.mode == "dp":
                update, moments = _private_steps(place, job, first_step, Start(memory.moments, order.second_moments), spent)
            else:
                update, moments = _steps(place, job, first_step, memory.moments, order.second_moments)
        update = whole(update) if spent is None else spent.cover(whole(update))
        trained_s = (started, time.time())
        kept.append(disk.submit(state.keep_moments, order.round_number, moments if stage.optimiser.keep_state else {}))
        # The seed holds the round and nothing that a repeat of it would change.
        chance = torch.Generator().manual_seed(local.seed_of(experiment.seed, site.name, order.round_number, "wire"))
        coded, residual = compression.encode(update.deltas, memory.residual, experiment.wire, chance)
        for written in kept:
            written.result()
    # Before the reply: a committed round must find it.
    state.finish(order.round_number, residual)
    return messages.reply(message, order, update, coded, trained_s=trained_s, privacy=spent.facts() if spent else {})


def _spend(place: Place, job: Materials, order: messages.Order) -> Spent | None:
    """The round in a ledger of the site's, before anything of it is computed; None where none is kept."""
    if not job.experiment.privacy.is_counted_by_sites:
        return None
    from client import noisy_updates, private  # Opacus takes seconds to import, and most experiments need none of it
    from client.spending import Turn

    site = site_of(job.experiment, place.site)
    turn = Turn(job.experiment, site, job.stage, place.shard, place.state, order.run, order.round_number)
    return private.spend(turn) if job.experiment.privacy.mode == "dp" else noisy_updates.spend(turn)


def _private_steps(
    place: Place, job: Materials, first_step: int, start: Start, spent: Spent | None
) -> tuple[Update, OptimiserState]:
    """A round's steps on patients drawn in secret, with noise."""
    from client.private import SpentSteps
    from fedmix.federation import private

    assert isinstance(spent, SpentSteps)
    return private.train(
        job.learner,
        spent.patients,
        local.Assignment(place.site, job.stage, first_step, job.experiment.seed),
        site_of(job.experiment, place.site).stream,
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


app = build_app(from_node_config)
