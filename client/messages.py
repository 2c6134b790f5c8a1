"""Between Flower's records and the words of fedmix, as a site sees them. server/messages.py is the other end.

Only arrays, numbers and short strings of a fixed set of keys travel; nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedmix.errors import UpdateError
from fedmix.federation.compression import Parts
from fedmix.federation.secure_keys import Signed
from fedmix.federation.secure_sum import Words
from fedmix.federation.update import Kind, Update, typed

# Flower reserves codes below 1000 for itself; the reasons that go with these are safe to show.
REFUSED = 1001
NEEDS_ALL = 1004  # the order left out parameters that this site does not hold
NO_LEDGER = ""  # simulated places keep none
RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")  # it names a folder at this site, so it is never taken on trust


@dataclass(frozen=True)
class Order:
    """One round's order from the server: where the run stands, and what this site is to train.

    ``base``: hash of all parameters that this site trains; ``groups``: hash of each of their groups; ``parameters``: those
    of the groups that the server does not know this site to hold. ``nonce``: a number used once, which the reply repeats.
    """

    run: str
    round_number: int
    fingerprint: str
    base: str
    nonce: str
    groups: dict[str, str]
    parameters: dict[str, Tensor]
    second_moments: dict[str, float]


def read_order(message: Message) -> Order:
    """The order a train message carries; raises UpdateError if it is not one."""
    try:
        content = message.content
        plan, groups = content.config_records["order"], content.config_records["groups"]
        parameters = {name: torch.from_numpy(array.numpy()) for name, array in content.array_records["parameters"].items()}
        moments: Mapping[str, object] = content.metric_records.get("second_moments", MetricRecord())
    except Exception as error:  # whatever the decoder trips over, it is the order that is wrong
        raise UpdateError(f"the server's order is not one that this version understands ({type(error).__name__})") from None
    run = typed(plan, "run", str)
    if not RUN_ID.fullmatch(run):
        raise UpdateError("the server's order names its run with signs that are not allowed; is its fedmix of this version?")
    return Order(
        run,
        typed(plan, "round", int),
        typed(plan, "fingerprint", str),
        typed(plan, "base", str),
        typed(plan, "nonce", str),
        {group: typed(groups, group, str) for group in groups},
        parameters,
        _second_moments(moments),
    )


def greeting(message: Message, *, site: str, stream: str, fingerprint: str, studies: int) -> Message:
    """Who this site is and what it holds, in answer to the server's query; the gate puts its ledger's head in."""
    content = ConfigRecord(
        {"site": site, "stream": stream, "fingerprint": fingerprint, "studies": studies, "ledger": NO_LEDGER}
    )
    return Message(RecordDict({"greeting": content}), reply_to=message)


def reply(
    message: Message,
    order: Order,
    update: Update,
    coded: Mapping[str, Parts],
    *,
    trained_s: tuple[float, float],
    privacy: Mapping[str, float],
) -> Message:
    """A site's update as the answer to its order, its changes in their coded form.

    ``trained_s`` is when training began and ended (seconds since 1970). ``privacy``: what the site's patients have borne with
    it (client/private.py), empty without differential privacy. The gate puts its ledger's head in.
    """
    receipt = ConfigRecord(
        {
            "run": order.run,
            "round": order.round_number,
            "base": order.base,
            "fingerprint": order.fingerprint,
            "site": update.site,
            "nonce": order.nonce,
            "steps": update.steps,
            "train_start": trained_s[0],
            "train_end": trained_s[1],
            "ledger": NO_LEDGER,
        }
    )
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {
        "receipt": receipt,
        "examples": MetricRecord({stream: int(count) for stream, count in update.examples.items()}),
        "metrics": MetricRecord({name: [total, weight] for name, (total, weight) in update.metrics.items()}),
        "second_moments": MetricRecord({name: float(mean) for name, mean in update.second_moments.items()}),
        "deltas": ArrayRecord({name + part: Array(array) for name, parts in coded.items() for part, array in parts.items()}),
    }
    if privacy:
        records["privacy"] = MetricRecord({name: float(value) for name, value in privacy.items()})
    return Message(RecordDict(records), reply_to=message)


def scores_reply(message: Message, order: Order, site: str, sums: Mapping[str, tuple[float, float]]) -> Message:
    """What the site found out about the order's model, as sums and weights; the gate puts its ledger's head in."""
    receipt = ConfigRecord(
        {
            "run": order.run,
            "round": order.round_number,
            "base": order.base,
            "fingerprint": order.fingerprint,
            "site": site,
            "nonce": order.nonce,
            "ledger": NO_LEDGER,
        }
    )
    scores = MetricRecord({name: [total, weight] for name, (total, weight) in sums.items()})
    return Message(RecordDict({"receipt": receipt, "scores": scores}), reply_to=message)


# ---- a secure sum's (client/secure.py); server/secure.py is the other end


@dataclass(frozen=True)
class Phase:
    """Which attempt at which round's sum a message is of; ``fingerprint``: of the experiment that the server runs."""

    run: str
    round_number: int
    attempt: str
    fingerprint: str


