"""The SuperNode, made fit for a line that is slow and breaks, and telling how far a large message has come.

Flower 1.41.0 repeats a call that a broken line lost, but takes every error that names SSL for a bad certificate and gives up:
also a line that breaks while TLS is being set up. What it was sending is then lost. Here it gives up for a certificate alone.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from logging import INFO

import httpx
from flwr.supercore import log
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker

from fedmix.deployment.passage import Passage

ON_THE_LINE = "on the line: "  # how a line of the log begins that tells of a message on its way


def lasting_invoker() -> RetryInvoker:
    """Flower's own, which also repeats what was lost while TLS was set up or taken down."""
    invoker = make_simple_http_retry_invoker()
    gives_up = invoker.should_giveup
    assert gives_up is not None
    invoker.should_giveup = lambda error: not is_of_the_line(error) and gives_up(error)
    return invoker


def is_of_the_line(error: BaseException) -> bool:
    """Whether a call failed because the line broke or is slow, and not for what the other side is or said."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return False
        cause = cause.__cause__ or cause.__context__  # httpcore raises ``from None`` what TLS has raised
    return isinstance(error, httpx.TransportError)


def push(object_contents: Iterable[tuple[str, bytes]], push_object_fn: Callable[[str, bytes], None]) -> None:
    """Send a message's objects, as Flower does."""
    sent = _Counted("sent")

    def counted() -> Iterator[tuple[str, bytes]]:
        for object_id, content in object_contents:  # all are here long before the first of a large message is sent
            sent.total_bytes += len(content)
            yield object_id, content

    def push_one(object_id: str, content: bytes) -> None:
        push_object_fn(object_id, content)
        sent.add(len(content))

    inflatable_utils.push_object_contents_from_iterable(counted(), push_one)


def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
    """Fetch a message's objects, as Flower does; how long each is, is known when it is here."""
    received = _Counted("received", len(object_ids))

    def pull_one(object_id: str) -> bytes:
        content = pull_object_fn(object_id)
        received.add(len(content))
        return content

    return inflatable_utils.pull_objects(object_ids, pull_one)


class _Counted:
    """Counts the bytes of a message that have passed; its parts pass in several threads."""

    def __init__(self, what: str, num_parts: int | None = None) -> None:
        self.total_bytes = 0
        self._passage = Passage(ON_THE_LINE + what, lambda words: log(INFO, words))
        self._num_parts, self._bytes, self._parts, self._lock = num_parts, 0, 0, threading.Lock()

    def add(self, num_bytes: int) -> None:
        """One part more has passed, of so many bytes."""
        with self._lock:
            self._bytes, self._parts = self._bytes + num_bytes, self._parts + 1
            if self._num_parts is None:
                self._passage.at(self._bytes, self._bytes / self.total_bytes, self.total_bytes)
            else:
                self._passage.at(self._bytes, self._parts / self._num_parts)
