"""Plans at a hospital: what one would do here in plain words, and a person's yes or no to its exact bytes."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from client import gate, parameters, secure_gate
from client.home import DIGEST, Home
from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from fedmix.deployment import plan as plans
from fedmix.disk import flush, reason_of, write_whole
from fedmix.errors import ConfigError, FedmixError, PolicyError
from fedmix.federation.compression import parts_of
from fedmix.federation.scoring import measures_of
from fedmix.federation.update import group_of


@dataclass(frozen=True)
class Review:
    """A plan as this site sees it: what it says, what would leave, and why it could not be approved, if it could not.

    ``scores``: measures of this site's held-out patients that the plan asks for; ``keeps_scores``: the policy says no to some.
    """

    digest: str
    plan: plans.Plan
    stream: config.StreamName | None
    rounds: int
    groups: tuple[str, ...]
    bytes_a_round: int
    scores: tuple[str, ...]
    keeps_scores: bool
    is_same_code: bool
    is_same_lock: bool
    other_versions: tuple[str, ...]
    hindrances: tuple[str, ...]


def review(home: Home, path: Path) -> Review:
    """What a plan would do here. Raises ConfigError if the file is no plan."""
    digest, plan = plans.digest(path), plans.read(path)
    name, experiment = home.settings().name, plan.resolved()
    site = next((site for site in experiment.data.sites if site.name == name), None)
    stages = [] if site is None else [one for one in experiment.stages if site in config.sites_of(one, experiment.data.sites)]
    groups, num_bytes = ((), 0) if site is None else _leaving(experiment, site.stream)
    scores = () if site is None or not experiment.evaluation.at_sites else measures_of(site.stream, experiment.trained_on)
    return Review(
        digest=digest,
        plan=plan,
        stream=None if site is None else site.stream,
        rounds=sum(stage.rounds for stage in stages),
        groups=groups,
        bytes_a_round=num_bytes,
        scores=scores,
        keeps_scores=not home.policy().lets_leave(("scores",), scores),
        is_same_code=plan.code == plans.code_hash(),
        is_same_lock=plan.lock == plans.lock_hash(),
        other_versions=tuple(_other_versions(plan)),
        hindrances=tuple(_hindrances(home, plan, digest)),
    )


def approve(home: Home, path: Path) -> str:
    """Let the plan in these exact bytes run here, and return its digest.

    The bytes are read once: what is checked is what is kept. Raises PolicyError or ConfigError where the plan is not for this
    site, this code or this time, or is more than the policy gives to one plan.
    """
    content = plans.content_of(path)
    digest = hashlib.sha256(content).hexdigest()
    partial = home.plans / "approving.partial"
    try:
        partial.write_bytes(content)
        plan = plans.read(partial)
        if why := next(_hindrances(home, plan, digest), None):
            raise PolicyError(why)
        flush(partial)
        # The ledger first: a plan that may run has been written down as approved.
        home.ledger().append("approved", plan=digest, name=plan.name, valid_until=str(plan.valid_until), code=plan.code)
        os.replace(partial, home.approved(digest))
        flush(home.plans)
    except OSError as error:
        raise ConfigError(f"the plan cannot be kept: {reason_of(error)}; see to the home's plans folder") from None
    finally:
        partial.unlink(missing_ok=True)
    return digest


def deny(home: Home, plan: str) -> str:
    """Refuse a plan, by its file or its digest, for good; one that was approved ends at its next message."""
    digest = plan if DIGEST.fullmatch(plan) else hashlib.sha256(plans.content_of(Path(plan))).hexdigest()
    denied = home.denied()
    if digest not in denied:
        write_whole(home.denied_file, "".join(f"{each}\n" for each in sorted({*denied, digest})))
    home.approved(digest).unlink(missing_ok=True)
    home.ledger().append("denied", plan=digest)
    return digest


def _hindrances(home: Home, plan: plans.Plan, digest: str) -> Iterator[str]:
    """Why the plan cannot be approved, the weightiest first."""
    settings, policy = home.settings(), home.policy()
    if digest in home.denied():
        yield "the plan was denied here; who denied it takes it off the list in the home's plans folder first"
    try:
        gate.check_plan(plan, settings.name, datetime.datetime.now(datetime.UTC).date())
        policy.check_privacy(plan.resolved().privacy)
        policy.check_secure_sum(plan.resolved().secure_sum)
        secure_gate.check_own_key(plan, home)
    except FedmixError as error:
        yield str(error)
    if plan.coordinator != settings.coordinator:
        yield f"the plan is of coordinator {plan.coordinator}, this site's is {settings.coordinator}"
    experiment = plan.resolved()
    if experiment.num_rounds > policy.max_rounds:
        yield f"the plan has {experiment.num_rounds} rounds, this site's policy gives {policy.max_rounds}"
    for site in experiment.data.sites:
        if site.name == settings.name:
            try:
                gate.num_studies(settings.shard, site.stream, policy)
                policy.check_names((), _leaving(experiment, site.stream)[0], _losses(experiment, site.stream))
            except FedmixError as error:
                yield str(error)


def _losses(experiment: config.Experiment, stream: config.StreamName) -> tuple[str, ...]:
    """The losses that a site of a stream sends, with or without a policy that lets them leave."""
    own = {"image": ("mvm",), "text": ("mlm",), "paired": experiment.trained_on}[stream]
    return tuple(f"{name}/loss" for name in own if name in experiment.trained_on)


def _leaving(experiment: config.Experiment, stream: config.StreamName) -> tuple[tuple[str, ...], int]:
    """The groups whose change a site of a stream may send, and at most how many bytes of arrays a round."""
    model = parameters.model_of(experiment, Tokenizer.load(experiment.data.tokenizer))
    sent = parameters.reached(model, stream)
    num_bytes = sum(
        int(np.prod(shape)) * dtype.itemsize
        for value in sent.values()
        for dtype, shape in parts_of(value.shape, experiment.wire).values()
    )
    return tuple(dict.fromkeys(group_of(name) for name in sent)), num_bytes


def _other_versions(plan: plans.Plan) -> Iterator[str]:
    for name, wanted in plan.versions.items():
        try:
            here = metadata.version(name)
        except metadata.PackageNotFoundError:
            here = "not installed"
        if here != wanted:
            yield f"{name}: the plan has {wanted}, here it is {here}"
