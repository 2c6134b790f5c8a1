"""What decoders might do to the process they run in. A module of its own: every new worker imports it."""

from __future__ import annotations

import os
import signal
import tempfile
import time

import numpy as np

from fedmix.data.quarantine import RefusedError


def do(job: tuple[str, int]) -> bytes:
    """Misbehave as the job says, and answer where that leaves anything."""
    what, number = job
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "leave":
        os._exit(0)
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))  # not even an alarm
        time.sleep(600)
    if what == "spin":
        while True:
            sum(range(10_000_000))
    if what == "grow":
        return bytes(np.ones(number << 20, np.uint8))
    if what == "refuse":
        raise RefusedError("image_blank")
    if what == "break":
        raise OSError("/data/CANARY")
    if what == "write":
        with tempfile.TemporaryFile() as file:
            file.write(b"x")
    if what == "print":
        os.write(1, b"CANARY")
        os.write(2, b"CANARY")
    if what == "sleep":
        time.sleep(number)
    if what == "pid":
        return str(os.getpid()).encode()
    return str(number).encode()


def lie(job: bytes) -> bytes:
    """Send what the parent did not ask for."""
    return job
