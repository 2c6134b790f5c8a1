"""A large update over a line that is slow and breaks: the coordinator's SuperLink, and a connection such as SuperNodes have."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import array
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import fleet_http_connection
from links import link
from little import waited_until
from superlinks import Awaited

from client.line import lasting_invoker, push
from fedmix.deployment.environment import OBJECT_BYTES, flower_environment
from server import coordinator
from server.arrivals import arrivals
from server.control import is_healthy
from server.home import Home, Settings
from simulations.superlink import free_ports

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),  # Flower's way to Alembic
]
START_S = 240.0
OVERHEAD = 1.01  # names of objects, HTTP and TLS


@pytest.fixture(autouse=True)
def _as_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a site's programs are started with; and a run that no ServerApp has to keep alive."""
    monkeypatch.setattr(array, "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE", OBJECT_BYTES)
    monkeypatch.setattr(fleet_http_connection, "make_simple_http_retry_invoker", lasting_invoker)
    monkeypatch.setattr(sql_corestate, "HEARTBEAT_PATIENCE", 10_000)


@contextmanager
def serving(home: Home) -> Iterator[None]:
    """The coordinator's SuperLink."""
    environment = flower_environment(home.flower("superlink"))
    with (home.logs / "superlink.log").open("ab") as log:
        started = [sys.executable, "-m", "server.superlink", str(home.folder)]
        process = subprocess.Popen(started, stdout=log, stderr=log, env=environment)
        try:
            waited_until(lambda: is_healthy(home), START_S)
            yield
        finally:
            process.terminate()
            process.wait(60.0)


def carried(folder: Path, num_bytes: int, *, bytes_per_s: float, cuts: Sequence[float], outage_s: float) -> int:
    """The bytes that go up until an update has come whole over a line that is cut after these shares of it."""
    home, (port, control, health) = Home(folder), free_ports(3)
    settings = Settings(host="localhost", listen="127.0.0.1", port=port, control_port=control, health_port=health)
    coordinator.init(home, settings)
    key = ec.generate_private_key(ec.SECP384R1())
    west = Awaited(home.database, num_bytes, key=public_key_to_bytes(key.public_key()))
    shares, is_over = list[float](), threading.Event()

    def watch() -> None:
        while not is_over.wait(1.0):
            shares.extend(one.share for one in arrivals(home.database).values())

    at = [int(num_bytes * one) for one in cuts]
    with serving(home), link(settings.address, bytes_per_s=bytes_per_s, cuts=at, outage_s=outage_s) as line:
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            (reply,) = exchanged(west, line.address.replace("127.0.0.1", "localhost"), home.ca_certificate.read_bytes(), key)
        finally:
            is_over.set()
            watcher.join()
        assert line.num_cuts == len(cuts)
    assert not reply.has_error()
    assert all(west.state.object_store.get(name) == content for name, content in west.objects.items())
    assert shares == sorted(shares)
    assert len({round(share, 1) for share in shares}) > 5, "the coordinator saw it come"
    return line.up


def exchanged(west: Awaited, address: str, ca: bytes, key: ec.EllipticCurvePrivateKey) -> list[Message]:
    """Send the reply as a SuperNode does; what the ServerApp then gets."""
    west.state.deactivate_node(west.node)  # it was online for the order alone
    with fleet_http_connection.http_request_response(address, False, ca, (key, key.public_key())) as connection:
        announce, push_object = connection[2], connection[6]
        wanted, session = announce(west.head, west.tree, 0.0)
        assert wanted == set(west.objects)
        push(west.objects.items(), partial(push_object, west.run, session))
        return west.replies()


def test_an_update_comes_whole_over_two_megabits_a_second_and_three_cuts(tmp_path: Path) -> None:
    size, began = 16 << 20, time.monotonic()
    num_bytes = carried(tmp_path / "hub", size, bytes_per_s=250e3, cuts=[0.2, 0.5, 0.8], outage_s=8.0)
    # What a cut lost was sent again: at most the two objects that were on their way.
    assert size < num_bytes < OVERHEAD * size + 3 * 2 * OBJECT_BYTES
    assert time.monotonic() - began > size / 250e3
