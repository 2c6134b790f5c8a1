"""Ways to run the real ServerApp and ClientApp on one machine: sites one after the other in this very process, in this
process's own workers, or on Flower's Ray backend.

The in-process Grid starts in seconds, needs no daemon, and a site's job runs with the same number of threads wherever it
runs, so the weights do not depend on the engine or on the number of workers. Workers are forked from a server that has
imported the libraries once. A message to a worker travels as protobuf without its arrays, then array after array in
pieces, so that neither end ever holds a second copy of a model; and one reply at a time is taken in, the others wait in
their workers. So the server's memory depends on the model alone, whatever the number of sites and workers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import time
import uuid
import warnings
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

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_to_proto  # noqa: E402
from flwr.common.serde_utils import metadata_to_proto  # noqa: E402
from flwr.proto.message_pb2 import Message as ProtoMessage  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

from client.app import Place, build_app  # noqa: E402

CRASHED, LATE = 1002, 1003
SERVER_NODE = 1
PULL_S = 0.2  # a reply ends the wait at once; this is how long nothing at all may happen
PIECE_BYTES = 1 << 20  # of 16 MB arrays in one go a pipe carried 0.6 GB/s, in pieces that stay in the cache 2.8 GB/s

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
    return lambda context: _place(places[context.node_id])


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


def send(connection: Connection, message: Message) -> None:
    """Write a message: as protobuf what is not an array's data, then the data of array after array from where they lie."""
    connection.send_bytes(_without_data(message))
    for array in _arrays(message):
        data = memoryview(array.data).cast("B")
        for start in range(0, len(data) + 1, PIECE_BYTES):  # a piece that is not full, even an empty one, ends an array
            connection.send_bytes(data[start : start + PIECE_BYTES])


def receive(connection: Connection) -> Message:
    """Read a message that ``send`` wrote. Raises EOFError or OSError if the other end is gone."""
    message = message_from_proto(ProtoMessage.FromString(connection.recv_bytes()))
    for array in _arrays(message):
        array.data = b"".join(_pieces(connection))
    return message


def _pieces(connection: Connection) -> Iterator[bytes]:
    while len(piece := connection.recv_bytes(PIECE_BYTES)) == PIECE_BYTES:
        yield piece
    yield piece


def _arrays(message: Message) -> Iterator[Array]:
    """A message's arrays in the order in which they stand in it.

    Not by way of ``content.array_records``: Flower's view of a content is a reference cycle that holds it, so whoever has
    looked through it keeps a model in memory until Python next collects cycles, which may be many messages later.
    """
    if message.has_content():
        for record in message.content.values():
            if isinstance(record, ArrayRecord):
                yield from record.values()


def _without_data(message: Message) -> bytes:
    """A message as Flower's protobuf, its arrays empty."""
    if message.has_error():
        error: bytes = message_to_proto(message).SerializeToString()
        return error
    proto = ProtoMessage(metadata=metadata_to_proto(message.metadata))
    proto.content.SetInParent()  # content without records is not no content
    for key, record in message.content.items():
        if not isinstance(record, ArrayRecord):
            proto.content.MergeFrom(recorddict_to_proto(RecordDict({key: record})))
            continue
        item = proto.content.items.add(key=key)
        item.array_record.SetInParent()
        for name, array in record.items():
            value = item.array_record.items.add(key=name).value
            value.dtype, value.stype = array.dtype, array.stype
            value.shape.extend(array.shape)
    encoded: bytes = proto.SerializeToString()
    return encoded


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


def _as_strings(place: Place) -> dict[str, str]:
    paths = {"experiment": place.experiment, "shard": place.shard, "state": place.state}
    return {"site": place.site} | {name: str(path.absolute()) for name, path in paths.items()}


def _place(node_config: Mapping[str, str]) -> Place:
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
        self._places = {SERVER_NODE + 1 + number: _as_strings(place) for number, place in enumerate(places)}
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
        waiting = set(self.push_messages(messages))
        deadline = time.monotonic() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            for reply in self.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def run_in_process(app: ServerApp, places: Iterable[Place], *, num_workers: int, make_app: MakeApp = client_app) -> None:
    """Run a ServerApp over worker processes on this machine; with 0 of them, one site after the other in this process."""
    grid = InProcessGrid(places, num_workers=num_workers, make_app=make_app)
    try:
        app(grid, Context(run_id=TaskIdentity.run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config={}))
    finally:
        grid.close()


def run_on_ray(
    app: ServerApp,
    places: Iterable[Place],
    *,
    num_workers: int,
    threads_per_site: int,
    build: Callable[[Locate], ClientApp] = build_app,
) -> None:
    """Run a ServerApp over Flower's own simulation engine, on the ClientApp that ``build`` makes."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise RunError("--engine ray needs Ray; install it with: pip install 'fedmix[simulation]'") from None
    from flwr.simulation import run_simulation

    # Flower reports a refusing site with a traceback, and announces itself; what matters comes back as a reply or is raised.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    ordered = [_as_strings(place) for place in places]
    is_over = threading.Event()
    with tempfile.TemporaryDirectory(prefix="fedmix-ray-", ignore_cleanup_errors=True) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # run_simulation is deprecated in favour of a CLI that leaves daemons behind
        try:
            run_simulation(
                server_app=_ending_with(is_over, app),
                client_app=build(lambda context: _place(ordered[int(context.node_config["partition-id"])])),
                num_supernodes=len(ordered),
                backend_config={
                    "client_resources": {"num_cpus": threads_per_site, "num_gpus": 0.0},
                    "init_args": {
                        "num_cpus": num_workers * threads_per_site,
                        "include_dashboard": False,
                        "log_to_driver": False,
                        "logging_level": "critical",
                        "_temp_dir": folder,
                    },
                },
            )
        finally:
            is_over.set()


def _ending_with(is_over: threading.Event, app: ServerApp) -> ServerApp:
    """The same app, which stops asking for replies once the engine has stopped: Flower runs it in a thread of its own,
    which would keep the process alive after Ctrl-C until the round's deadline.
    """
    ending = ServerApp()

    @ending.main()
    def main(grid: Grid, context: Context) -> None:
        pull = grid.pull_messages

        def pull_or_stop(message_ids: Iterable[str]) -> Iterable[Message]:
            if is_over.is_set():
                raise RunError("the engine has stopped")
            return pull(message_ids)

        grid.pull_messages = pull_or_stop  # type: ignore[method-assign]
        app(grid, context)

    return ending
