"""The default engine: the real ServerApp and ClientApp on one machine, sites in this process's own workers or one after the
other in this very process.

The Grid starts in seconds, needs no daemon, and a site's job runs with the same number of threads wherever it runs, so the
weights do not depend on the engine or on the number of workers. Workers are forked from a server that has imported the
libraries once. One reply at a time is taken in, the others wait in their workers, so the server's memory depends on the
model alone, whatever the number of sites and workers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmix.errors import RunError
from simulations import forkserver

forkserver.quiet_flower()  # Flower reads its environment when it is imported

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from client.app import build_app  # noqa: E402
from client.place import Place  # noqa: E402
from server.link import exchange  # noqa: E402
from simulations.pipe import receive, send  # noqa: E402

CRASHED, LATE = 1002, 1003
SERVER_NODE = 1
PULL_S = 0.2  # a reply ends the wait at once; this is how long nothing at all may happen

Places = Mapping[int, Mapping[str, str]]  # node -> what its --node-config would say
MakeApp = Callable[[Places], ClientApp]
Locate = Callable[[Context], Place]
Answer = tuple[str, Message]  # id of the message that is answered, and the reply


def default_workers(num_sites: int, threads_per_site: int) -> int:
    """As many workers as the cores carry, never more than sites."""
    return max(1, min(num_sites, len(os.sched_getaffinity(0)) // threads_per_site))


def client_app(places: Places) -> ClientApp:
    """The ClientApp that a hospital runs, at the nodes of a simulation."""
    return build_app(locate_among(places))


def locate_among(places: Places) -> Locate:
    """Where the files of a node of a simulation are."""
    return lambda context: place_of(places[context.node_id])


@dataclass(frozen=True)
class Job:
    """An order for a node, and until when somebody waits for the answer (time.monotonic)."""

    message: Message
    expires: float


class Workplace(Protocol):
    """Where sites' jobs are done. It keeps no message longer than until it is answered, and no answer that was collected."""

    def submit(self, message: Message) -> None:
        """Queue a message for its node; after the message's time to live nobody waits for it."""

    def collect(self, timeout_s: float) -> list[Answer]:
        """Answers that have come, at most one of them with content; waits ``timeout_s`` for the first."""

    def close(self) -> None:
        """End whatever goes on."""


class Here:
    """Sites' jobs in this very process, one after the other, each when somebody asks for its answer."""

    def __init__(self, places: Places, make_app: MakeApp) -> None:
        self._places, self._app = places, make_app(places)
        self._queue: deque[Job] = deque()

    def submit(self, message: Message) -> None:
        """Queue a message for its node."""
        self._queue.append(_job(message))

    def collect(self, timeout_s: float) -> list[Answer]:
        """The next job's answer. A job cannot be stopped midway: one that took too long counts as late afterwards."""
        if not self._queue:
            return []
        job = self._queue.popleft()
        if job.expires > time.monotonic():
            with _threads_restored():
                reply = run_client(self._app, job.message, self._places[job.message.metadata.dst_node_id])
            if job.expires > time.monotonic():
                return [(job.message.metadata.message_id, reply)]
        return [_late(job)]

    def close(self) -> None:
        """Forget the jobs that were not begun."""
        self._queue.clear()


class WorkerPool:
    """Worker processes that each run one site's job at a time; jobs go to whichever is free."""

    def __init__(self, places: Places, num_workers: int, make_app: MakeApp) -> None:
        forkserver.start()
        self._places, self._make_app = places, make_app
        self._queue: deque[Job] = deque()
        self._busy: dict[Connection, Job] = {}
        self._free: list[Connection] = []
        self._processes: dict[Connection, Any] = {}
        self._finished: list[Answer] = []
        for _ in range(num_workers):
            self._start_one()

    def submit(self, message: Message) -> None:
        """Queue a message for its node; after the message's time to live nobody waits for it."""
        self._queue.append(_job(message))
        self._dispatch()

    def collect(self, timeout_s: float) -> list[Answer]:
        """Answers by the id of the message they answer: one reply, and errors for dead workers and jobs out of time."""
        self._give_up_late()
        self._dispatch()
        for ready in wait(list(self._busy), timeout=0.0 if self._finished else timeout_s)[:1]:
            assert isinstance(ready, Connection)
            job = self._busy.pop(ready)
            try:
                self._finish(job, receive(ready))
                self._free.append(ready)
            except (EOFError, OSError):
                self._bury(ready, job)
        self._dispatch()
        finished, self._finished = self._finished, []
        return finished

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for connection, process in self._processes.items():
            connection.close()
            process.kill()
        for process in self._processes.values():
            process.join()

    def _give_up_late(self) -> None:
        """Stop jobs that nobody waits for any more: a worker kept busy by one would starve the next round."""
        now = time.monotonic()
        late = [job for job in self._queue if job.expires <= now]
        self._queue = deque(job for job in self._queue if job.expires > now)
        for connection in [connection for connection, job in self._busy.items() if job.expires <= now]:
            late.append(self._busy.pop(connection))
            self._replace(connection)
        self._finished += [_late(job) for job in late]

    def _finish(self, job: Job, reply: Message) -> None:
        self._finished.append((job.message.metadata.message_id, reply))

    def _bury(self, connection: Connection, job: Job) -> None:
        """A worker died on a job, or was found dead with it: the job fails, for it may kill the next worker as well."""
        site = self._places[job.message.metadata.dst_node_id]["site"]
        self._finish(job, _error(job, CRASHED, f"the worker process of site {site} died"))
        self._replace(connection)

    def _start_one(self) -> None:
        context = get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._places, self._make_app), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        self._free.append(ours)

    def _replace(self, connection: Connection) -> None:
        process = self._processes.pop(connection)
        connection.close()
        process.kill()
        process.join()
        self._start_one()

    def _dispatch(self) -> None:
        while self._queue and self._free:
            connection, job = self._free.pop(), self._queue.popleft()
            try:
                send(connection, job.message)
                self._busy[connection] = job
            except OSError:
                self._bury(connection, job)


