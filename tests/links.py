"""A slow and unreliable link: a forwarder on the loopback interface that counts bytes, holds a rate and cuts the line."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PIECE = 16 << 10  # bytes
LATE_S = 1.0  # who comes back so late, because this machine was busy, has lost nothing of the line; who comes later was idle
BUFFER = 64 << 10  # of a socket: what a sender believes gone while the line still has it


class _Rate:
    """Hands out leave to send, so that all connections of a direction together hold a rate."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s, self._free_at, self._lock = bytes_per_s, 0.0, threading.Lock()

    def wait(self, num_bytes: int) -> None:
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = time.monotonic()
            begin = self._free_at if now < self._free_at + LATE_S else now
            self._free_at = begin + num_bytes / self._bytes_per_s
            until = self._free_at
        time.sleep(max(0.0, until - time.monotonic()))


class Link:
    """Forwards every connection to ``target``, from a port of the loopback interface.

    ``up`` and ``down``: bytes that have passed, towards the target and back. ``bytes_per_s`` holds for each direction, or only
    upwards if ``is_down_free``. ``cuts``: how many bytes have gone up when the line is cut; all connections end and new ones
    are refused for ``outage_s`` seconds.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        port: int = 0,
        bytes_per_s: float | None = None,
        is_down_free: bool = False,
        cuts: Sequence[int] = (),
        outage_s: float = 5.0,
    ) -> None:
        self.up = self.down = self.num_cuts = 0
        self._target, self._cuts, self._outage_s = target, sorted(cuts), outage_s
        self._rates = {"up": _Rate(bytes_per_s), "down": _Rate(None if is_down_free else bytes_per_s)}
        self._lock, self._dark_until, self._open = threading.Lock(), 0.0, set[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def cut(self) -> None:
        """End every connection, and refuse new ones for a while."""
        with self._lock:
            self.num_cuts += 1
            self._dark_until = time.monotonic() + self._outage_s
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()

    def close(self) -> None:
        """Stop listening, and end what is connected."""
        self._outage_s = float("inf")
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes who waits for a connection
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5.0)

    def _begin(self, job: Callable[..., None], *arguments: Any) -> None:
        self._threads.append(threading.Thread(target=job, args=arguments, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                self._begin(self._connect, near)

    def _connect(self, near: socket.socket) -> None:
        try:
            if time.monotonic() < self._dark_until:
                raise OSError("the line is down")
            far = socket.create_connection(self._target, timeout=10)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        with self._lock:
            self._open |= {near, far}
        with near, far:
            up = threading.Thread(target=self._pump, args=(near, far, "up"), daemon=True)
            up.start()
            self._pump(far, near, "down")
            up.join()

    def _pump(self, source: socket.socket, sink: socket.socket, direction: str) -> None:
        try:
            while piece := source.recv(PIECE):
                self._rates[direction].wait(len(piece))
                sink.sendall(piece)
                self._count(direction, len(piece))
            sink.shutdown(socket.SHUT_WR)  # the other direction may have more to say
        except OSError:  # cut, or ended by one side
            for one in (source, sink):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        finally:
            with self._lock:
                self._open.discard(source)

    def _count(self, direction: str, num_bytes: int) -> None:
        with self._lock:
            setattr(self, direction, getattr(self, direction) + num_bytes)
            is_due = bool(self._cuts) and self.up >= self._cuts[0]
            if is_due:
                self._cuts.pop(0)
        if is_due:
            self.cut()


@contextlib.contextmanager
def link(target: str, **options: Any) -> Iterator[Link]:
    """A link to ``host:port`` for as long as it is needed."""
    host, _, port = target.rpartition(":")
    made = Link((host, int(port)), **options)
    try:
        yield made
    finally:
        made.close()
