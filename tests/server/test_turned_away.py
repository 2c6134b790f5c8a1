"""Hospitals that a real coordinator turns away: each agent says why in words, and comes in by itself once that is mended."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from federations import START_S, Program, processes_with
from little import waited_until

from client import doctor
from client import home as sites
from fedmix.deployment.ledger import Ledger
from fedmix.errors import RunError
from server import certificates, coordinator, serving, standing
from server.home import Home, Settings
from simulations.superlink import free_ports

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SAID_S = 30.0  # so soon after it is known a cause is said
# Imported by every Python that finds it on its path. Certificates are judged by OpenSSL, whose clock stays right.
TEN_SECONDS_AHEAD = """
import datetime, time
import flwr.supercore.date as flower
right = time.time
time.time = lambda: right() + 10.0
flower.now = lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
"""
CAUSES = {  # the site, what its SuperNode writes, and what its agent says
    "authority": ("unable to get local issuer certificate", "the coordinator's certificate is not signed by ca.crt"),
    "name": ("Hostname mismatch", "the coordinator's certificate is not of the name that site.yaml dials"),
    "unknown": ("Failed to activate SuperNode", "send it key.pub and wait"),
    "ahead": ("SuperNode terminated gracefully", "does not take this site's signature, most likely because a clock is wrong"),
}
EXPIRED = ("certificate has expired", "tell the coordinator, which renews it by a new start")


class Started:
    """A coordinator, and agents of hospitals, in one folder; nobody has a shard, for nobody is asked to train."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hub, self.programs = folder, Home(folder / "hub"), list[Program]()

    def start(self, name: str, *words: object) -> Program:
        """Start a command that runs on."""
        self.programs.append(Program(self.folder / f"{name}.log", *words))
        return self.programs[-1]

    def join(self, name: str) -> Program:
        """Start a hospital's agent."""
        return self.start(name, "site", "start", "--home", self.folder / name)

    def close(self) -> None:
        """End everything."""
        for program in reversed(self.programs):
            program.close()


def found(made: Started) -> None:
    """A coordinator that serves, another's certificate authority, and a home for every cause."""
    hub, other = made.hub, Home(made.folder / "other")
    port, control, health = free_ports(3)
    for home in (hub, other):
        settings = Settings(host="localhost", listen="127.0.0.1", port=port, control_port=control, health_port=health)
        coordinator.init(home, settings)
    for name in CAUSES:
        host, authority = "127.1" if name == "name" else "localhost", other if name == "authority" else hub
        settings = sites.settings_of(name, f"{host}:{port}", made.folder / "shard", 0)
        made_site = sites.create(made.folder / name, settings, authority.ca_certificate.read_bytes())
        if name != "unknown":
            hub.register(name, made_site.public_key)
    served = made.start("hub", "server", "start", "--home", hub.folder)
    waited_until(lambda: "sites connect to" in served.said(), START_S)


def said(made: Started, agent: Program, name: str, cause: tuple[str, str]) -> None:
    """Wait until a site's SuperNode has met a cause; its agent has to say it soon after."""
    log = made.folder / name / "logs/supernode.log"
    waited_until(lambda: log.exists() and cause[0] in log.read_text(errors="replace"), START_S)
    began = time.monotonic()
    waited_until(lambda: cause[1] in agent.said(), SAID_S)
    print(f"{name}: said {time.monotonic() - began:.1f} s after it was known")


def to_mend(made: Started, name: str) -> dict[str, str]:
    """What the site's doctor finds, and how to mend it."""
    return {one.what: f"{one.said}; {one.mend}" for one in doctor.examine(sites.Home(made.folder / name)) if not one.is_fine}


def online(made: Started) -> set[str]:
    """The hospitals that the coordinator calls online; all others of its list have never been seen."""
    found = standing.standing(made.hub).sites
    assert {site.state for site in found} <= {"online", "never seen"}
    return {site.name for site in found if site.state == "online"}


def test_who_is_turned_away_is_told_why_and_comes_in_once_that_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Started(tmp_path)) as made:
        found(made)
        (made.folder / "sitecustomize.py").write_text(TEN_SECONDS_AHEAD)
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(made.folder), os.environ.get("PYTHONPATH", "")]))
            agents = {"ahead": made.join("ahead")}
        agents |= {name: made.join(name) for name in CAUSES if name not in agents}
        for name, cause in CAUSES.items():
            said(made, agents[name], name, cause)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda right=time.time: right() + 10.0)
            assert re.match(r"(10|11) s ahead of the coordinator's", to_mend(made, "ahead")["clock"])
        assert "ask the coordinator for its ca.crt" in to_mend(made, "authority")["certificate"]
        assert "dial the name that it is of" in to_mend(made, "name")["certificate"]
        assert "send it key.pub and wait" in to_mend(made, "unknown")["agent"]
        assert online(made) == set()
        for name in ("ahead", "name"):
            agents[name].close()

        hub = made.hub
        hub.register("unknown", made.folder / "unknown/key.pub")
        serving.register_pending(hub)
        shutil.copy(hub.ca_certificate, made.folder / "authority/ca.crt")
        waited_until(lambda: online(made) == {"unknown", "authority"}, START_S)
        for name in CAUSES:
            events = {entry["event"] for entry in Ledger(made.folder / name / "ledger.jsonl").entries()}
            assert events <= {"created", "started", "stopped"}, "a message has passed"
        agents["authority"].close()

        monkeypatch.setattr(certificates, "SERVER_DAYS", -0.5)
        certificates.issue(hub, "localhost")
        (superlink,) = processes_with("server.superlink", hub.folder)
        os.kill(superlink, signal.SIGKILL)  # the next one serves the certificate that has ended
        said(made, agents["unknown"], "unknown", EXPIRED)
        assert "certificate has expired" in to_mend(made, "unknown")["certificate"]
        with pytest.raises(RunError, match="has ended on"):
            standing.standing(hub)
        monkeypatch.undo()
        certificates.issue(hub, "localhost")  # as `server start` does
        (superlink,) = processes_with("server.superlink", hub.folder)
        os.kill(superlink, signal.SIGKILL)
        waited_until(lambda: agents["unknown"].said().count("connected to the coordinator") == 2, START_S)
