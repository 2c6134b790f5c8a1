"""The slow and unreliable link that other tests put between hospitals and their coordinator."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from links import link


@pytest.fixture
def echo() -> str:
    """A server that sends back what it gets, once a connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener:
            for _ in range(3):
                one, _ = listener.accept()
                with one:
                    while piece := one.recv(1 << 16):
                        try:
                            one.sendall(piece)
                        except OSError:
                            break

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def exchanged(address: str, sent: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as one:
        one.sendall(sent)
        one.shutdown(socket.SHUT_WR)
        received = b""
        while piece := one.recv(1 << 16):
            received += piece
    return received


def test_every_byte_passes_is_counted_and_takes_its_time(echo: str) -> None:
    with link(echo, bytes_per_s=1e6) as line:
        began = time.monotonic()
        assert exchanged(line.address, bytes(300_000)) == bytes(300_000)
        assert time.monotonic() - began > 0.25
    assert (line.up, line.down) == (300_000, 300_000)


def test_a_cut_ends_connections_and_refuses_others_for_a_while(echo: str) -> None:
    with link(echo, cuts=[100_000], outage_s=0.5) as line:
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            assert len(exchanged(line.address, bytes(8_000_000))) == 8_000_000, "reset: cut without an error"
        assert line.num_cuts == 1
        time.sleep(0.6)
        assert exchanged(line.address, b"again") == b"again"
