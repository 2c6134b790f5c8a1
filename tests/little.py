"""A little federation of three sites, and a Grid that calls the sites' real ClientApps in this process, so no test waits
for worker processes. Messages go through Flower's own protobuf on their way, as they do between machines."""

from __future__ import annotations

import atexit
import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from client.app import build_app
from client.place import Place
from client.secure_jobs import PHASES
from fedmix import config
from fedmix.data.tokenizer import Tokenizer
from server import held_out as central
from server.rounds import RoundLoop
from server.store import Committed, RunStore
from simulations.partition import prepare_sites

ROOT = Path(__file__).parents[1]
SITES = ("north", "south", "west")  # images, reports, pairs
Change = Callable[[Message], Message]


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    """An experiment as plain values: one unpaired round, two paired ones, each of two steps on tiny batches."""
    return {
        "name": "little",
        "seed": 3,
        "data": {
            "image_size": 48,
            "max_words": 24,
            "sites": [
                {"name": "north", "stream": "image", "phantom": {"studies": 24, "look": "north", "seed": 1}},
                {"name": "south", "stream": "text", "phantom": {"studies": 24, "look": "south", "seed": 2}},
                {"name": "west", "stream": "paired", "phantom": {"studies": 24, "look": "west", "seed": 3}},
            ],
            "held_out": {"phantom": {"studies": 80, "look": "unseen", "seed": 9}, "probe_studies": 40},
            "cache": str(folder / "phantoms"),
        },
        "model": {
            "patch_size": 12,
            "width": 16,
            "depth": 1,
            "num_heads": 2,
            "decoder_width": 16,
            "decoder_heads": 2,
            "embedding": 8,
        },
        "stages": [
            {"name": "unpaired", "rounds": 1, "streams": ["image", "text"], "local_steps": 2, "batch_size": 4},
            {
                "name": "paired",
                "rounds": 2,
                "streams": ["paired"],
                "local_steps": 2,
                "batch_size": 4,
                "objectives": {"contrast": 1.0},
            },
        ],
        "evaluation": {"gallery": 40, "num_bootstrap": 20, "regeneration_images": 20},
        "federation": {"deadline_s": 20.0, "max_failed_rounds": 2},
    } | changes


def everyone(folder: Path, *, rounds: int = 1, **changes: Any) -> dict[str, Any]:
    """The same sites in one stage that all of them take part in."""
    stage = {"name": "all", "rounds": rounds, "local_steps": 1, "batch_size": 4, "objectives": {"contrast": 1.0}}
    return values(folder, stages=[stage], **changes)


def scoring(folder: Path, **changes: Any) -> dict[str, Any]:
    """The same sites with further patients each, on whom they score the last round's model."""
    wanted = everyone(folder, **changes)
    for site, test_studies in zip(wanted["data"]["sites"], (30, 30, 52), strict=True):
        site["test_studies"] = test_studies
    return wanted | {"evaluation": {"gallery": 40, "num_bootstrap": 20, "regeneration_images": 20, "at_sites": True}}


@lru_cache(maxsize=1)
def drawn() -> Path:
    """The phantoms of the three sites, drawn once for all tests; each works on a copy that it may damage."""
    folder = Path(tempfile.mkdtemp(prefix="fedmix-little-"))
    atexit.register(_forget, folder, os.getpid())
    prepare_sites(config.build(values(folder)).data, Tokenizer.load())
    return folder / "phantoms"


