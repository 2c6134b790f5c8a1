"""The third engine: a real SuperLink and a SuperNode for each site, all on this machine's loopback address.

It is what runs between hospitals, without their certificates and keys: a process for every site, a new ClientApp process
for every message, Flower's own serialisation and database. So a message costs seconds where the in-process engine takes
milliseconds; it is here to show that both give the same weights. All its processes are one process group, which ends with
this process however this one ends.
"""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.place import Place
from fedmix.deployment import bundle as bundles
from fedmix.deployment.environment import LOOPBACK, flower_environment
from fedmix.deployment.processes import Group
from fedmix.errors import RunError
from server import deploy
from server.home import RUNS

START_S = 120.0  # so long may a busy machine take to import Flower
LOGS = "superlink"  # a folder in the run folder
FAILED = "ServerApp failed with exception: "  # how Flower begins what it keeps of an exception

Watch = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Link:
    """Where a SuperLink listens, the folder of run folders that it serves, and where its own files and its logs are."""

    address: str
    runs: Path
    files: Path
    logs: Path

    def environment(self, name: str) -> dict[str, str]:
        """What one of Flower's processes is given: a home of its own, and the programs beside this Python."""
        return flower_environment(self.files / "homes" / name) | {RUNS: str(self.runs)}


def run_on_superlink(folder: Path, places: Sequence[Place], *, threads_per_site: int, watch: Watch) -> None:
    """Run, or take up, what a run folder with a config.yaml holds, over a SuperLink and SuperNodes of this machine.

    The ServerApp is a process of its own that locks the folder, so nobody else may hold it. Raises RunError with the
    run's own cause if it failed; what Flower's processes said is in the run folder under ``superlink/``.
    """
    folder = folder.absolute()
    deploy.run_folder({"run": folder.name}, {RUNS: str(folder.parent)})  # what it refuses, it refuses at once
    with (
        tempfile.TemporaryDirectory(prefix="fedmix-superlink-", ignore_cleanup_errors=True) as files,
        contextlib.closing(Group()) as group,
    ):
        link_port, *site_ports = free_ports(1 + len(places))
        link = Link(f"{LOOPBACK}:{link_port}", folder.parent, Path(files), folder / LOGS)
        link.logs.mkdir(exist_ok=True)
        _start_link(group, link)
        for place, port in zip(places, site_ports, strict=True):
            _start_site(group, link, place, port=port, threads=threads_per_site)
        _run(group, link, folder.name, watch)


def _start_link(group: Group, link: Link) -> None:
    """The SuperLink, and the process that starts ServerApps for it: apart, for then the one may be restarted alone."""
    host, _, port = link.address.rpartition(":")
    command = ["flower-superlink", "--insecure", "--host", host, "--port", port, "--isolation", "process"]
    command += ["--database", str(link.files / "state.db"), "--disable-runtime-dependency-installation"]
    superlink = group.start(command, link.environment("superlink"), log=link.logs / "superlink.log")
    executor = ["flower-superexec", "--insecure", "--runtime-api-address", link.address]
    group.start(executor, link.environment("server"), log=link.logs / "server.log")
    deadline = time.monotonic() + START_S
    while not _is_healthy(link):
        if superlink.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the SuperLink did not start; {LOGS}/superlink.log in the run folder says why")
        time.sleep(0.1)


def _is_healthy(link: Link) -> bool:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{link.address}/health", timeout=2.0) as answer:
            return bool(answer.status == 200)
    except OSError:  # refused as long as nobody listens
        return False


def _start_site(group: Group, link: Link, place: Place, *, port: int, threads: int) -> None:
    """A site's SuperNode, told its place by a file: on a command line Flower takes no path with a quote in it."""
    node_config = link.files / f"{place.site}.toml"
    paths = {"experiment": place.experiment, "shard": place.shard, "state": place.state}
    _write_toml(node_config, {"site": place.site} | {name: str(path.absolute()) for name, path in paths.items()})
    name = f"site-{place.site}"
    command = ["flower-supernode", "--insecure", "--superlink", link.address, "--host", LOOPBACK, "--port", str(port)]
    command += ["--node-config", str(node_config)]
    group.start(command, link.environment(name) | {"OMP_NUM_THREADS": str(threads)}, log=link.logs / f"{name}.log")


def _run(group: Group, link: Link, name: str, watch: Watch) -> None:
    """Hand the run in, show its rows as they come, and raise RunError unless it completes."""
    bundle, run_config = bundles.write(link.files / "fedmix"), link.files / "run.toml"
    _write_toml(run_config, {"run": name})
    environment = link.environment("user")
    # Without an address of its own, `flwr run` would start a SuperLink that outlives it.
    _write_toml(
        Path(environment["FLWR_HOME"]) / "config.toml", {"address": link.address, "insecure": True}, table="superlink.here"
    )
    start = ["flwr", "run", str(bundle), "here", "--stream", "--run-config", str(run_config)]
    num_seen = _show(group.read(start, environment, log=link.logs / "run.log"), 0, link, watch)
    while (run := _listed(group, link, environment)).is_going_on:  # a busy link may break the stream off
        again = group.read(["flwr", "log", run.number, "here", "--stream"], environment, log=link.logs / "log.log")
        num_seen = max(num_seen, _show(again, num_seen, link, watch))
    if run.state != "finished:completed":
        cause = run.details.removeprefix(FAILED) if run.details.startswith(FAILED) else f"the run ended as {run.state}"
        raise RunError(f"{cause}; the logs under {LOGS}/ in the run folder have the details")


def _show(lines: Iterable[bytes], num_seen: int, link: Link, watch: Watch) -> int:
    """Show the rows of a stream but the first, which were seen already; returns how many rows it had."""
    count = 0
    for count, row in enumerate(_rows(lines, link.logs / "app.log"), start=1):
        if count > num_seen:
            watch(row)
    return count


@dataclass(frozen=True)
class Listed:
    """The only run of a SuperLink, in Flower's words; ``unknown`` if it could not be told."""

    number: str
    state: str
    details: str

    @property
    def is_going_on(self) -> bool:
        """Whether it will go further."""
        return self.state != "unknown" and not self.state.startswith("finished")


def _listed(group: Group, link: Link, environment: Mapping[str, str]) -> Listed:
    return _read_list(group.read(["flwr", "list", "here", "--format", "json"], environment, log=link.logs / "list.log"))


def _rows(lines: Iterable[bytes], log: Path) -> Iterator[dict[str, Any]]:
    """The rows among what a ServerApp prints; everything else goes to a log file."""
    with log.open("ab") as file:
        for line in lines:
            row = None
            with contextlib.suppress(ValueError):
                row = json.loads(line)
            if isinstance(row, dict) and "event" in row:
                yield row
            else:
                file.write(line)


def _read_list(lines: Iterable[bytes]) -> Listed:
    try:
        run = json.loads(b"".join(lines))["runs"][0]
        return Listed(str(run["run-id"]), str(run["status"]), str(run["status-details"]))
    except (ValueError, KeyError, IndexError):
        return Listed("", "unknown", "")


def _write_toml(path: Path, values: Mapping[str, str | bool], *, table: str | None = None) -> None:
    """Flat values as TOML, whose strings are JSON's."""
    head = [f"[{table}]"] if table else []
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    path.write_text("\n".join([*head, *lines, ""]))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address on which nobody listens; each is held until all are found, so that all differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]
