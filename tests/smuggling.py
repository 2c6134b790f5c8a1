"""What a job might try to smuggle out in its reply: what follows would be seen by the coordinator if the gate let it pass.

``begin`` has the ClientApp of a real agent do so, one change a message; the agent's Python finds it by its environment.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ConfigRecord, Message, MetricRecord

from client import messages

TURNS = "FEDMIX_TEST_TURNS"  # names a file that has a byte for every reply that was changed


def add_record(reply: Message) -> None:
    reply.content["reports"] = ConfigRecord({"text": "No pleural effusion."})


def add_field(reply: Message) -> None:
    reply.content.config_records["receipt"]["note"] = "No pleural effusion."


def say_otherwise(reply: Message) -> None:
    reply.content.config_records["receipt"]["nonce"] = "No pleural effusion."


def say_when(reply: Message) -> None:
    reply.content.config_records["receipt"]["train_start"] = 19480401.0


def add_metric(reply: Message) -> None:
    reply.content.metric_records["metrics"]["patients"] = [19480401.0, 1.0]


def lengthen_metric(reply: Message) -> None:
    reply.content.metric_records["metrics"]["mvm/loss"] = [1.0, 1.0, 19480401.0]


def add_count(reply: Message) -> None:
    reply.content.metric_records["examples"]["patients"] = 19480401


def add_moment(reply: Message) -> None:
    reply.content["second_moments"] = MetricRecord({"match_head.weight": 0.1})


def add_tensor(reply: Message) -> None:
    reply.content.array_records["deltas"]["pixels"] = Array(np.zeros((3, 3), np.float32))


def add_other_group(reply: Message) -> None:
    reply.content.array_records["deltas"]["match_head.weight"] = Array(np.zeros((1, 16), np.float32))


def first(reply: Message) -> tuple[str, Array]:
    return next(iter(sorted(reply.content.array_records["deltas"].items())))


def enlarge(reply: Message) -> None:
    name, array = first(reply)
    value = array.numpy()
    reply.content.array_records["deltas"][name] = Array(np.concatenate([value, value]))


def append_bytes(reply: Message) -> None:
    name, array = first(reply)
    reply.content.array_records["deltas"][name] = Array(
        array.dtype, array.shape, array.stype, array.data + b"No pleural effusion."
    )


def hide_in_header(reply: Message) -> None:
    name, array = first(reply)
    data = bytearray(array.data)
    place = data.index(b"}") + 1
    data[place : place + 1] = b"\t"
    reply.content.array_records["deltas"][name] = Array(array.dtype, array.shape, array.stype, bytes(data))


def claim_type(reply: Message) -> None:
    name, array = first(reply)
    reply.content.array_records["deltas"][name] = Array(array.dtype, array.shape, "No pleural effusion.", array.data)


def drop_tensor(reply: Message) -> None:
    del reply.content.array_records["deltas"][first(reply)[0]]


CHANGES = [
    add_record,
    add_field,
    say_otherwise,
    say_when,
    add_metric,
    lengthen_metric,
    add_count,
    add_moment,
    add_tensor,
    enlarge,
    append_bytes,
    hide_in_header,
    claim_type,
    drop_tensor,
]
# Those that a real agent is tried with.
TRIED = [add_field, enlarge, add_other_group, append_bytes]


def begin() -> None:
    """Change the replies of this process: the first of all by the first of those changes, and so on; then be honest."""
    honest, turns = messages.reply, Path(os.environ[TURNS])

    def changed(*arguments: Any, **options: Any) -> Message:
        said, turn = honest(*arguments, **options), len(turns.read_bytes())
        if turn < len(TRIED):
            TRIED[turn](said)
            turns.write_bytes(bytes(turn + 1))
        return said

    vars(messages)["reply"] = changed
