"""The gate between this hospital and the coordinator: nothing is begun and nothing leaves that it has not checked.

A message is answered under a plan that somebody here has approved, byte for byte, with the code that is installed here. What
a job answers is checked as a whole before it leaves: every record and key of it has to be one that is known, of the type and
size that the plan's model gives it. Whatever is not understood is refused, and the reason is fit to be sent.

The ledger has an entry for every message, on the disk before the message is answered.
"""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from torch import Size

from client import noisy_updates, private, score_gate, secure_gate
from client.fields import check_fields, exact
from client.home import DIGEST, Home
from client.policy import Policy
from fedmix import config
from fedmix.data.shard import Shard
from fedmix.deployment import plan as plans
from fedmix.deployment.ledger import measured
from fedmix.disk import reason_of, write_whole
from fedmix.errors import FedmixError, LedgerError, PolicyError, RunError, UpdateError
from fedmix.federation import screening
from fedmix.federation.compression import Parts, decode_rows
from fedmix.federation.update import group_of, rows_of, typed
from fedmix.privacy.accountant import Ledger

Shapes = Mapping[str, Size]
PEER = "coordinator"
MAX_REASON = 300
NO_HEAD_YET = "0" * 64  # as long as the head that takes its place
GREETING = {"site": str, "stream": str, "fingerprint": str, "studies": int, "ledger": str}
RECEIPT = {
    "run": str,
    "round": int,
    "base": str,
    "fingerprint": str,
    "site": str,
    "nonce": str,
    "steps": int,
    "train_start": float,
    "train_end": float,
    "ledger": str,
}
PRIVACY = dict.fromkeys(("epsilon", "epsilon_rdp", "steps", "noise_multiplier", "sample_rate"), float)
ECHOED = ("run", "round", "base", "fingerprint", "nonce")
METRICS_OF = {"train": "metrics", "evaluate": "scores"}  # kind of message -> the record of its answer that holds them
MAX_METRICS = 32


@dataclass(frozen=True)
class Admitted:
    """A message that may be answered: the approved plan it names and where the plan's experiment lies as a file.

    ``keys``: the sites' registered public keys, by the plan's word.
    """

    site: str
    policy: Policy
    plan: str
    experiment: config.Experiment
    experiment_file: Path
    shard: Path
    studies: int
    since: float
    keys: Mapping[str, str]

    @property
    def stream(self) -> config.StreamName:
        """The kind of studies that the plan has this site train on."""
        return next(site.stream for site in self.experiment.data.sites if site.name == self.site)


def guarded(
    home: Home,
    message: Message,
    job: Callable[[Admitted], Message],
    shapes: Callable[[Admitted, int], Shapes],
    seal: Callable[[Admitted, Message], Message],
) -> Message:
    """A job's answer to a message, if this hospital's policy admits the one and lets the other leave.

    ``shapes``: of the parameters that this site may train in a round of the plan. ``seal``: masks an update that was found
    fit to leave, where the plan has a secure sum; what comes of it is checked too. Raises what the job raised, and PolicyError
    or another FedmixError for what is refused; either is in the ledger before it is raised.
    """
    ledger, facts = home.ledger(), _facts(message)
    ledger.append("received", **facts, direction="in", **_measured(message), peer_head=_said(message, "ledger"))
    try:
        admitted = admit(home, message)
        answer = job(admitted)
        return _release(home, admitted, message, answer, shapes, seal)
    except LedgerError:
        raise  # nothing can be written down, so nothing but this leaves
    except Exception as error:
        why = str(error)[:MAX_REASON] if isinstance(error, FedmixError) else type(error).__name__
        ledger.append("refused", **facts, direction="out", why=why)
        raise


