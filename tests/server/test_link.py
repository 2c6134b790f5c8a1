"""A SuperLink's Grid: one reply at a time, and none of them, nor a request that failed, ends the round."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents, validate_object_content
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server import link, messages
from server.link import LinkGrid


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PULL_S", 0.01)


class Answers(Grid):
    """A SuperLink that answers each message in its own way; a list is worked off from one question to the next."""

    run = None

    def __init__(self, answers: dict[str, list[Any]]) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]

    def set_run(self, run: Any) -> None: ...

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return self._next("nodes")

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._next("push")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (message_id,) = message_ids
        self.asked.append(message_id)
        return self._next(message_id)

    def _next(self, key: str) -> Any:
        answer = self.answers[key].pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def order(message_id: str, node: int = 2) -> Message:
    message = Message(RecordDict(), node, "train", ttl=60.0, group_id="1")
    message.metadata.__dict__["_message_id"] = message_id
    return message


def reply(message_id: str) -> Message:
    return Message(RecordDict(), reply_to=order(message_id))


def refused(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-messages")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(status, request=request))


def test_one_reply_is_handed_over_at_a_time_and_the_next_stays_where_it_is() -> None:
    grid = Answers({"a": [[]], "b": [[reply("b")]], "c": [[reply("c")]]})
    assert [one.metadata.reply_to_message_id for one in LinkGrid(grid).pull_messages(["a", "b", "c"])] == ["b"]
    assert grid.asked == ["a", "b"]


def test_a_reply_that_cannot_be_decoded_costs_its_site_alone() -> None:
    grid = LinkGrid(Answers({"a": [KeyError("Array")], "b": [[reply("b")]]}))
    (bad,) = grid.pull_messages(["a", "b"])
    assert bad.metadata.reply_to_message_id == "a"
    assert messages.reason(bad) == "its reply cannot be decoded; are both of one version?"
    (good,) = grid.pull_messages(["b"])
    assert good.metadata.reply_to_message_id == "b"


def test_a_reply_that_claims_to_answer_another_order_counts_for_its_own() -> None:
    (bad,) = LinkGrid(Answers({"a": [[reply("b")]]})).pull_messages(["a", "b"])
    assert bad.metadata.reply_to_message_id == "a"
    assert bad.has_error()


def test_a_request_that_failed_is_asked_again() -> None:
    grid = LinkGrid(Answers({"a": [refused(500), [reply("a")]], "b": [[], []]}))
    assert list(grid.pull_messages(["a", "b"])) == []
    assert len(list(grid.pull_messages(["a", "b"]))) == 1
    assert list(LinkGrid(Answers({"nodes": [refused(500)]})).get_node_ids()) == []


def test_a_superlink_that_died_within_a_handshake_is_asked_again() -> None:
    """Flower repeats what is a failed connection, but not if the error's text speaks of TLS."""
    torn = httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol")
    grid = LinkGrid(Answers({"a": [torn, [reply("a")]], "nodes": [torn, [2]], "push": [torn, ["b"]]}))
    assert list(grid.pull_messages(["a"])) == []
    assert len(list(grid.pull_messages(["a"]))) == 1
    assert [list(grid.get_node_ids()), list(grid.get_node_ids())] == [[], [2]]
    assert list(grid.push_messages([order("x"), order("y")])) == ["", "b"]


def test_an_order_that_the_link_does_not_take_has_no_id() -> None:
    failed = ObjectPushError("object", 7, "session")
    grid = LinkGrid(Answers({"push": [["a"], [None], refused(409), failed, ["b"]]}))
    assert list(grid.push_messages([order("x") for _ in range(5)])) == ["a", "", "", "", "b"]


def test_a_run_that_was_stopped_ends() -> None:
    with pytest.raises(RunNotRunningException):
        LinkGrid(Answers({"a": [RunNotRunningException()]})).pull_messages(["a"])


def test_sending_and_receiving_ends_with_the_last_reply_or_the_time() -> None:
    both = LinkGrid(Answers({"push": [["a"], ["b"]], "a": [[], [reply("a")]], "b": [[reply("b")]]}))
    assert len(list(both.send_and_receive([order("a"), order("b")], timeout=60.0))) == 2
    never = LinkGrid(Answers({"push": [["a"], refused(500)], "a": [[]] * 1000}))
    assert list(never.send_and_receive([order("a"), order("b")], timeout=0.1)) == []


def test_all_that_orders_and_replies_hold_survives_flowers_objects() -> None:
    """Between machines a message is a tree of objects by their hashes, and not the protobuf of the other engines."""
    arrays = {
        "w": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "same": np.arange(6, dtype=np.uint8).reshape(2, 3),
        "w:scale": np.array([1e-40, 2.0], np.float32),
        "w:index": np.array([[1, 2]], np.int32),
        "half": np.array([[1.5, -2.0]], np.float16),
        "int8": np.array([[-128, 127]], np.int8),
        "scalar": np.array(3.0, np.float32),
        "none": np.zeros((2, 0), np.uint8),
    }
    records = {
        "order": ConfigRecord({"run": "little-0", "round": 3, "nonce": "a" * 32}),
        "metrics": MetricRecord({"mlm/loss": [8.25, 4.0]}),
        "examples": MetricRecord({"image": 4}),
        "second_moments": MetricRecord({"blocks.0.w": 1e-12}),
        "nothing": MetricRecord({}),
        "none": ArrayRecord({}),
        "deltas": ArrayRecord({name: Array(array) for name, array in arrays.items()}),
    }
    sent = Message(RecordDict(records), 2, "train", ttl=60.0, group_id="3")
    contents = {key: one.deflate() for key, one in get_all_nested_objects(sent).items()}
    for content in contents.values():
        validate_object_content(content)
    came = inflate_object_from_contents(sent.object_id, contents)
    assert isinstance(came, Message)
    assert dict(came.content) == records
    assert list(came.content.array_records["deltas"]) == list(arrays)
    for name, array in arrays.items():
        found = came.content.array_records["deltas"][name].numpy()
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert dict(message_from_proto(message_to_proto(came)).content) == records


class Store:
    """A SuperLink's Runtime API with one reply, whose objects it hands over; counts what was asked for."""

    def __init__(self, message: Message) -> None:
        self.objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
        self.head = message_to_proto(Message(RecordDict(), reply_to=order("a")))
        self.head.metadata.message_id = message.object_id
        self.tree, self.fetched, self.confirmed = get_object_tree(message), 0, 0

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:  # noqa: N802
        return PullAppMessagesResponse(messages_list=[self.head], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        content = self.objects[request.object_id]
        self.fetched += len(content)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed += 1


@pytest.mark.parametrize(("num_bytes", "is_taken"), [(1_000, True), (3_000_000, False)])
def test_a_reply_that_is_larger_than_any_update_is_not_fetched_whole(
    num_bytes: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ODD_BYTES", 100_000)
    chunks = {f"part{number}": Array(np.full(num_bytes // 100, number, np.uint8)) for number in range(100)}
    store = Store(Message(RecordDict({"deltas": ArrayRecord(chunks)}), reply_to=order("a")))
    inner = HttpGrid(token="t")
    inner.set_run(Run.create_empty(7))
    vars(inner)["_client"] = store
    (reply,) = LinkGrid(inner).pull_messages(["a"])
    if is_taken:
        assert set(reply.content["deltas"]) == set(chunks)
        return
    assert messages.reason(reply) == "its reply is larger than any update of what it was sent"
    assert (reply.metadata.reply_to_message_id, store.confirmed) == ("a", 0)
    assert store.fetched < num_bytes / 2
