"""Hospitals that a real coordinator turns away: each agent says why in words, and comes in by itself once that is mended."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from federations import START_S, Federation, Program, federation, processes_with
from little import World, fedmix, values, waited_until

from client import doctor
from client.home import Home as Site
from server import certificates
from server.home import Home
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


def found(made: Federation, world: World) -> None:
    """A coordinator that serves, another's certificate authority, and a home for every cause."""
    port, control, health = free_ports(3)
    made.server("init", "--host", "localhost", "--port", port, "--control-port", control, "--health-port", health)
    other = made.folder / "other"
    assert fedmix("server", "init", "--host", "localhost", "--home", other).returncode == 0
    made.serve()
    for name in CAUSES:
        host, ca = "127.1" if name == "name" else "localhost", (other if name == "authority" else made.hub) / "ca.crt"
        at = ("--coordinator", f"{host}:{port}", "--ca", ca, "--shard", world.shards["west"])
        made.site(name, "init", name, *at)
        if name != "unknown":
            made.server("register", name, "--key", made.folder / name / "key.pub")


def said(made: Federation, agent: Program, name: str, cause: tuple[str, str]) -> None:
    """Wait until a site's SuperNode has met a cause; its agent has to say it soon after."""
    log = made.folder / name / "logs/supernode.log"
    waited_until(lambda: log.exists() and cause[0] in log.read_text(errors="replace"), START_S)
    began = time.monotonic()
    waited_until(lambda: cause[1] in agent.said(), SAID_S)
    print(f"{name}: said {time.monotonic() - began:.1f} s after it was known")


def to_mend(made: Federation, name: str) -> dict[str, str]:
    """What the site's doctor finds, and how to mend it."""
    return {one.what: f"{one.said}; {one.mend}" for one in doctor.examine(Site(made.folder / name)) if not one.is_fine}


def test_who_is_turned_away_is_told_why_and_comes_in_once_that_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = values(tmp_path)
    world = World(tmp_path / "here", wanted)
    with federation(tmp_path / "there", world, wanted) as made:
        found(made, world)
        (made.folder / "sitecustomize.py").write_text(TEN_SECONDS_AHEAD)
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(made.folder), os.environ.get("PYTHONPATH", "")]))
            agents = {"ahead": made.join("ahead")}
            examined = fedmix("site", "doctor", "--home", made.folder / "ahead")
        agents |= {name: made.join(name) for name in CAUSES if name not in agents}
        for name, cause in CAUSES.items():
            said(made, agents[name], name, cause)
        assert examined.returncode == 1
        assert "BAD clock: 10 s ahead of the coordinator's" in examined.stdout
        assert "ask the coordinator for its ca.crt" in to_mend(made, "authority")["certificate"]
        assert "dial the name that it is of" in to_mend(made, "name")["certificate"]
        assert "send it key.pub and wait" in to_mend(made, "unknown")["agent"]
        assert made.online() == set()
        assert made.server("status").stdout.count("never seen") == len(CAUSES) - 1

        made.server("register", "unknown", "--key", made.folder / "unknown/key.pub")
        shutil.copy(made.hub / "ca.crt", made.folder / "authority/ca.crt")
        waited_until(lambda: made.online() == {"unknown", "authority"}, START_S)
        for name in CAUSES:
            events = [entry["event"] for entry in made.entries(name)]
            assert events == ["created", "started"], "a message has passed"

        hub = Home(made.hub)
        monkeypatch.setattr(certificates, "SERVER_DAYS", -0.5)
        certificates.issue(hub, "localhost")
        (superlink,) = processes_with("server.superlink", made.hub)
        os.kill(superlink, signal.SIGKILL)  # the next one serves the certificate that has ended
        said(made, agents["unknown"], "unknown", EXPIRED)
        assert "certificate has expired" in to_mend(made, "unknown")["certificate"]
        status = fedmix("server", "status", "--home", made.hub)
        assert status.returncode == 1
        assert "server.crt has ended on" in " ".join((status.stdout + status.stderr).split())
        assert fedmix("server", "stop", "--home", made.hub).returncode == 0
        made.serve()
        waited_until(lambda: made.online() == {"unknown", "authority"}, START_S)
