"""A coordinator for real: its commands, a SuperLink with TLS, SuperNodes with keys, and the same weights as in one process."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from little import ROOT, SITES, World, command, everyone, fedmix, waited_until, write_config

from client.place import Place
from fedmix.deployment import ledger
from fedmix.deployment.environment import flower_environment
from fedmix.deployment.processes import Group
from fedmix.federation.update import digest
from server import certificates
from server.home import Home
from server.store import RunStore
from simulations.superlink import _write_toml, free_ports

OTHERS = ("east", "stranger")  # registered, but on no plan; and not registered at all


class Coordinator:
    """A coordinator's home, the process that serves it, and the SuperNodes of its sites."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, Home(folder / "home")
        self.group = Group()
        self.process: subprocess.Popen[bytes] | None = None

    def say(self, *words: object) -> subprocess.CompletedProcess[str]:
        return fedmix("server", *words, "--home", self.home.folder, timeout_s=800.0)

    def init(self) -> None:
        port, control, health = free_ports(3)
        made = self.say("init", "--host", "localhost", "--port", port, "--control-port", control, "--health-port", health)
        assert made.returncode == 0, made.stderr

    def start(self) -> None:
        with (self.folder / "start.log").open("ab") as log:
            words = command("server", "start", "--home", self.home.folder)
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)
        waited_until(lambda: "sites connect to" in (self.folder / "start.log").read_text(), 120.0)

    def key(self, site: str) -> Path:
        """A site's key pair; returns the public one."""
        private = ec.generate_private_key(ec.SECP384R1())
        path = self.folder / f"{site}.key"
        openssh = serialization.PrivateFormat.OpenSSH
        path.write_bytes(private.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption()))
        public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        path.with_suffix(".pub").write_bytes(public + b" somebody@somewhere\n")
        return path.with_suffix(".pub")

    def node(self, place: Place, *, ca: Path | None = None, name: str | None = None) -> Path:
        """Start a SuperNode; returns its log."""
        name = name or place.site
        paths = {"experiment": place.experiment, "shard": place.shard, "state": place.state}
        _write_toml(self.folder / f"{name}.toml", {"site": place.site} | {key: str(path) for key, path in paths.items()})
        words = ["flower-supernode", "--superlink", self.home.settings().address, "--host", "127.0.0.1"]
        words += ["--port", str(free_ports(1)[0]), "--root-certificates", str(ca or self.home.ca_certificate)]
        words += ["--auth-supernode-private-key", str(self.folder / f"{name}.key")]
        words += ["--node-config", str(self.folder / f"{name}.toml")]
        environment = flower_environment(self.folder / "flower" / name) | {"OMP_NUM_THREADS": "1"}
        self.group.start(words, environment, log=self.folder / f"{name}.log")
        return self.folder / f"{name}.log"

    def close(self) -> None:
        self.group.close()
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60.0)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    with closing(Coordinator(tmp_path / "hub")) as made:
        made.folder.mkdir()
        yield made


@pytest.mark.slow  # simulations/hospitals.sh is the one that every run of CI starts
@pytest.mark.timeout(1200)  # every message to a site has a process of its own that imports torch
def test_a_run_over_real_sites_gives_the_same_weights_and_strangers_nothing(coordinator: Coordinator, tmp_path: Path) -> None:
    world = World(tmp_path / "here", everyone(tmp_path, rounds=1, federation={"deadline_s": 300.0}))
    expected = digest(world.run().parameters)
    coordinator.init()
    for site in (*SITES, "east"):
        assert coordinator.say("register", site, "--key", coordinator.key(site)).returncode == 0
    coordinator.key("stranger")
    coordinator.start()
    config = write_config(tmp_path, everyone(tmp_path, rounds=1, federation={"deadline_s": 300.0}))
    plan = tmp_path / "plan.yaml"
    planned = coordinator.say("plan", config, "--sites", ",".join(SITES), "--out", plan)
    assert planned.returncode == 0, planned.stderr
    for place in world.places:
        coordinator.node(Place(place.site, config, place.shard, tmp_path / "states" / place.site))
    north = world.places[0]
    east = coordinator.node(Place("north", config, north.shard, tmp_path / "states/east"), name="east")
    stranger = coordinator.node(north, name="stranger")
    elsewhere = Home(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    certificates.make_authority(elsewhere, "localhost")
    coordinator.key("misled")
    misled = coordinator.node(north, ca=elsewhere.ca_certificate, name="misled")
    ran = coordinator.say("run", plan)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "report:" in ran.stdout
    folder = coordinator.home.runs / "little"
    told = coordinator.say("status")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "completed" in told.stdout
    assert json.loads((folder / "report.json").read_text())["run"]["state"] == "completed"
    entries = list(ledger.Ledger(coordinator.home.ledger).entries())
    assert {entry["peer"] for entry in entries} == set(SITES)
    ledger.verify(coordinator.home.ledger)
    assert "Receiving" not in east.read_text()
    assert "Failed to initialize the connection to the SuperLink" in stranger.read_text()
    assert "No SuperNode found with the given public key" in (coordinator.home.logs / "superlink.log").read_text()
    assert "CERTIFICATE_VERIFY_FAILED" in misled.read_text()
    assert coordinator.say("stop").returncode == 0
    assert coordinator.say("status").returncode == 1
    committed = RunStore(folder, world.experiment, resume=True).latest()
    assert committed is not None
    assert digest(committed.parameters) == expected
