"""Programs started as child processes, none of which outlives the process that started it.

Flower's own programs start others and let go of them, some by a check of whether their parent still has its number. A
process group is surer: what is in it ends in one call, and here that call comes even when this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

END_S = 5.0  # so long may killed processes take to be gone

# The first process of a group: when its input ends, because this process let go of it or died, it ends the group.
LEASH = "import os, signal, sys; sys.stdin.buffer.read(); os.killpg(0, signal.SIGKILL)"


class Group:
    """A process group that ends with this process."""

    def __init__(self) -> None:
        # A group of its own: Ctrl-C at the terminal reaches this process alone, which then ends the others.
        self._leash = subprocess.Popen([sys.executable, "-I", "-S", "-c", LEASH], stdin=subprocess.PIPE, process_group=0)
        self._members: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> subprocess.Popen[bytes]:
        """Start a program that is installed beside this Python; what it says is added to a log file."""
        with log.open("ab") as file:
            return self._start(command, environment, stdout=file, stderr=file)

    def read(self, command: Sequence[str], environment: Mapping[str, str], *, log: Path) -> Iterator[bytes]:
        """Run a program, and give what it prints line by line."""
        with log.open("ab") as file:
            member = self._start(command, environment, stdout=subprocess.PIPE, stderr=file)
        assert member.stdout is not None
        with member.stdout:
            yield from member.stdout
        member.wait()

    def close(self) -> None:
        """End every process of the group, with all that its members have started, and wait until they are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._leash.pid, signal.SIGKILL)
        assert self._leash.stdin is not None
        self._leash.stdin.close()
        for member in [*self._members, self._leash]:
            member.wait()
        deadline = time.monotonic() + END_S
        while self._exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _start(self, command: Sequence[str], environment: Mapping[str, str], **streams: Any) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).with_name(command[0])
        member: subprocess.Popen[bytes] = subprocess.Popen(
            [str(program), *command[1:]],
            stdin=subprocess.DEVNULL,
            env=dict(environment),
            process_group=self._leash.pid,
            **streams,
        )
        self._members.append(member)
        return member

    def _exists(self) -> bool:
        try:
            os.killpg(self._leash.pid, 0)
        except (ProcessLookupError, PermissionError):  # gone, or its number is another's by now
            return False
        return True
