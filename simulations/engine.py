"""Two ways to run the real ServerApp and ClientApp on one machine: in this process's own workers, or on Flower's Ray backend.

The in-process Grid hands Flower Messages to a pool of worker processes as protobuf bytes. It starts in seconds, needs no
daemon, and a site's job runs with the same number of threads wherever it runs, so the weights do not depend on the
engine or on the number of workers. The workers are forked from a server that has imported the libraries once.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from client.app import Place, build_app
from fedmix.errors import RunError

FLOWER_ENVIRONMENT = {  # flower.md: no telemetry, no update check, no installs of its own
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
os.environ.update({key: value for key, value in FLOWER_ENVIRONMENT.items() if key not in os.environ})

from flwr.app import Context, Error, Message, RecordDict  # noqa: E402  # reads the environment when imported
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.common.serde import message_from_proto, message_to_proto  # noqa: E402
from flwr.proto.message_pb2 import Message as ProtoMessage  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

CRASHED = 1002
SERVER_NODE = 1


def default_workers(num_sites: int, threads_per_site: int) -> int:
    """As many workers as the cores carry, never more than sites."""
    return max(1, min(num_sites, len(os.sched_getaffinity(0)) // threads_per_site))


def warm_up() -> None:
    """Start importing the client's libraries in the background, so that workers fork in milliseconds later."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["client.app"])
    from multiprocessing import forkserver

    forkserver.ensure_running()


class WorkerPool:
    """Worker processes that each run one site's job at a time; jobs go to whichever is free."""

    def __init__(self, places: Mapping[int, Place], num_workers: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(["client.app"])
        self._queue: deque[tuple[int, bytes]] = deque()
        self._busy: dict[Connection, tuple[int, bytes]] = {}
        self._free: list[Connection] = []
        self._processes: dict[Connection, Any] = {}
        self._places = {node_id: _as_strings(place) for node_id, place in places.items()}
        self._context = context
        for _ in range(num_workers):
            self._start_one()

    def submit(self, node_id: int, message: bytes) -> None:
        """Queue a message for a node."""
        self._queue.append((node_id, message))
        self._dispatch()

    def collect(self, timeout_s: float) -> list[tuple[bytes, bytes | None]]:
        """Finished jobs as (message, reply); a reply of None says that the worker died on it."""
        finished: list[tuple[bytes, bytes | None]] = []
        for ready in wait(list(self._busy), timeout=timeout_s):
            assert isinstance(ready, Connection)
            _, message = self._busy.pop(ready)
            try:
                finished.append((message, ready.recv_bytes()))
                self._free.append(ready)
            except (EOFError, OSError):
                finished.append((message, None))
                self._processes.pop(ready).join()
                self._start_one()
        self._dispatch()
        return finished

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for connection, process in self._processes.items():
            connection.close()
            process.terminate()
        for process in self._processes.values():
            process.join()

    def _start_one(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._places), daemon=True)
        process.start()
        theirs.close()
        self._processes[ours] = process
        self._free.append(ours)

    def _dispatch(self) -> None:
        while self._queue and self._free:
            connection = self._free.pop()
            node_id, message = self._queue.popleft()
            self._busy[connection] = (node_id, message)
            connection.send_bytes(node_id.to_bytes(8, "big") + message)


def _as_strings(place: Place) -> dict[str, str]:
    return {"site": place.site, "experiment": str(place.experiment), "shard": str(place.shard), "state": str(place.state)}


def _serve(connection: Connection, places: Mapping[int, Mapping[str, str]]) -> None:
    """A worker's life: read a message, run the ClientApp on it, answer, until the pool closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    app = build_app(lambda context: _place(context.node_config))
    while True:
        try:
            received = connection.recv_bytes()
        except EOFError:
            return
        node_id = int.from_bytes(received[:8], "big")
        message = message_from_proto(ProtoMessage.FromString(received[8:]))
        reply = run_client(app, message, dict(places[node_id]))
        try:
            connection.send_bytes(message_to_proto(reply).SerializeToString())
        except (BrokenPipeError, ConnectionResetError):
            return


def _place(node_config: Mapping[str, Any]) -> Place:
    return Place(
        str(node_config["site"]), Path(node_config["experiment"]), Path(node_config["shard"]), Path(node_config["state"])
    )


def run_client(app: ClientApp, message: Message, node_config: dict[str, str]) -> Message:
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
        return Message(Error(code=CRASHED, reason=f"the site's job failed with {type(error).__name__}"), reply_to=message)


class InProcessGrid(Grid):
    """Flower's Grid over worker processes on this machine."""

    def __init__(self, places: Iterable[Place], *, num_workers: int) -> None:
        self._places = {SERVER_NODE + 1 + number: place for number, place in enumerate(places)}
        self._pool = WorkerPool(self._places, num_workers)
        self._replies: dict[str, Message] = {}
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
            self._pool.submit(message.metadata.dst_node_id, message_to_proto(message).SerializeToString())
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to these messages that have come."""
        for sent, answered in self._pool.collect(timeout_s=0.05):
            message = message_from_proto(ProtoMessage.FromString(sent))
            if answered is None:
                reply = Message(Error(code=CRASHED, reason="the site's worker process died"), reply_to=message)
            else:
                reply = message_from_proto(ProtoMessage.FromString(answered))
            self._replies[message.metadata.message_id] = reply
        return [self._replies.pop(wanted) for wanted in list(message_ids) if wanted in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, at most ``timeout`` seconds."""
        waiting = set(self.push_messages(messages))
        deadline = time.time() + (timeout if timeout is not None else float("inf"))
        replies: list[Message] = []
        while waiting and time.time() < deadline:
            for reply in self.pull_messages(list(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
        return replies


def run_in_process(app: ServerApp, places: Iterable[Place], *, num_workers: int) -> None:
    """Run a ServerApp over worker processes on this machine."""
    grid = InProcessGrid(places, num_workers=num_workers)
    try:
        app(grid, Context(run_id=TaskIdentity.run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(), run_config={}))
    finally:
        grid.close()


def run_on_ray(app: ServerApp, places: Iterable[Place], *, threads_per_site: int) -> None:
    """Run a ServerApp over Flower's own simulation engine."""
    try:
        import ray  # noqa: F401
    except ImportError:
        raise RunError("--engine ray needs Ray; install it with: pip install 'fedmix[simulation]'") from None
    from flwr.simulation import run_simulation

    ordered = [_as_strings(place) for place in places]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # run_simulation is deprecated in favour of a CLI that leaves daemons behind
        run_simulation(
            server_app=app,
            client_app=build_app(lambda context: _place(ordered[int(context.node_config["partition-id"])])),
            num_supernodes=len(ordered),
            backend_config={
                "client_resources": {"num_cpus": threads_per_site, "num_gpus": 0.0},
                "init_args": {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"},
            },
        )
