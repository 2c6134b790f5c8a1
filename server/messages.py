"""Between Flower's records and the words of fedmix, as the server sees them. client/messages.py is the other end.

A reply is read field by field into an Update; whatever is missing, of another type or about another round is refused
with a reason before any arithmetic sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedmix.batch import STREAMS
from fedmix.errors import UpdateError
from fedmix.federation.update import Update, typed


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
    except KeyError:
        raise UpdateError("a node answered something that is no greeting; is its fedmix of this version?") from None
    return Greeting(
        message.metadata.src_node_id,
        typed(said, "site", str),
        typed(said, "stream", str),
        typed(said, "fingerprint", str),
        typed(said, "studies", int),
    )


def order(
    node_id: int, *, run: str, round_number: int, fingerprint: str, base: str, parameters: Mapping[str, Tensor]
) -> tuple[Message, int]:
    """A round's order to a node, and its bytes of parameters."""
    record = ArrayRecord({name: Array(np.ascontiguousarray(value.numpy())) for name, value in parameters.items()})
    plan = ConfigRecord({"run": run, "round": round_number, "fingerprint": fingerprint, "base": base})
    message = Message(RecordDict({"order": plan, "parameters": record}), node_id, "train", group_id=str(round_number))
    return message, _num_bytes(record)


def read_reply(message: Message, *, site: str, run: str, round_number: int, fingerprint: str, base: str) -> Reply:
    """The update a reply carries; raises UpdateError if it refused, is malformed, or answers another order."""
    if message.has_error():
        raise UpdateError(reason(message))
    try:
        content = message.content
        receipt, examples = content.config_records["receipt"], content.metric_records["examples"]
        record, metrics = content.array_records["deltas"], content.metric_records["metrics"]
        deltas = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UpdateError(f"reply is not of the form this version understands ({type(error).__name__})") from None
    expected = {"site": site, "run": run, "round": round_number, "fingerprint": fingerprint, "base": base}
    wrong = [key for key, value in expected.items() if receipt.get(key) != value]
    if wrong:
        raise UpdateError(f"reply answers another order: {', '.join(wrong)} differ")
    update = Update(
        site=site,
        deltas=deltas,
        examples={stream: typed(examples, stream, int) for stream in STREAMS},
        steps=typed(receipt, "steps", int),
        metrics={name: _pair(value) for name, value in metrics.items()},
    )
    return Reply(update, _num_bytes(record), typed(receipt, "train_start", float), typed(receipt, "train_end", float))


def reason(message: Message) -> str:
    """Why a node answered with an error."""
    return message.error.reason or f"error code {message.error.code}"


def _pair(value: object) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise UpdateError("a metric should be a pair of sum and weight")
    return float(value[0]), float(value[1])


def _num_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())
