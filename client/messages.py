"""Between Flower's records and the words of fedmix, as a site sees them. server/messages.py is the other end.

Only arrays, numbers and short strings of a fixed set of keys travel; nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from torch import Tensor

from fedmix.errors import UpdateError
from fedmix.federation.update import Update, typed

REFUSED = 1001  # Flower reserves codes below 1000 for itself; the reason is safe to show
RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,79}")  # it names a folder at this site, so it is never taken on trust


@dataclass(frozen=True)
class Order:
    """One round's order from the server: where the run stands, and the parameters that this site can train."""

    run: str
    round_number: int
    fingerprint: str
    base: str
    parameters: dict[str, Tensor]


def read_order(message: Message) -> Order:
    """The order a train message carries; raises UpdateError if it is not one."""
    try:
        plan, record = message.content.config_records["order"], message.content.array_records["parameters"]
        parameters = {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
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
        parameters,
    )


def greeting(message: Message, *, site: str, stream: str, fingerprint: str, studies: int) -> Message:
    """Who this site is and what it holds, in answer to the server's query."""
    content = ConfigRecord({"site": site, "stream": stream, "fingerprint": fingerprint, "studies": studies})
    return Message(RecordDict({"greeting": content}), reply_to=message)


def reply(message: Message, order: Order, update: Update, *, fingerprint: str, trained_s: tuple[float, float]) -> Message:
    """A site's update as the answer to its order; ``trained_s`` is when training began and ended (seconds since 1970)."""
    receipt = ConfigRecord(
        {
            "run": order.run,
            "round": order.round_number,
            "base": order.base,
            "fingerprint": fingerprint,
            "site": update.site,
            "steps": update.steps,
            "train_start": trained_s[0],
            "train_end": trained_s[1],
        }
    )
    examples = MetricRecord({stream: int(count) for stream, count in update.examples.items()})
    metrics = MetricRecord({name: [total, weight] for name, (total, weight) in update.metrics.items()})
    content = RecordDict({"receipt": receipt, "examples": examples, "metrics": metrics, "deltas": _arrays(update.deltas)})
    return Message(content, reply_to=message)


def refusal(message: Message, reason: str) -> Message:
    """An error that the server may show: what is wrong at this site, without ids, text or file names."""
    return Message(Error(code=REFUSED, reason=reason), reply_to=message)


def _arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.contiguous().numpy()) for name, tensor in tensors.items()})