def _forget(folder: Path, owner: int) -> None:
    """Remove the drawn phantoms, but not from a forked child that ends before its parent."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


class World:
    """A run folder, prepared sites and the means to run rounds over them."""

    def __init__(self, folder: Path, wanted: Mapping[str, Any] | None = None, *, resume: bool = False) -> None:
        self.experiment = config.build(wanted or values(folder))
        self.tokenizer = Tokenizer.load(self.experiment.data.tokenizer)
        if not self.experiment.data.cache.exists():
            shutil.copytree(drawn(), self.experiment.data.cache)
        self.shards = prepare_sites(self.experiment.data, self.tokenizer)
        self.store = RunStore(folder / "run", self.experiment, resume=resume)
        self.seen: list[Mapping[str, Any]] = []
        self._places: list[Place] = []

    def afresh(self, folder: Path) -> World:
        """Another run of the same experiment over the same sites, whose files they have open already."""
        other = copy.copy(self)
        other.store, other.seen = RunStore(folder / "run", self.experiment, resume=False), []
        other._places = self.places
        return other

    @property
    def places(self) -> list[Place]:
        """Where each site's files are."""
        return self._places or [
            Place(name, self.store.folder / "config.yaml", shard, self.store.folder / "sites" / name)
            for name, shard in self.shards.items()
        ]

    def grid(self, changes: Mapping[str, Change] | None = None) -> DirectGrid:
        """A Grid over the sites' real apps; ``changes`` alters what a site answers to an order."""
        return DirectGrid(self.places, changes or {})

    def run(self, grid: Grid | None = None, **options: Any) -> Committed:
        """Every round that is not yet committed."""
        loop = RoundLoop(grid or self.grid(), self.experiment, self.store, watch=self.seen.append, **options)
        return loop.run(self.initial())

    def initial(self) -> dict[str, Any]:
        """The parameters that the experiment's seed stands for."""
        return central.parameters_of(central.initial_model(self.experiment, self.tokenizer))

    def dropped(self) -> dict[str, str]:
        """Sites that were dropped, and why."""
        return {row["site"]: row["why"] for row in self.seen if row["event"] == "dropped"}

    def taken(self) -> list[tuple[int, str]]:
        """Round and site of every update that was taken."""
        return [(row["round"], row["site"]) for row in self.seen if row["event"] == "site"]


class Silent:
    """A view that shows nothing and keeps what it is told in sentences."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, total_rounds: int, sites: Any) -> None: ...

    def update(self, row: Any) -> None: ...

    def say(self, sentence: str) -> None:
        self.said.append(sentence)


class AtOnce(Grid):
    """A Grid that has every reply when its message is pushed (``push_messages``, of who inherits it), in ``replies``."""

    def __init__(self) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 7, 1
        self.replies: dict[str, Message] = {}

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(wanted) for wanted in list(message_ids) if wanted in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(self.pull_messages(self.push_messages(messages)))

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError


class DirectGrid(AtOnce):
    """Calls each node's ClientApp when its message is pushed, and gives the reply when it is asked for."""

    def __init__(self, places: Iterable[Place], changes: Mapping[str, Change]) -> None:
        super().__init__()
        self.apps = {
            number: hostile(build_app(lambda context, place=place: place), changes.get(place.site, lambda reply: reply))
            for number, place in enumerate(places, start=2)
        }

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            received = wired(message)
            app = self.apps[message.metadata.dst_node_id]
            context = Context(run_id=7, node_id=message.metadata.dst_node_id, node_config={}, state=RecordDict(), run_config={})
            ids.append(message.metadata.message_id)
            self.replies[ids[-1]] = wired(app(received, context))
        return ids


def hostile(honest: ClientApp, change: Change) -> ClientApp:
    """A ClientApp that greets honestly and changes its answer to an order."""
    app = ClientApp()

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return honest(message, context)

    for phase in PHASES:
        app.query(phase)(greet)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return change(honest(message, context))

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        return change(honest(message, context))

    return app


def wired(message: Message) -> Message:
    """The message as it arrives."""
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


def failing(reply: Message) -> Message:
    """An error instead of the reply."""
    failed = Message(Error(code=1001, reason="on purpose"), reply_to=reply)
    failed.metadata.__dict__.update({key: reply.metadata.__dict__[key] for key in reply.metadata.__dict__})
    return failed


def command(*arguments: object) -> list[str]:
    """A fedmix command as a user gives it."""
    return [str(Path(sys.executable).with_name("fedmix")), *map(str, arguments)]


def fedmix(*arguments: object, timeout_s: float = 280.0) -> subprocess.CompletedProcess[str]:
    """Run a fedmix command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, cwd=ROOT, timeout=timeout_s, check=False)


def write_config(folder: Path, wanted: Mapping[str, Any] | None = None) -> Path:
    """The experiment as a file."""
    path = folder / "little.yaml"
    path.write_text(yaml.safe_dump(dict(wanted or values(folder))))
    return path


def waited_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something that must happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process computes; one that nobody has waited for yet does not."""
    try:
        return not re.search(r"^State:\s+Z", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return False


def processes_of(folder: Path, pattern: str) -> list[str]:
    """Command lines of an engine's processes that were started for this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
            environment = (path.parent / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if re.search(pattern, line) and str(folder.parent) in environment:
            found.append(line)
    return found