def _job(message: Message) -> Job:
    return Job(message, time.monotonic() + message.metadata.ttl)


def _error(job: Job, code: int, reason: str) -> Message:
    return Message(Error(code=code, reason=reason), reply_to=job.message)


def _late(job: Job) -> Answer:
    return job.message.metadata.message_id, _error(job, LATE, "no reply before the deadline")


@contextlib.contextmanager
def _threads_restored() -> Iterator[None]:
    """A site's job sets the threads that it computes with; in this process the server's work goes on with its own."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _serve(connection: Connection, places: Places, make_app: MakeApp) -> None:
    """A worker's life: read a message, run the ClientApp on it, answer, until the pool closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    app = make_app(places)
    with contextlib.suppress(EOFError, OSError):
        while True:
            _serve_one(connection, app, places)


def _serve_one(connection: Connection, app: ClientApp, places: Places) -> None:
    """One message; a function of its own, so that a worker that waits holds neither the last order nor the last reply."""
    message = receive(connection)
    send(connection, run_client(app, message, places[message.metadata.dst_node_id]))


def _die_with_parent() -> None:
    """End this worker when the run is killed. One that trained on would write the old run's state into the resumed one's."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def as_node_config(place: Place) -> dict[str, str]:
    """A place as a SuperNode's --node-config would say it."""
    paths = {"experiment": place.experiment, "shard": place.shard, "state": place.state}
    return {"site": place.site} | {name: str(path.absolute()) for name, path in paths.items()}


def place_of(node_config: Mapping[str, str]) -> Place:
    """The place that a node config describes."""
    return Place(node_config["site"], Path(node_config["experiment"]), Path(node_config["shard"]), Path(node_config["state"]))


def run_client(app: ClientApp, message: Message, node_config: Mapping[str, str]) -> Message:
    """One message through a ClientApp; what it raises becomes an error reply that names only the kind of error."""
    context = Context(
        run_id=message.metadata.run_id,
        node_id=message.metadata.dst_node_id,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config={},
    )
    try:
        return app(message, context)
    except Exception as error:  # any bug at a site must reach the server as a reply, or the round would wait for it
        reason = f"the job of site {node_config['site']} failed with {type(error).__name__}"
        return Message(Error(code=CRASHED, reason=reason), reply_to=message)


class InProcessGrid(Grid):
    """Flower's Grid over worker processes on this machine, or over no other process than this one."""

    def __init__(self, places: Iterable[Place], *, num_workers: int, make_app: MakeApp = client_app) -> None:
        self._places = {SERVER_NODE + 1 + number: as_node_config(place) for number, place in enumerate(places)}
        self._pool: Workplace = WorkerPool(self._places, num_workers, make_app) if num_workers else Here(self._places, make_app)
        run_id = uuid.uuid4().int >> 65
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def set_run(self, run: Any) -> None:
        """Nothing to set: this Grid serves one run."""

    @property
    def run(self) -> Any:
        """Run information; the apps here do not need any."""
        raise RunError("the in-process engine keeps no Flower run record")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of all nodes, in the order of the sites."""
        return list(self._places)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages for their nodes."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            ids.append(message.metadata.message_id)
            self._pool.submit(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The next reply to one of these messages, and errors; waits a moment for it, and drops those to any other message."""
        wanted = set(message_ids)
        return [reply for message_id, reply in self._pool.collect(PULL_S) if message_id in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, at most ``timeout`` seconds."""
        return exchange(self, messages, timeout)


def run_in_process(app: ServerApp, places: Iterable[Place], *, num_workers: int, make_app: MakeApp = client_app) -> None:
    """Run a ServerApp over worker processes on this machine; with 0 of them, one site after the other in this process."""
    grid = InProcessGrid(places, num_workers=num_workers, make_app=make_app)
    try:
        app(grid, Context(run_id=TaskIdentity.run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config={}))
    finally:
        grid.close()
