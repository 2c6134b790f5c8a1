"""Between Flower's records and the words of fedmix, as the server sees them. client/messages.py is the other end.

A reply is read field by field; whatever is missing, of another type or about another order is refused with a reason. What
its numbers are worth is for fedmix/federation/screening.py to say.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from torch import Size, Tensor

from fedmix import config
from fedmix.batch import STREAMS, Stream
from fedmix.errors import UpdateError
from fedmix.federation.update import typed

FEDMIX_CODES = range(1000, 1100)  # errors raised by fedmix at a site or in an engine; their reasons are written to be shown
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

FLOWERS_ERRORS = {
    ErrorCode.MESSAGE_UNAVAILABLE: "its agent ended, or its order or answer was lost on the way",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its answer came too late",
    ErrorCode.NODE_UNAVAILABLE: "its agent went offline",
    ErrorCode.CLIENT_APP_CRASHED: "the program that answers for it stopped without a word (killed, or out of memory?)",
}
NEEDS_ALL = 1004  # a site's cache lacks parameters that the order left out
MAX_REASON = 300  # signs of a site's reason that are shown
REPLY_RECORDS = {"receipt", "examples", "metrics", "second_moments", "privacy", "deltas"}
MASKED_RECORDS = REPLY_RECORDS - {"deltas"} | {"masked", "sum"}
RECEIPT_FIELDS = {"run", "round", "base", "fingerprint", "site", "nonce", "steps", "train_start", "train_end", "ledger"}
PRIVACY_FIELDS = {"epsilon", "epsilon_rdp", "steps", "noise_multiplier", "sample_rate"}
NO_LEDGER = ""  # simulated sites keep none
HEAD = re.compile(r"[0-9a-f]{64}")
MAX_METRICS = 32
METRIC = re.compile(r"[a-z][a-z0-9_]{0,39}(/[a-z0-9_]{1,40}){0,2}")
MAX_HEADER_BYTES = 1024  # an .npy header of a few dimensions has 128


@dataclass(frozen=True)
class Greeting:
    """Who answers at a node. ``ledger``: the head of the site's own, empty if it keeps none."""

    site: str
    stream: str
    fingerprint: str
    studies: int
    ledger: str


@dataclass(frozen=True)
class Order:
    """What was asked of a site in a round; a reply must answer exactly this.

    ``base``: digest of all parameters that the site's stream reaches; ``groups``: digest of each of their groups. ``plan``:
    digest of the plan that real sites have approved, empty in a simulation.
    """

    site: config.Site
    run: str
    round_number: int
    fingerprint: str
    plan: str
    base: str
    nonce: str
    groups: Mapping[str, str]
    shapes: Mapping[str, Size]


@dataclass(frozen=True)
class Reply:
    """A reply that answers its order, its numbers not yet screened.

    ``arrays``: the coded tensors as they came, by name on the wire; views into the message, nothing is copied.
    ``train_start`` and ``train_end``: seconds since 1970 by the site's clock. ``ledger``: the head of the site's own;
    ``privacy``: what its privacy ledger holds, by its word.
    """

    examples: Mapping[Stream, int]
    steps: int
    metrics: Mapping[str, tuple[float, float]]
    second_moments: Mapping[str, float]
    arrays: Mapping[str, NDArray[Any]]
    bytes_up: int
    train_start: float
    train_end: float
    ledger: str
    privacy: Mapping[str, float]


def query(node_id: int, *, fingerprint: str = "", plan: str = "") -> Message:
    """Ask a node who it is, and whether it would take part in an experiment under a plan."""
    return Message(RecordDict({"query": ConfigRecord({"fingerprint": fingerprint, "plan": plan})}), node_id, "query")


def read_greeting(message: Message) -> Greeting:
    """A node's answer; raises UpdateError with the site's own reason if it refused."""
    if message.has_error():
        raise UpdateError(reason(message))
    try:
        said = message.content.config_records["greeting"]
    except (KeyError, ValueError):
        raise UpdateError("a node answered something that is no greeting; is its fedmix of this version?") from None
    found = Greeting(
        typed(said, "site", str),
        typed(said, "stream", str),
        typed(said, "fingerprint", str),
        typed(said, "studies", int),
        _head(said),
    )
    if found.studies < 1:  # a site's weight is at most what it registers, and a negative one would turn the mean round
        raise UpdateError(f"the site registers {found.studies} training studies; a site that takes part has at least one")
    return found