def admit(home: Home, message: Message, *, now: datetime.datetime | None = None) -> Admitted:
    """What the message's plan allows here, or a refusal. ``now``: local time with its zone, the clock's if left out."""
    now = now or datetime.datetime.now().astimezone()
    since, settings, policy = time.time(), home.settings(), home.policy()
    _check_pause(home)
    policy.check_hour(now)
    digest = _plan_of(message)
    plan = _approved(home, digest)
    check_plan(plan, settings.name, now.astimezone(datetime.UTC).date())
    experiment = plan.resolved()
    policy.check_privacy(experiment.privacy)
    policy.check_secure_sum(experiment.secure_sum)
    _check_accounts(home, experiment.privacy)
    secure_gate.check_own_key(plan, home)
    site = next(site for site in experiment.data.sites if site.name == settings.name)
    studies = num_studies(settings.shard, site.stream, policy)
    file = _experiment_file(home, digest, experiment)
    return Admitted(settings.name, policy, digest, experiment, file, settings.shard, studies, since, plan.keys)


def num_studies(shard: Path, stream: config.StreamName, policy: Policy) -> int:
    """The studies that this site trains on, if the policy finds them enough."""
    studies = len(Shard.open(shard, verify=False).select("train", stream))
    if studies < policy.min_studies:
        raise PolicyError(f"this site takes part with {policy.min_studies} training studies or more, and has fewer")
    return studies


def check_plan(plan: plans.Plan, site: str, day: datetime.date) -> None:
    """Refuse a plan that is not of this site, of this code, or of this time."""
    if site not in plan.sites:
        raise PolicyError(f"the plan does not name site {site}; it is for others")
    if not plan.is_valid_on(day):
        raise PolicyError(f"the plan was valid until {plan.valid_until}; ask the coordinator for a new one")
    if plan.code != plans.code_hash():
        raise PolicyError(
            "the plan was written for another fedmix than the one that is installed at this site; install the version that "
            f"the plan names ({plan.versions.get('fedmix', 'none')}), or ask the coordinator for a plan of yours"
        )


def _check_pause(home: Home) -> None:
    if home.is_paused:
        raise PolicyError("this site is paused; `fedmix site resume` there ends that")


def _check_accounts(home: Home, offered: config.Privacy) -> None:
    """Refuse a plan that counts privacy while a round that was sent is missing from what this site counts."""
    if not offered.is_counted_by_sites:
        return
    counted = [entry for name in (private.LEDGER, noisy_updates.LEDGER) for entry in Ledger(home.state / name).entries()]
    sent = {(one["run"], one["round"]) for one in home.ledger().entries() if one.get("epsilon") is not None}
    if sent - {(entry.run, entry.round) for entry in counted}:
        raise PolicyError(
            "this site's privacy ledger lacks rounds that its ledger of messages says were sent; what was spent is not known, "
            f"so {private.LEDGER} and {noisy_updates.LEDGER} in its state folder have to be restored there"
        )


def _plan_of(message: Message) -> str:
    digest = _said(message, "plan")
    if not DIGEST.fullmatch(digest):
        raise PolicyError("the message names no plan; this site answers only under a plan that it has approved")
    return digest


def _approved(home: Home, digest: str) -> plans.Plan:
    """The approved plan, if its file still has the bytes that were approved."""
    path = home.approved(digest)
    if digest in home.denied():
        raise PolicyError(f"this site has denied plan {digest[:12]}")
    if not path.is_file():
        raise PolicyError(f"plan {digest[:12]} is not approved at this site; send it there for `fedmix site review`")
    if plans.digest(path) != digest:
        raise PolicyError(
            f"the file of approved plan {digest[:12]} was changed at this site after it was approved; approve the plan anew"
        )
    return plans.read(path)


def _experiment_file(home: Home, digest: str, experiment: config.Experiment) -> Path:
    """The plan's experiment as a file, for the processes that train; no run's state can have the folder's name."""
    path, text = home.state / ".experiments" / f"{digest}.yaml", experiment.to_yaml()
    try:
        if not path.is_file() or path.read_text() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
    except OSError as error:
        raise RunError(f"this site's state cannot be kept: {reason_of(error)}; see to its state folder") from None
    return path


# ---- what leaves


