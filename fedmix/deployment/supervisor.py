"""Programs kept running: what ends is started again after a pause that grows, and nothing outlives the supervisor."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fedmix.deployment.processes import Group

POLL_S = 0.2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
HEALTHY_S = 60.0  # after so long without ending a program has its first pause again
GRACE_S = 20.0  # between SIGTERM and SIGKILL
MAX_LOG_BYTES = 16 << 20  # a log that is longer is put aside as NAME.log.1 when its program starts


@dataclass(frozen=True)
class Program:
    """A program beside this Python, what it is given, and the file that takes what it says.

    ``works_for``: the name of the program for which alone it works, so that it is started anew whenever that one ends.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    works_for: str = ""


class Supervisor:
    """Runs programs until it is told to stop; ``on_event`` hears of each start and end: a program's name, and what happened."""

    def __init__(self, programs: Sequence[Program], *, on_event: Callable[[str, str], None]) -> None:
        self._kept = [_Kept(program, on_event) for program in programs]
        self._is_stopping = False

    def run(self) -> None:
        """Start every program and keep it running; returns after SIGTERM, SIGINT or ``stop``, once all of them have ended."""
        with self._stopped_by_signals():
            try:
                while not self._is_stopping:
                    for one in self._kept:
                        if one.look_after():
                            self._end_those_of(one.program)
                    time.sleep(POLL_S)
            finally:
                self._end()

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop; what ends from now on was asked to."""
        return self._is_stopping

    def stop(self) -> None:
        """Have ``run`` end the programs and return; from any thread or signal handler."""
        self._is_stopping = True

    def _end_those_of(self, ended: Program) -> None:
        for one in self._kept:
            if one.program.works_for == ended.name:
                one.end(time.monotonic())

    def _end(self) -> None:
        for one in self._kept:
            one.ask_to_end()
        deadline = time.monotonic() + GRACE_S
        for one in self._kept:
            one.end(deadline)

    @contextlib.contextmanager
    def _stopped_by_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.stop()


class _Kept:
    """One program over all its lives. Each life is a process group of its own, so that what a dead program has started does
    not hold the ports that the next one needs.
    """

    def __init__(self, program: Program, on_event: Callable[[str, str], None]) -> None:
        self.program, self._on_event = program, on_event
        self._process: subprocess.Popen[bytes] | None = None
        self._group: Group | None = None
        self._pause_s, self._started, self._next_start = FIRST_PAUSE_S, 0.0, 0.0

    def look_after(self) -> bool:
        """Start the program if it is time to, or take note that it has ended; whether it has."""
        now = time.monotonic()
        if self._process is None and now >= self._next_start:
            self._start(now)
        elif self._process is not None and (code := self._process.poll()) is not None:
            self._bury()
            if now - self._started >= HEALTHY_S:
                self._pause_s = FIRST_PAUSE_S
            self._next_start = now + self._pause_s
            self._on_event(self.program.name, f"{_ending(code)}; starts again in {self._pause_s:.0f} s")
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return True
        return False

    def ask_to_end(self) -> None:
        """SIGTERM, if it runs."""
        if self._process is not None:
            self._process.terminate()

    def end(self, deadline: float) -> None:
        """Wait until the deadline for the program to end by itself, then end it and all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        self._bury()
        self._on_event(self.program.name, "stopped")

    def _start(self, now: float) -> None:
        program = self.program
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if program.log.stat().st_size > MAX_LOG_BYTES:
                os.replace(program.log, program.log.with_name(program.log.name + ".1"))
        self._group, self._started = Group(), now
        self._process = self._group.start(program.command, program.environment, log=program.log)
        self._on_event(program.name, f"started as process {self._process.pid}")

    def _bury(self) -> None:
        assert self._group is not None
        self._group.close()
        self._process, self._group = None, None


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
