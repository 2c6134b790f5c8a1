"""Walls around decoders: files are read in worker processes with limits on memory and time, and a worker that dies is replaced.

- A decoder is C code on hostile bytes. What it may do at worst is end its worker: the file is refused with a code, the
  rest of its batch goes to a new worker, and results keep the caller's order.
- What comes back is a code of the closed list or plain bytes, never a pickle: a worker that was taken over by a file
  cannot make this process run anything. Jobs go out in batches and answers come one by one, so that a message costs
  little and it is always known which file a worker was at.
- Workers are forked from a process that has imported the decoders, so that a new one starts in milliseconds. They have
  neither output nor core dumps, cannot write files, and end by themselves when they hang without a parent.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Generic, TypeVar

from fedmix.data.quarantine import REASONS, RefusedError
from fedmix.errors import DataError

Job = TypeVar("Job")
Answer = bytes | RefusedError

BATCH = 4  # jobs a message
MAX_ANSWER_BYTES = 32 * 1024 * 1024  # a square of the largest size is half of it
START_S = 120.0  # importing the decoders, on a machine that is busy with other things
END_S = 1.0  # for a process whose pipe is closed to be gone
PRELOADED = ("__main__", "fedmix.data.images", "fedmix.data.dicom")

_READY, _DONE, _REFUSED = b"r", b"d", b"x"


@dataclass(frozen=True)
class Limits:
    """What one file may take.

    ``memory_bytes``: beyond what a fresh worker holds, about 100 MiB. ``cpu_s``: of the processor, so that a machine busy with
    other things refuses no file that an idle one reads. ``wall_s``: until an answer, for what waits without computing.
    """

    memory_bytes: int = 768 * 1024 * 1024
    cpu_s: float = 10.0
    wall_s: float = 120.0


class Walls(Generic[Job]):
    """Runs ``work`` on jobs in worker processes; a context manager, which ends them.

    ``work`` and jobs have to be picklable. What ``work`` raises as ``RefusedError`` is handed on; a crash, a time-out and
    memory beyond the limit become ``decoder_crashed``, ``decoder_timeout`` and ``decoder_memory``.
    """

    def __init__(self, work: Callable[[Job], bytes], *, workers: int, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        get_context("forkserver").set_forkserver_preload(list(PRELOADED))  # does nothing where the fork server runs already
        self._idle: SimpleQueue[_Worker[Job]] = SimpleQueue()
        self._workers = [_Worker(work, limits) for _ in range(max(1, workers))]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="walls")

    def __enter__(self) -> Walls[Job]:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown()

    def ask(self, job: Job) -> Answer:
        """What became of one job; waits in the caller's thread until a worker is free and done."""
        return self._run([job])[0]

    def map(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        """What became of each job, in their order; jobs are taken a little ahead."""
        ahead: deque[Future[list[Answer]]] = deque()
        source = iter(jobs)
        while batch := list(islice(source, BATCH)):
            ahead.append(self._threads.submit(self._run, batch))
            if len(ahead) > 2 * len(self._workers):
                yield from ahead.popleft().result()
        yield from chain.from_iterable(future.result() for future in ahead)

    def _run(self, batch: Sequence[Job]) -> list[Answer]:
        worker = self._idle.get()
        try:
            return worker.answers(batch)
        finally:
            self._idle.put(worker)


class _Worker(Generic[Job]):
    """One process, and its successors."""

    def __init__(self, work: Callable[[Job], bytes], limits: Limits) -> None:
        self._work, self._limits = work, limits
        self._process: ForkServerProcess | None = None
        self._connection: Connection | None = None
        self._is_stopped = False
        self._lock = Lock()  # between the thread that waits for answers and the one that stops all

    def answers(self, batch: Sequence[Job]) -> list[Answer]:
        answers: list[Answer] = []
        while len(answers) < len(batch):
            connection = self._connection or self._start()
            try:
                connection.send(batch[len(answers) :])
            except OSError:  # it died between two batches: no file's fault
                self._end()
                continue
            while self._connection is not None and len(answers) < len(batch):
                answers.append(self._receive(connection))
        return answers

    def stop(self) -> None:
        """End the process, from any thread; whoever waits for an answer of it is told."""
        with self._lock:
            self._is_stopped = True
        self._kill()

    def _kill(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def _receive(self, connection: Connection) -> Answer:
        """The next answer; without one, or where memory ran out, the process is ended."""
        try:
            if not connection.poll(self._limits.wall_s):
                self._kill()
                self._end()
                return RefusedError("decoder_timeout")
            answer = connection.recv_bytes(MAX_ANSWER_BYTES)
        except (EOFError, OSError):
            return RefusedError("decoder_timeout" if self._end() == -signal.SIGPROF else "decoder_crashed")
        kind, content = answer[:1], answer[1:]
        if kind == _DONE:
            return content
        code = content.decode("ascii", "replace")
        if kind != _REFUSED or code not in REASONS or code == "decoder_memory":
            self._end()
        return RefusedError(code if kind == _REFUSED and code in REASONS else "decoder_crashed")

    def _start(self) -> Connection:
        context = get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work, self._limits), daemon=True)
        with self._lock:
            if self._is_stopped:
                raise DataError("the preparation was stopped")
            process.start()
            self._process, self._connection = process, ours
        theirs.close()
        with contextlib.suppress(EOFError, OSError):
            if ours.poll(START_S) and ours.recv_bytes(1) == _READY:
                return ours
        self._end()
        raise DataError("a worker process for decoding images could not be started; see whether memory is left")

    def _end(self) -> int | None:
        """End the process, if it has not; what it ended with, a signal as a negative number."""
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is None:
            return None
        if connection is not None:
            process.join(END_S)  # its end of the pipe is closed: most likely it is gone already, by a signal that tells why
        process.kill()
        process.join()
        return process.exitcode


def _serve(connection: Connection, work: Callable[[Job], bytes], limits: Limits) -> None:
    """A worker's life: batches in, answers out, until the pipe ends."""
    _wall_in(limits)
    connection.send_bytes(_READY)
    with contextlib.suppress(EOFError, OSError):
        while True:
            for job in connection.recv():
                # Nothing handles these signals: they end the process in the middle of C code, whether anyone waits or not.
                signal.setitimer(signal.ITIMER_PROF, limits.cpu_s)
                signal.setitimer(signal.ITIMER_REAL, 2 * limits.wall_s)
                answer = _answer(work, job)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                connection.send_bytes(answer)


def _answer(work: Callable[[Job], bytes], job: Job) -> bytes:
    try:
        return _DONE + work(job)
    except RefusedError as refused:
        return _REFUSED + refused.code.encode()
    except MemoryError:
        return _REFUSED + b"decoder_memory"
    except Exception:  # a traceback would quote the file's name
        return _REFUSED + b"decoder_crashed"


def _wall_in(limits: Limits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    with Path(os.devnull).open("r+b") as nowhere:
        for descriptor in (0, 1, 2):  # C libraries complain of a file on the terminal
            os.dup2(nowhere.fileno(), descriptor)
    for what, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_DATA, _held_bytes() + limits.memory_bytes),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    # The C library keeps freed blocks up to the largest it has seen; else each file would have its pages cleared anew.
    bytes(31 << 20)


def _held_bytes() -> int:
    """Memory of its own that this process has mapped, most of it never touched."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) << 10
    return 0