def _release(
    home: Home,
    admitted: Admitted,
    message: Message,
    answer: Message,
    shapes: Callable[[Admitted, int], Shapes],
    seal: Callable[[Admitted, Message], Message],
) -> Message:
    """The answer with the ledger's head in it, once it has been checked and written down."""
    if answer.has_error():
        raise PolicyError("a job answers with a reply or an exception")
    _check_pause(home)
    content, kind = answer.content, message.metadata.message_type
    norm: float | None = None
    groups: dict[str, int] = {}
    if kind == "query":
        _check_greeting(admitted, answer)
        place = content.config_records["greeting"]
    elif kind == "evaluate":
        score_gate.check_scores(admitted, home, message, answer)
        place = content.config_records["receipt"]
    elif kind != "train":
        secure_gate.check_phase(admitted, home, message, answer)
        place = content.config_records["receipt"]
    else:
        order = message.content.config_records["order"]
        coded, groups = _check_update(admitted, order, answer, shapes(admitted, typed(order, "round", int)))
        norm = _norm(coded, shapes(admitted, typed(order, "round", int)), admitted.experiment.wire)
        del coded
        if not norm <= admitted.policy.max_norm:  # so that NaN is refused
            raise PolicyError(f"the update is {norm:.3g} long, this site's policy lets {admitted.policy.max_norm:.3g} leave")
        if admitted.experiment.secure_sum is not None:
            answer = seal(admitted, answer)
            content = answer.content
            secure_gate.check_masked(admitted, message, answer, shapes(admitted, typed(order, "round", int)))
        place = content.config_records["receipt"]
    metrics = sorted(content[METRICS_OF[kind]]) if kind in METRICS_OF else []
    admitted.policy.check_names(content.keys(), groups.keys(), metrics)
    place["ledger"] = NO_HEAD_YET
    size = _measured(answer)
    _check_amount(home, admitted, kind, size["bytes"])
    facts = {**_facts(message), "direction": "out", **size, "groups": groups, "metrics": metrics}
    epsilon = content.metric_records["privacy"]["epsilon"] if "privacy" in content else None
    place["ledger"] = home.ledger().append("sent", **facts, norm=norm, epsilon=epsilon)
    return answer


def _check_amount(home: Home, admitted: Admitted, kind: str, num_bytes: int) -> None:
    """Count what left under the plan so far, from the ledger itself: who cuts the ledger short has a ledger that is broken."""
    sent = [entry for entry in home.ledger().entries() if entry["event"] == "sent" and entry["plan"] == admitted.plan]
    updates = [*(entry["kind"] for entry in sent), kind].count("train")
    admitted.policy.check_amount(updates=updates, num_bytes=sum(entry["bytes"] for entry in sent) + num_bytes)


def _check_greeting(admitted: Admitted, answer: Message) -> None:
    content = answer.content
    if set(content) != {"greeting"} or not isinstance(content["greeting"], ConfigRecord):
        raise PolicyError("the greeting holds records that are none of a greeting")
    said = content["greeting"]
    check_fields(said, GREETING)
    expected = (admitted.site, admitted.stream, admitted.experiment.fingerprint(), admitted.studies)
    if (said["site"], said["stream"], said["fingerprint"], said["studies"]) != expected:
        raise PolicyError("the greeting says something else than this site's settings, plan and shard do")


