"""A real federation on this machine, by the commands that people give: a coordinator and the agents of hospitals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from little import ROOT, SITES, World, command, fedmix, waited_until, write_config

from fedmix.deployment.ledger import Ledger
from server.home import Home
from simulations.superlink import free_ports

START_S = 240.0  # so long may a busy machine take to start what is asked for


class Program:
    """A command that runs on, with what it says in a file."""

    def __init__(self, log: Path, *words: object) -> None:
        self.log = log
        with log.open("ab") as file:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command(*words), stdout=file, stderr=file, cwd=ROOT, env=environment)

    def said(self) -> str:
        """All of it."""
        return self.log.read_text(errors="replace")

    def ended(self, seconds: float = 600.0) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(seconds)

    def close(self) -> None:
        """Ask it to end, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(90.0)


class Federation:
    """A coordinator, and hospitals that have approved its plan."""

    def __init__(self, folder: Path, world: World, wanted: dict[str, Any]) -> None:
        self.folder, self.world, self.wanted = folder, world, wanted
        self.hub, self.programs = folder / "hub", list[Program]()

    def server(self, *words: object) -> subprocess.CompletedProcess[str]:
        """A coordinator's command, which has to succeed."""
        return self._done("server", *words, "--home", self.hub)

    def site(self, name: str, *words: object) -> subprocess.CompletedProcess[str]:
        """A hospital's command, which has to succeed."""
        return self._done("site", *words, "--home", self.folder / name)

    def found(self, port: int | None = None, *, sites: Sequence[str] = SITES) -> Path:
        """Everything up to the agents' start; returns the plan. ``port``: that hospitals dial, if something stands between."""
        own, control, health = free_ports(3)
        ports = ("--port", port or own, "--control-port", control, "--health-port", health)
        self.server("init", "--host", "localhost", *ports)
        for name in sites:
            shard = self.world.shards[name]
            at = ("--coordinator", f"localhost:{port or own}", "--ca", self.hub / "ca.crt", "--shard", shard)
            self.site(name, "init", name, *at)
            (self.folder / name / "policy.yaml").write_text(yaml.safe_dump({"min_studies": 5}))
            self.server("register", name, "--key", self.folder / name / "key.pub")
        plan = self.folder / "plan.yaml"
        config = write_config(self.folder, self.wanted)
        self.server("plan", config, "--sites", ",".join(sites), "--out", plan)
        for name in sites:
            self.site(name, "approve", plan)
        if port is not None:  # what hospitals dial leads here
            settings = yaml.safe_load((self.hub / "server.yaml").read_text())
            (self.hub / "server.yaml").write_text(yaml.safe_dump(settings | {"port": own}))
        return plan

    @property
    def address(self) -> str:
        """Where the coordinator itself listens."""
        return f"127.0.0.1:{Home(self.hub).settings().port}"

    def serve(self) -> Program:
        """Start the coordinator."""
        served = self.start("hub.log", "server", "start", "--home", self.hub)
        waited_until(lambda: "sites connect to" in served.said(), START_S)
        return served

    def join(self, name: str) -> Program:
        """Start a hospital's agent."""
        return self.start(f"{name}.log", "site", "start", "--home", self.folder / name)

    def start(self, log: str, *words: object) -> Program:
        """Start a command that runs on."""
        self.programs.append(Program(self.folder / log, *words))
        return self.programs[-1]

    def online(self) -> set[str]:
        """The hospitals that are connected."""
        return set(re.findall(r"^\s*(\S+)\s+online\b", self.server("status").stdout, re.MULTILINE))

    def entries(self, name: str) -> list[dict[str, Any]]:
        """A hospital's ledger."""
        return list(Ledger(self.folder / name / "ledger.jsonl").entries())

    def close(self) -> None:
        """End everything."""
        for program in reversed(self.programs):
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.close()

    @staticmethod
    def _done(*words: object) -> subprocess.CompletedProcess[str]:
        ended = fedmix(*words, timeout_s=600.0)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended


@contextlib.contextmanager
def federation(folder: Path, world: World, wanted: dict[str, Any]) -> Iterator[Federation]:
    """A federation that ends with the test."""
    folder.mkdir()
    made = Federation(folder, world, wanted)
    try:
        yield made
    finally:
        made.close()


def processes_with(text: str, home: Path) -> list[int]:
    """Ids of processes that were told of a home and hold a text in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if text.encode() in (path / "cmdline").read_bytes() and str(home).encode() in told:
                found.append(int(path.name))
    return sorted(found)