def order_content(
    order: Order, parameters: Mapping[str, Tensor], second_moments: Mapping[str, float]
) -> tuple[RecordDict, int]:
    """An order's records but for its nonce, which differs from site to site, and its bytes of parameters."""
    record = ArrayRecord({name: Array(value.contiguous().numpy()) for name, value in parameters.items()})
    moments = MetricRecord({name: float(value) for name, value in second_moments.items()})
    content = RecordDict({"groups": ConfigRecord(dict(order.groups)), "parameters": record, "second_moments": moments})
    return content, _num_bytes(record)


@dataclass(frozen=True)
class Summing:
    """Which attempt at which round's secure sum a message is of; ``plan`` as in an order."""

    run: str
    round_number: int
    fingerprint: str
    plan: str
    attempt: str


def phase_message(node_id: int, phase: str, summing: Summing, values: ConfigRecord, *, deadline_s: float) -> Message:
    """A message of a phase of a secure sum (server/secure.py); ``values`` hold the attempt, and what the phase tells."""
    order = ConfigRecord(
        {
            "run": summing.run,
            "round": summing.round_number,
            "fingerprint": summing.fingerprint,
            "plan": summing.plan,
            "ledger": NO_LEDGER,
        }
    )
    content = RecordDict({"order": order, "sum": values})
    return Message(content, node_id, f"query.{phase}", ttl=deadline_s, group_id=str(summing.round_number))


def read_phase(message: Message, phase: str, site: str, summing: Summing) -> tuple[ConfigRecord, str]:
    """A site's answer in a phase of a secure sum, and its ledger's head. Raises UpdateError if it refused."""
    if message.has_error():
        raise UpdateError(reason(message))
    if set(message.content) != {"receipt", phase}:
        raise UpdateError("reply carries other records than its phase of a secure sum has")
    receipt, values = _record(message.content, "receipt", ConfigRecord), _record(message.content, phase, ConfigRecord)
    expected = {
        "run": summing.run,
        "round": summing.round_number,
        "fingerprint": summing.fingerprint,
        "attempt": summing.attempt,
        "site": site,
    }
    if set(receipt) != {*expected, "ledger"} or any(receipt[key] != value for key, value in expected.items()):
        raise UpdateError("reply answers another message of a secure sum")
    return values, _head(receipt)


def read_masked(message: Message) -> tuple[dict[str, NDArray[Any]], ConfigRecord]:
    """The masked vectors of a reply by tower, views into the message, and what the site says of them."""
    vectors, seal = _record(message.content, "masked", ArrayRecord), _record(message.content, "sum", ConfigRecord)
    return {tower: _view(array) for tower, array in vectors.items()}, seal


def order_message(
    node_id: int, order: Order, content: RecordDict, *, deadline_s: float, kind: Literal["train", "evaluate"] = "train"
) -> Message:
    """A round's order to a node; whatever carries it may give it up after the deadline, for nobody waits any longer."""
    plan = ConfigRecord(
        {
            "run": order.run,
            "round": order.round_number,
            "fingerprint": order.fingerprint,
            "plan": order.plan,
            "ledger": NO_LEDGER,
            "base": order.base,
            "nonce": order.nonce,
        }
    )
    return Message(RecordDict({"order": plan, **content}), node_id, kind, ttl=deadline_s, group_id=str(order.round_number))


def is_offline(message: Message) -> bool:
    """Whether the SuperLink answers for a node, because that has gone offline."""
    return bool(message.has_error()) and message.error.code == ErrorCode.NODE_UNAVAILABLE


def needs_all(message: Message) -> bool:
    """Whether the site has lost parameters that the server took it to hold, and asks for all of them."""
    return bool(message.has_error()) and message.error.code == NEEDS_ALL


def read_reply(message: Message, order: Order, *, is_masked: bool = False) -> Reply:
    """The reply to an order. Raises UpdateError if the site refused, the reply is malformed or answers another order.

    That of a secure sum ``is_masked``: its words are no arrays of a parameter's, and are left for ``read_masked``.

    What it costs is bounded by what arrived: headers are read, tensors are not.
    """
    if message.has_error():
        raise UpdateError(reason(message))
    content = message.content
    extra = set(content) - (MASKED_RECORDS if is_masked else REPLY_RECORDS)
    if extra:
        raise UpdateError(f"reply carries {len(extra)} records that nobody asked for")
    receipt = _record(content, "receipt", ConfigRecord)
    record = _record(content, "masked" if is_masked else "deltas", ArrayRecord)
    examples, metrics, moments = (_record(content, name, MetricRecord) for name in ("examples", "metrics", "second_moments"))
    expected = _echo(order)
    undeclared = (set(receipt) - RECEIPT_FIELDS) | (set(examples) - set(STREAMS))
    if undeclared:
        raise UpdateError(f"reply carries {len(undeclared)} fields that nobody asked for")
    wrong = [key for key, value in expected.items() if typed(receipt, key, type(value)) != value]
    if wrong:
        raise UpdateError(f"reply answers another order: {', '.join(wrong)} differ")
    return Reply(
        examples={stream: typed(examples, stream, int) for stream in STREAMS},
        steps=typed(receipt, "steps", int),
        metrics=_metrics(metrics),
        second_moments={name: typed(moments, name, float) for name in moments},
        arrays={} if is_masked else {name: _view(array) for name, array in record.items()},
        bytes_up=_num_bytes(record),
        train_start=_moment(receipt, "train_start"),
        train_end=_moment(receipt, "train_end"),
        ledger=_head(receipt),
        privacy=_privacy(_record(content, "privacy", MetricRecord) if "privacy" in content else {}),
    )


