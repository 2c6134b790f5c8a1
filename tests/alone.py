"""A command in a network of its own that holds the loopback interface and nothing else, with all that it tried to reach.

Linux counts in every network namespace how many packets had no way out and how many datagrams were sent (a name that is asked
of DNS is one), whichever program, library or child sent them. Who listens is looked up every few hundredths of a second.
Not seen: a socket that listened between two looks, and what goes over no network at all, like pipes and Unix sockets.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOK_S = 0.05
GET_FLAGS, SET_FLAGS, IS_UP = 0x8913, 0x8914, 1  # linux/sockios.h, linux/if.h
WAITING = {"tcp": "0A", "tcp6": "0A", "udp": "07", "udp6": "07"}  # states of sockets that anybody may send to
COUNTED = ("IpOutNoRoutes", "Ip6OutNoRoutes", "UdpOutDatagrams", "Udp6OutDatagrams")


@dataclass(frozen=True)
class Traffic:
    """Addresses that were listened on, and packets that were meant for elsewhere or sent as datagrams, by the kernel's name."""

    listening: frozenset[str]
    counts: dict[str, int]

    @property
    def beyond_loopback(self) -> set[str]:
        """Addresses that other machines could have reached."""
        return {address for address in self.listening if not ipaddress.ip_address(address).is_loopback}


def can_be_alone() -> bool:
    """Whether this machine lets its user make a network namespace."""
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
    return False


def alone(command: Sequence[str], report: Path, **options: Any) -> tuple[subprocess.CompletedProcess[str], Traffic]:
    """Run a command to its end; what it said, and what it did on its network. ``report``: a file to be written on the way."""
    words = ["unshare", "-rn", sys.executable, __file__, str(report), *command]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, **options)
    found = json.loads(report.read_text())
    return ended, Traffic(frozenset(found["listening"]), found["counts"])


def main(report: str, *command: str) -> int:
    """What runs within the namespace."""
    switch_on_loopback()
    listening, is_over = set[str](), threading.Event()

    def look() -> None:
        while not is_over.wait(LOOK_S):
            listening.update(listeners())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        return subprocess.run(command, check=False).returncode
    finally:
        is_over.set()
        looking.join()
        Path(report).write_text(json.dumps({"listening": sorted(listening), "counts": counts()}))


def switch_on_loopback() -> None:
    """As ``ip link set lo up`` does, which not every machine has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, GET_FLAGS, request), 16)
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sH14x", b"lo", flags | IS_UP))


def listeners() -> Iterator[str]:
    """Addresses that are listened on now."""
    for kind, state in WAITING.items():
        for line in Path("/proc/net", kind).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # Each group of four bytes is written as a number of this machine's.
                raw = b"".join(struct.pack(">I", *struct.unpack_from("=I", words, at)) for at in range(0, len(words), 4))
                address = ipaddress.ip_address(raw)
                # gRPC listens on IPv4 addresses as IPv6 writes them.
                yield str(getattr(address, "ipv4_mapped", None) or address)


def counts() -> dict[str, int]:
    """The kernel's counts of this namespace."""
    lines = [line.split() for line in Path("/proc/net/snmp").read_text().splitlines()]
    found = {
        names[0].rstrip(":") + name: int(value)
        for names, values in zip(lines[::2], lines[1::2], strict=True)
        for name, value in zip(names[1:], values[1:], strict=True)
    }
    found |= {name: int(value) for name, value in map(str.split, Path("/proc/net/snmp6").read_text().splitlines())}
    return {name: found[name] for name in COUNTED}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
