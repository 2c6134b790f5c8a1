"""Runs that end too early: a forked child that dies at a chosen call to the file system, or in the middle of a write, or whose
disk is full from some call on. A fork has everything imported that a new process would need seconds for.

The product needs no hook for that: Python tells an audit hook of every file that it opens, renames or removes, and the kernel
ends a process in the midst of the write that passes its file size limit, or refuses the write.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

NAMED = {"open", "os.listdir", "os.mkdir", "os.rename", "os.scandir", "shutil.rmtree"}  # their first argument is a path
UNNAMED = {"os.remove", "os.rmdir", "os.truncate"}  # within rmtree it is a name relative to an open folder
DEATHS = (-signal.SIGKILL, -signal.SIGXFSZ)


@dataclass(frozen=True)
class Death:
    """``call``: SIGKILL before the call to the file system number ``after``, counted from 0.

    ``write``: from that call on, in the midst of the first write that makes a file longer than ``size`` bytes.
    """

    kind: Literal["call", "write"]
    after: int
    size: int = 0


def forked(job: Callable[[], object], folder: Path, death: Death | None = None) -> int:
    """Run ``job`` in a child of this process that dies as told, by what it does within ``folder``; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death is not None:
                _arm(folder, death)
            job()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """Exit code of a child, once it has ended; a signal is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def died(job: Callable[[], object], folder: Path, death: Death) -> bool:
    """Whether a job died as told; False if it finished before."""
    code = ended(forked(job, folder, death))
    assert code == 0 or code in DEATHS, f"the job ended with code {code}"
    return code != 0


def fill(call: str) -> None:
    """Let this process's disk be full from the first call whose arguments, one after the other, hold a text: no file grows."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in NAMED and call in ", ".join(map(str, arguments)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    sys.addaudithook(hook)


def _arm(folder: Path, death: Death) -> None:
    """Count this process's calls to the file system within ``folder``, and end it at the one that is wanted."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it, and would see an OSError instead
    within, left = str(folder), death.after

    def count() -> None:
        nonlocal left
        if left == 0 and death.kind == "call":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (death.size, death.size))
        left -= 1

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in UNNAMED or (event in NAMED and within in str(arguments[0])):
            count()

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            count()
            return call(*arguments)

        return counted

    os.fsync, os.pwrite = counting(os.fsync), counting(os.pwrite)  # of these the audit hook is not told
    sys.addaudithook(hook)
