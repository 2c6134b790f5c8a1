"""The SuperNode's end of a slow and broken line: what it repeats, what it gives up for, and what it says meanwhile."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.run import RunNotRunningException

from client import agent, line
from fedmix.deployment import passage
from server import certificates
from server.home import Home


@contextmanager
def answering(home: Home, *, closes: int) -> Iterator[str]:
    """A server with the home's certificate that ends the first connections before TLS is set up; its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home.certificate, home.key)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for number in range(closes + 1):
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with one:
                if number >= closes:
                    try:
                        with context.wrap_socket(one, server_side=True) as safe:
                            safe.recv(1 << 16)
                            safe.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                    except OSError:  # the caller does not trust the certificate
                        return

    threading.Thread(target=serve, daemon=True).start()
    with closing(listener):
        yield f"https://localhost:{listener.getsockname()[1]}"


def certified(folder: Path) -> Home:
    """A coordinator's home with an authority and a certificate."""
    made = Home(folder)
    folder.mkdir()
    certificates.make_authority(made, "localhost")
    certificates.issue(made, "localhost")
    return made


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return certified(tmp_path / "hub")


def asked(url: str, ca: Path) -> int:
    with httpx.Client(verify=ssl.create_default_context(cafile=str(ca)), trust_env=False) as client:
        return client.get(url).status_code


def test_a_line_that_breaks_while_tls_is_set_up_is_tried_again(home: Home) -> None:
    invoker = line.lasting_invoker()
    invoker.wait_function = lambda seconds: None
    with answering(home, closes=2) as url:
        assert invoker.invoke(asked, url, home.ca_certificate) == 200


def test_a_certificate_that_is_not_the_coordinators_is_given_up_for(home: Home, tmp_path: Path) -> None:
    other = certified(tmp_path / "other")
    with answering(home, closes=0) as url, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        line.lasting_invoker().invoke(asked, url, other.ca_certificate)


@pytest.mark.parametrize(("status", "raised"), [(400, httpx.HTTPStatusError), (403, RunNotRunningException)])
def test_what_the_coordinator_refuses_is_not_repeated(status: int, raised: type[Exception]) -> None:
    def refused() -> None:
        httpx.Response(status, request=httpx.Request("POST", "https://localhost")).raise_for_status()

    with pytest.raises(raised):
        line.lasting_invoker().invoke(refused)


def test_objects_pass_unchanged_and_their_bytes_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passage, "PAUSE_S", 0.0)
    objects = {str(number): bytes(100_000 * number) for number in range(1, 5)}
    arrived, are_all_here = dict[str, bytes](), threading.Event()

    def handed_over() -> Iterator[tuple[str, bytes]]:
        yield from objects.items()
        are_all_here.set()

    def take(name: str, content: bytes) -> None:
        assert are_all_here.wait(60.0)
        arrived[name] = content

    with caplog.at_level(logging.INFO, "flwr"):
        line.push(handed_over(), take)
        assert line.pull(list(objects), objects.__getitem__) == objects
    assert arrived == objects
    sent, received = (
        [one for one in caplog.messages if one.startswith(f"{line.ON_THE_LINE}{what}")] for what in ("sent", "received")
    )
    assert sent[-1].startswith("on the line: sent 1.0 of 1.0 MB, 100 % after")
    assert received[-1].startswith("on the line: received 1.0 MB, 100 % after")
    assert agent.known_words(f"INFO : Sending: train message\nINFO : {sent[-1]}\n") == sent[-1]


def test_an_object_that_is_not_there_yet_is_asked_for_again() -> None:
    asked_for: list[str] = []

    def one(name: str) -> bytes:
        asked_for.append(name)
        if len(asked_for) == 1:
            raise ObjectUnavailableError(name)
        return b"here"

    assert line.pull(["a"], one) == {"a": b"here"}
    assert asked_for == ["a", "a"]