def read_scores(message: Message, order: Order) -> tuple[dict[str, tuple[float, float]], str]:
    """A site's scores of the order's model as sums and weights, and its ledger's head.

    Raises UpdateError if the site refused, or what it sent is not the answer to the order.
    """
    if message.has_error():
        raise UpdateError(reason(message))
    if set(message.content) != {"receipt", "scores"}:
        raise UpdateError("reply carries other records than a site's scores have")
    receipt, scores = _record(message.content, "receipt", ConfigRecord), _record(message.content, "scores", MetricRecord)
    expected = _echo(order)
    if set(receipt) != {*expected, "ledger"} or any(
        typed(receipt, key, type(value)) != value for key, value in expected.items()
    ):
        raise UpdateError("reply answers another order")
    return _metrics(scores), _head(receipt)


def _echo(order: Order) -> dict[str, str | int]:
    """What a reply repeats of the order that it answers."""
    return {
        "site": order.site.name,
        "run": order.run,
        "round": order.round_number,
        "fingerprint": order.fingerprint,
        "base": order.base,
        "nonce": order.nonce,
    }


def reason(message: Message) -> str:
    """Why a node answered with an error, fit for a terminal and a log.

    Flower's own errors may quote the exception, in which a site's path may stand; they are told by their number, in words of
    ours for those that a failing machine or line brings about.
    """
    code = message.error.code
    if code in FLOWERS_ERRORS:
        return FLOWERS_ERRORS[code]
    if code not in FEDMIX_CODES or not message.error.reason:
        return f"Flower error {code}; the node's own log has the details"
    text = "".join(sign if sign.isprintable() else " " for sign in message.error.reason)
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "..."


def _record(content: RecordDict, name: str, kind: type[Record]) -> Record:
    """A record by its name. Flower's ``content.array_records`` holds the content in a reference cycle, until Python looks for
    such, and with it the whole update.
    """
    record = content.get(name)
    if not isinstance(record, kind):
        raise UpdateError(f"reply is not of the form this version understands: {name!r} is missing or of another kind")
    return record


def _view(array: Array) -> NDArray[Any]:
    """An array as it lies in the message. Only numpy's first format, in C order and without objects, is understood."""
    try:
        if array.stype != "numpy.ndarray":
            raise ValueError(array.stype)
        header = io.BytesIO(array.data[:MAX_HEADER_BYTES])
        if np.lib.format.read_magic(header) != (1, 0):
            raise ValueError("version")
        shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(header, max_header_size=MAX_HEADER_BYTES)
        if (
            dtype.hasobject
            or (is_fortran and len(shape) > 1)
            or len(array.data) - header.tell() != math.prod(shape) * dtype.itemsize
        ):
            raise ValueError("content")
        return np.frombuffer(array.data, dtype, offset=header.tell()).reshape(shape)
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


def _privacy(record: Mapping[str, object]) -> dict[str, float]:
    if record and set(record) != PRIVACY_FIELDS:
        raise UpdateError(f"what a site says of its privacy should be {', '.join(sorted(PRIVACY_FIELDS))} or nothing")
    values = {name: typed(record, name, float) for name in record}
    if not all(math.isfinite(value) and value >= 0.0 for value in values.values()):
        raise UpdateError("what the site says of its privacy is not finite, or below zero")
    return values


def _moment(receipt: Mapping[str, object], key: str) -> float:
    value = typed(receipt, key, float)
    if not math.isfinite(value):
        raise UpdateError(f"field {key!r} of a message should be a time, it is {value}")
    return value


def _head(record: Mapping[str, object]) -> str:
    """The head of a site's ledger, or nothing; any other text has no business there."""
    head = typed(record, "ledger", str)
    if head != NO_LEDGER and not HEAD.fullmatch(head):
        raise UpdateError("field 'ledger' of a message should be a hash of 64 digits")
    return head


def _num_bytes(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())
