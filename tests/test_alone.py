"""The network that other tests put a federation into, so that whatever it tried to reach shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from alone import alone, can_be_alone

pytestmark = pytest.mark.skipif(not can_be_alone(), reason="this machine lets its user make no network namespace")

NOTHING = {"IpOutNoRoutes": 0, "Ip6OutNoRoutes": 0, "UdpOutDatagrams": 0, "Udp6OutDatagrams": 0}
QUIET = """
import socket
mapped = socket.socket(socket.AF_INET6)
mapped.bind(("::ffff:127.0.0.1", 0))
mapped.listen()
one = socket.create_server(("127.0.0.1", 0))
socket.create_connection(("localhost", one.getsockname()[1])).close()
time.sleep(0.3)
sys.exit(3)
"""


def tried(what: str, folder: Path) -> tuple[int, set[str], dict[str, int]]:
    """What a child of a child does on its network: exit code, addresses others could reach, and what was counted."""
    child = f"import contextlib, socket, sys, time\nwith contextlib.suppress(OSError):\n    {what}\n"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    ended, traffic = alone([sys.executable, "-c", parent], folder / "report.json")
    return ended.returncode, traffic.beyond_loopback, {name: count for name, count in traffic.counts.items() if count}


def test_what_stays_on_loopback_counts_as_nothing(tmp_path: Path) -> None:
    ended, traffic = alone([sys.executable, "-c", f"import sys, time\n{QUIET}"], tmp_path / "report.json")
    assert (ended.returncode, ended.stderr) == (3, "")
    assert (traffic.listening, traffic.counts) == ({"127.0.0.1"}, NOTHING)


@pytest.mark.parametrize(
    ("what", "counted"),
    [
        ("socket.create_connection(('192.0.2.1', 443), 1)", "IpOutNoRoutes"),
        ("socket.create_connection(('2001:db8::1', 443), 1)", "Ip6OutNoRoutes"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('192.0.2.1', 53))", "IpOutNoRoutes"),
        ("socket.socket(type=socket.SOCK_DGRAM).sendto(b'', ('127.0.0.53', 53))", "UdpOutDatagrams"),
    ],
)
def test_a_packet_that_is_meant_for_elsewhere_is_counted(what: str, counted: str, tmp_path: Path) -> None:
    code, beyond, counts = tried(what, tmp_path)
    assert (code, set(counts)) == (0, {counted})
    # Linux gives a socket that sends a datagram a port that everybody may answer to, and a look may fall into its short life.
    assert beyond <= ({"0.0.0.0"} if "sendto" in what else set())


@pytest.mark.parametrize(
    ("what", "address"),
    [
        ("one = socket.create_server(('0.0.0.0', 0)); time.sleep(0.5)", "0.0.0.0"),
        ("one = socket.create_server(('::', 0), family=socket.AF_INET6); time.sleep(0.5)", "::"),
        ("one = socket.socket(socket.AF_INET6); one.bind(('::ffff:0.0.0.0', 0)); one.listen(); time.sleep(0.5)", "0.0.0.0"),
        ("one = socket.socket(type=socket.SOCK_DGRAM); one.bind(('', 0)); time.sleep(0.5)", "0.0.0.0"),
    ],
)
def test_a_socket_that_others_could_reach_is_seen(what: str, address: str, tmp_path: Path) -> None:
    assert tried(what, tmp_path) == (0, {address}, {})