def _check_update(
    admitted: Admitted, order: ConfigRecord, answer: Message, shapes: Shapes
) -> tuple[dict[str, Parts], dict[str, int]]:
    """The update's coded arrays and how many tensors of each group it holds, once nothing else is in it."""
    content = answer.content
    kinds = {
        "receipt": ConfigRecord,
        "examples": MetricRecord,
        "metrics": MetricRecord,
        "second_moments": MetricRecord,
        "deltas": ArrayRecord,
    } | ({"privacy": MetricRecord} if admitted.experiment.privacy.is_counted_by_sites else {})
    if set(content) != set(kinds) or not all(isinstance(content[name], kind) for name, kind in kinds.items()):
        raise PolicyError("the reply holds records that are none of an update, or lacks one")
    receipt = content.config_records["receipt"]
    check_fields(receipt, RECEIPT)
    if "privacy" in kinds:
        check_fields(content.metric_records["privacy"], PRIVACY)
    if receipt["site"] != admitted.site or any(receipt[key] != order[key] for key in ECHOED):
        raise PolicyError("the reply's receipt is not of the order that it answers")
    if not admitted.since <= float(receipt["train_start"]) <= float(receipt["train_end"]) <= time.time():  # type: ignore[arg-type]
        raise PolicyError("the reply's times are not those in which this site worked on it; was the clock set?")
    stage, _ = admitted.experiment.stage_of(typed(order, "round", int))
    asked = screening.Asked(admitted.stream, stage.local_steps, stage.batch_size, admitted.studies)
    examples = {name: typed(content.metric_records["examples"], name, int) for name in content.metric_records["examples"]}
    metrics = _metrics(content.metric_records["metrics"])
    moments = content.metric_records["second_moments"]
    try:
        screening.check_work(examples, typed(receipt, "steps", int), metrics, asked)  # type: ignore[arg-type]
        screening.check_second_moments({name: typed(moments, name, float) for name in moments}, shapes, stage.optimiser)
        arrays = {name: exact(array) for name, array in content.array_records["deltas"].items()}
        coded = screening.check_arrays(arrays, shapes, admitted.stream, admitted.experiment.wire)
    except UpdateError as error:
        raise PolicyError(f"the reply is not what the plan has this site send: {error}") from None
    groups: dict[str, int] = {}
    for name in coded:
        groups[group_of(name)] = groups.get(group_of(name), 0) + 1
    return coded, groups


def _metrics(record: MetricRecord) -> dict[str, tuple[float, float]]:
    pairs = dict(record)
    if len(pairs) > MAX_METRICS or not all(
        isinstance(pair, list) and [type(value) for value in pair] == [float, float] for pair in pairs.values()
    ):
        raise PolicyError("the reply holds metrics that are no pairs of sum and weight")
    return {name: (pair[0], pair[1]) for name, pair in pairs.items()}  # type: ignore[index]


def _norm(coded: Mapping[str, Parts], shapes: Shapes, wire: config.Wire) -> float:
    """Euclidean length of all changes together, as the coordinator decodes them."""
    total = 0.0
    for name, parts in coded.items():
        total += float(decode_rows(parts, rows_of(shapes[name])[1], wire).square().sum(dtype=torch.float64))
    return math.sqrt(total)


# ---- what the ledger says of a message


def _facts(message: Message) -> dict[str, Any]:
    """Which message it is. Where it does not say, or says it wrongly, the entry says so as well: with null."""
    kind = message.metadata.message_type
    plan, order = _said(message, "plan"), _record(message, "order")
    run, number = order.get("run"), order.get("round")
    return {
        "peer": PEER,
        "kind": kind,
        "plan": plan if DIGEST.fullmatch(plan) else None,
        "run": run[:80] if isinstance(run, str) else None,
        "round": number if type(number) is int else None,
    }


def _said(message: Message, field: str) -> str:
    """A string of an order or a query; empty where there is none, or one that is no hash."""
    value = (_record(message, "order") or _record(message, "query")).get(field)
    return value if isinstance(value, str) and DIGEST.fullmatch(value) else ""


def _record(message: Message, name: str) -> Mapping[str, Any]:
    record = message.content.get(name) if message.has_content() else None
    return record if isinstance(record, ConfigRecord) else {}


def _measured(message: Message) -> dict[str, Any]:
    """A message's bytes as Flower sends them, the number of objects that they are sent as, and the hash of its arrays."""
    if not message.has_content():
        return measured((), ())
    with no_object_id_recompute():
        sizes = [len(each.deflate()) for each in get_all_nested_objects(message).values()]
    # Not .array_records, which holds the content in a reference cycle.
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return measured(sizes, ((name, record[name].data) for record in records for name in sorted(record)))
