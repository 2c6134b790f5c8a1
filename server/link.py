"""A SuperLink's Grid, made fit for rounds that no single site may end and no number of sites may fill memory with.

Flower pulls every reply that has come in one call, holds them all, and raises if one of them cannot be decoded or the
link answers one request with an error; by then it has confirmed the replies before that one, and they are lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from typing import Any

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.superlink.grid import HttpGrid

UNREADABLE = 1006
ODD_BYTES, TIMES_ORDER = 16 << 20, 4  # of a reply at most: what is no weights, and weights, masked or as numbers and places
PULL_S = 0.5  # a reply ends the wait; this is how long nothing at all may happen
log = logging.getLogger(__name__)


class TooLargeError(Exception):
    """A reply has more bytes than any that was asked for."""


class Meter:
    """Flower's client of a SuperLink, which fetches no more of a reply's objects than ``left`` bytes."""

    def __init__(self, client: Any) -> None:
        self._client, self._lock, self.left = client, threading.Lock(), 0

    def __getattr__(self, name: str) -> Any:
        """Every other call as it is."""
        return getattr(self._client, name)

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802, Flower's name
        """An object; raises TooLargeError at the first one that is too much. Several are fetched at a time."""
        response: PullObjectResponse = self._client.PullObject(request)
        with self._lock:
            self.left -= len(response.object_content)
            if self.left < 0:
                raise TooLargeError
        return response


def metered(grid: HttpGrid) -> Meter:
    """The meter of a Grid's client, which is put there the first time and after a reconnection."""
    client: object = grid._runtime_client
    meter = client if isinstance(client, Meter) else Meter(client)
    vars(grid)["_client"] = meter
    return meter


class LinkGrid(Grid):
    """Asks for one reply at a time, so that memory holds one and a bad one costs its site alone.

    Flower itself repeats a request for as long as the SuperLink cannot be reached; what it does not repeat (an answer
    like 500, or a SuperLink that died within a TLS handshake) is asked again here, until the round's deadline. A run that
    was stopped ends the loop: Flower's RunNotRunningException is no Exception, and passes.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._most_bytes = ODD_BYTES  # of a reply, before anything reads it

    def set_run(self, run: Any) -> None:
        """Flower's own business."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run's record at the SuperLink."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are connected now."""
        try:
            return list(self._grid.get_node_ids())
        except httpx.HTTPError as error:
            log.warning("the SuperLink cannot tell its nodes: %s", _what(error))
            return []

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are connected now, with the names that their keys are registered under."""
        try:
            return list(self._grid.get_nodes())
        except httpx.HTTPError as error:
            log.warning("the SuperLink cannot tell its nodes: %s", _what(error))
            return []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages one by one; the id of one that the SuperLink would not take is empty."""
        ids: list[str] = []
        for message in messages:
            self._most_bytes = max(self._most_bytes, ODD_BYTES + TIMES_ORDER * _num_bytes(message))
            try:
                ids.extend(one or "" for one in self._grid.push_messages([message]))
            except (httpx.HTTPError, ObjectPushError) as error:
                log.warning("the SuperLink did not take a message: %s", _what(error))
                ids.append("")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """One reply to any of these messages, if one has come; otherwise none, after a moment."""
        for message_id in message_ids:
            if isinstance(self._grid, HttpGrid):
                metered(self._grid).left = self._most_bytes
            try:
                replies = list(self._grid.pull_messages([message_id]))
            except httpx.HTTPError as error:
                log.warning("the SuperLink cannot hand over a reply: %s", _what(error))
                continue
            except TooLargeError:
                log.warning("a reply is larger than %d bytes and was not fetched whole", self._most_bytes)
                return [_unreadable(message_id, "its reply is larger than any update of what it was sent")]
            except Exception as error:  # whatever the decoder trips over, it is this one reply that is wrong
                log.warning("a reply cannot be read: %s", type(error).__name__)
                return [_unreadable(message_id)]
            # The site writes this id into its reply, and Flower does not compare it with the one that was answered.
            if replies and replies[0].metadata.reply_to_message_id != message_id:
                return [_unreadable(message_id)]
            if replies:
                return replies
        time.sleep(PULL_S)
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, at most ``timeout`` seconds."""
        return exchange(self, messages, timeout)


def exchange(grid: Grid, messages: Iterable[Message], timeout: float | None) -> list[Message]:
    """Send messages over a Grid and wait for the replies, at most ``timeout`` seconds; those that came."""
    waiting = {one for one in grid.push_messages(messages) if one}
    deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
    replies: list[Message] = []
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            replies.append(reply)
    return replies


def _what(error: Exception) -> str:
    """A failed request in a word."""
    return str(error.response.status_code) if isinstance(error, httpx.HTTPStatusError) else type(error).__name__


def _num_bytes(message: Message) -> int:
    """What an order holds of weights."""
    if not message.has_content():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def _unreadable(message_id: str, why: str = "its reply cannot be decoded; are both of one version?") -> Message:
    """What a round takes in place of a reply that cannot be decoded."""
    asked = Message(RecordDict(), 0, "train")
    asked.metadata.__dict__["_message_id"] = message_id
    return Message(Error(code=UNREADABLE, reason=why), reply_to=asked)
