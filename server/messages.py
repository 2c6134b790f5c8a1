"""Between Flower's records and the words of fedmix, as the server sees them. client/messages.py is the other end.

A reply is read field by field into an Update; whatever is missing, of another type or about another round is refused
with a reason before any arithmetic sees it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedmix.batch import STREAMS
from fedmix.errors import UpdateError
from fedmix.federation.update import Update, num_bytes, typed

FEDMIX_CODES = range(1000, 1100)  # errors raised by fedmix at a site or in an engine; their reasons are written to be shown
MAX_REASON = 300  # signs of a site's reason that are shown
MAX_METRICS = 32
METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}(/[a-z0-9_]{1,40}){0,2}")
MAX_HEADER_BYTES = 1024  # an .npy header of a few dimensions has 128


@dataclass(frozen=True)
class Greeting:
    """Who answers at a node."""

    node_id: int
    site: str
    stream: str
    fingerprint: str
    studies: int


@dataclass(frozen=True)
class Reply:
    """An update with the facts around it: bytes on the wire, and when the site trained (seconds since 1970)."""

    update: Update
    bytes_up: int
    train_start: float
    train_end: float


def query(node_id: int) -> Message:
    """Ask a node who it is."""
    return Message(RecordDict({"query": ConfigRecord({"what": "greeting"})}), node_id, "query")


def read_greeting(message: Message) -> Greeting:
    """A node's answer; raises UpdateError with the site's own reason if it refused."""
    if message.has_error():
        raise UpdateError(reason(message))
    try:
        said = message.content.config_records["greeting"]
    except (KeyError, ValueError):
        raise UpdateError("a node answered something that is no greeting; is its fedmix of this version?") from None
    return Greeting(
        message.metadata.src_node_id,
        typed(said, "site", str),
        typed(said, "stream", str),
        typed(said, "fingerprint", str),
        typed(said, "studies", int),
    )


def order_content(
    *, run: str, round_number: int, fingerprint: str, base: str, parameters: Mapping[str, Tensor]
) -> tuple[RecordDict, int]:
    """What every site that trains these parameters is told in a round, and its bytes of parameters."""
    record = ArrayRecord({name: Array(value.contiguous().numpy()) for name, value in parameters.items()})
    plan = ConfigRecord({"run": run, "round": round_number, "fingerprint": fingerprint, "base": base})
    return RecordDict({"order": plan, "parameters": record}), _num_bytes(record)


def order(node_id: int, content: RecordDict, *, round_number: int, deadline_s: float) -> Message:
    """A round's order to a node; whatever carries it may give it up after the deadline, for nobody waits any longer."""
    return Message(content, node_id, "train", ttl=deadline_s, group_id=str(round_number))


def read_reply(
    message: Message,
    *,
    site: str,
    run: str,
    round_number: int,
    fingerprint: str,
    base: str,
    parameters: Mapping[str, Tensor],
) -> Reply:
    """The update that a reply to an order over ``parameters`` carries.

    Raises UpdateError if the site refused, the reply is malformed, answers another order, or is larger than it can be.
    """
    if message.has_error():
        raise UpdateError(reason(message))
    try:
        content = message.content
        receipt, examples = content.config_records["receipt"], content.metric_records["examples"]
        record, metrics = content.array_records["deltas"], content.metric_records["metrics"]
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError(f"reply is not of the form this version understands ({type(error).__name__})") from None
    expected = {"site": site, "run": run, "round": round_number, "fingerprint": fingerprint, "base": base}
    wrong = [key for key, value in expected.items() if typed(receipt, key, type(value)) != value]
    if wrong:
        raise UpdateError(f"reply answers another order: {', '.join(wrong)} differ")
    update = Update(
        site=site,
        deltas=_tensors(record, parameters),
        examples={stream: typed(examples, stream, int) for stream in STREAMS},
        steps=typed(receipt, "steps", int),
        metrics=_metrics(metrics),
    )
    return Reply(update, _num_bytes(record), _moment(receipt, "train_start"), _moment(receipt, "train_end"))


def reason(message: Message) -> str:
    """Why a node answered with an error, fit for a terminal and a log.

    Flower's own errors quote the exception, in which a site's path may stand; they are told by their number alone.
    """
    code = message.error.code
    if code not in FEDMIX_CODES or not message.error.reason:
        return f"Flower error {code}; the node's own log has the details"
    text = "".join(sign if sign.isprintable() else " " for sign in message.error.reason)
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "..."


def _tensors(record: ArrayRecord, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays by name, decoded only when name and size are what was asked for: a claim must not cost memory."""
    unknown = [name for name in record if name not in parameters]
    if unknown:
        raise UpdateError(f"{len(unknown)} tensors in the update are not among those that the site was to train")
    for name, array in record.items():
        if len(array.data) > num_bytes([parameters[name]]) + MAX_HEADER_BYTES:
            raise UpdateError(f"{name}: update holds {len(array.data)} bytes, the model {num_bytes([parameters[name]])}")
    try:
        return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except Exception as error:  # whatever the decoder trips over, it is the reply that is wrong
        raise UpdateError(f"the update's tensors cannot be decoded ({type(error).__name__})") from None


def _metrics(record: Mapping[str, object]) -> dict[str, tuple[float, float]]:
    if len(record) > MAX_METRICS or not all(METRIC.fullmatch(name) for name in record):
        raise UpdateError(f"a reply has at most {MAX_METRICS} metrics, named like mvm/loss")
    return {name: _pair(value) for name, value in record.items()}


def _pair(value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UpdateError("a metric should be a pair of sum and weight")
    return float(value[0]), float(value[1])


def _moment(receipt: Mapping[str, object], key: str) -> float:
    value = typed(receipt, key, float)
    if not math.isfinite(value):
        raise UpdateError(f"field {key!r} of a message should be a time, it is {value}")
    return value


def _num_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())