def read_phase(message: Message) -> Phase:
    """What an order or another message of a secure sum is about; raises UpdateError if it is none."""
    order = _config(message, "order")
    run = typed(order, "run", str)
    if not RUN_ID.fullmatch(run):
        raise UpdateError("the server's message names its run with signs that are not allowed; is its fedmix of this version?")
    attempt = typed(_config(message, "sum"), "attempt", str)
    return Phase(run, typed(order, "round", int), attempt, typed(order, "fingerprint", str))


def read_base(message: Message) -> str:
    """Which parameters an order has a site train from: their hash."""
    return typed(_config(message, "order"), "base", str)


def read_roster(message: Message) -> list[Signed]:
    """All sites' keys, as the server passes them on."""
    record = _config(message, "sum")
    contents, signatures = _list(record, "contents", bytes), _list(record, "signatures", bytes)
    signers = _list(record, "signers", str)
    if not len(contents) == len(signatures) == len(signers):
        raise UpdateError("the server's message holds more keys than signatures, or fewer")
    return [Signed(*one) for one in zip(contents, signatures, signers, strict=True)]


def read_by_site(message: Message, field: str) -> dict[str, bytes]:
    """One of a message's lists, such as the letters to this site, by the site it came from."""
    record = _config(message, "sum")
    sites, values = _list(record, "sites", str), _list(record, field, bytes)
    if len(set(sites)) != len(sites) or len(sites) != len(values):
        raise UpdateError("the server's message names a site twice, or not every site's part")
    return dict(zip(sites, values, strict=True))


def phase_reply(message: Message, phase: Phase, site: str, name: str, values: ConfigRecord) -> Message:
    """A site's answer in a phase of a secure sum: ``values`` in a record of its name; the gate adds the ledger's head."""
    receipt = ConfigRecord(
        {
            "run": phase.run,
            "round": phase.round_number,
            "fingerprint": phase.fingerprint,
            "attempt": phase.attempt,
            "site": site,
            "ledger": NO_LEDGER,
        }
    )
    return Message(RecordDict({"receipt": receipt, name: values}), reply_to=message)


def sealed(
    message: Message, answer: Message, phase: Phase, vectors: Mapping[str, Words], clipped: int, signature: bytes
) -> Message:
    """A reply with masked sums in the place of its changes."""
    records = {name: record for name, record in answer.content.items() if name != "deltas"}
    records["masked"] = ArrayRecord({tower: Array(vector) for tower, vector in vectors.items()})
    records["sum"] = ConfigRecord({"attempt": phase.attempt, "clipped": clipped, "signature": signature})
    return Message(RecordDict(records), reply_to=message)


def _config(message: Message, name: str) -> ConfigRecord:
    record = message.content.get(name) if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise UpdateError(f"the server's message has no {name!r} that this version understands; is it for a secure sum?")
    return record


def _list(record: ConfigRecord, key: str, kind: type[Kind]) -> list[Kind]:
    values = typed(record, key, list)
    if not all(type(value) is kind for value in values):
        raise UpdateError(f"field {key!r} of a message should be a list of {kind.__name__}")
    return values


def refusal(message: Message, reason: str, code: int = REFUSED) -> Message:
    """An error that the server may show: what is wrong at this site, without ids, text or file names."""
    return Message(Error(code=code, reason=reason), reply_to=message)


def _second_moments(record: Mapping[str, object]) -> dict[str, float]:
    """Mean second moments by parameter, from which AdamW may start a round: finite, and as squares never below zero."""
    means = {name: typed(record, name, float) for name in record}
    if not all(math.isfinite(mean) and mean >= 0.0 for mean in means.values()):
        raise UpdateError("the server's order holds second moments that are no means of squares; is its state damaged?")
    return means
