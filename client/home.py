"""A hospital's home folder: its key, its settings, its policy, the plans it approved, its ledger. One site, one folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client import policy as policies
from fedmix.config.reading import read_yaml
from fedmix.deployment.fingerprint import fingerprint
from fedmix.deployment.ledger import Ledger
from fedmix.deployment.units import write_unit
from fedmix.disk import reason_of, write_whole
from fedmix.errors import ConfigError

DIGEST = re.compile(r"[0-9a-f]{64}")
ADDRESS = re.compile(r"^(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}$")
NOTES = """\
A user of its own, that owns {home}, may read the shard, and nothing else.
Ports: none takes a call from another machine. It dials {coordinator} (TLS), which the firewall has to let out; its own
       two programs meet on a port of 127.0.0.1.
Files: it reads {shard}; all it writes is below its home: the ledger, logs, what a run keeps between rounds."""


class Settings(BaseModel):
    """``site.yaml``: this site's name, the coordinator's host:port, the shard, and the loopback port of its SuperNode.

    ``port`` 0 means any that is free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
    coordinator: Annotated[str, Field(pattern=ADDRESS)]
    shard: Path
    port: Annotated[int, Field(ge=0, le=65535)] = 0

    @property
    def host(self) -> str:
        """The coordinator's host name or address, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def link_port(self) -> int:
        """The port that the coordinator's SuperLink listens on."""
        return int(self.coordinator.rpartition(":")[2])


def settings_of(name: str, coordinator: str, shard: Path, port: int) -> Settings:
    """Settings as a person gives them. Raises ConfigError that names what is wrong."""
    try:
        return Settings(name=name, coordinator=coordinator, shard=shard, port=port)
    except ValidationError as error:
        first = error.errors()[0]
        expected = {"name": "a small letter or digit, then up to 39 more, - or _", "coordinator": "HOST:PORT"}
        where = str(first["loc"][0])
        raise ConfigError(f"{where} = {first['input']!r}: it should be {expected.get(where, first['msg'].lower())}") from None


@dataclass(frozen=True)
class Home:
    """Where the files of one site are, and what they say."""

    folder: Path

    @property
    def key(self) -> Path:
        """The private key that identifies this site to the coordinator; it never leaves."""
        return self.folder / "key"

    @property
    def public_key(self) -> Path:
        """What the coordinator registers."""
        return self.folder / "key.pub"

    @property
    def secret(self) -> Path:
        """What the agent's own processes know each other by."""
        return self.folder / "secret"

    @property
    def ca(self) -> Path:
        """The certificate authority of the coordinator, the only one that is trusted."""
        return self.folder / "ca.crt"

    @property
    def settings_file(self) -> Path:
        """This site's settings."""
        return self.folder / "site.yaml"

    @property
    def policy_file(self) -> Path:
        """This site's policy."""
        return self.folder / "policy.yaml"

    @property
    def plans(self) -> Path:
        """Approved plans, each named by its digest, and the list of denied digests."""
        return self.folder / "plans"

    @property
    def denied_file(self) -> Path:
        """Digests of denied plans, one a line."""
        return self.plans / "denied"

    @property
    def state(self) -> Path:
        """What a run keeps between rounds."""
        return self.folder / "state"

    @property
    def scored_file(self) -> Path:
        """Which patients this site has scored models on, as hashes."""
        return self.folder / "scored.json"

    @property
    def logs(self) -> Path:
        """What the agent's programs say."""
        return self.folder / "logs"

    @property
    def flower(self) -> Path:
        """Flower's own files."""
        return self.folder / "flower"

    @property
    def paused_file(self) -> Path:
        """The kill switch: while this file is there, nothing begins and nothing leaves."""
        return self.folder / "paused"

    @property
    def ledger_file(self) -> Path:
        """The ledger."""
        return self.folder / "ledger.jsonl"

    def ledger(self) -> Ledger:
        """This site's ledger, to write to."""
        return Ledger(self.ledger_file)

    def settings(self) -> Settings:
        """What site.yaml says. Raises ConfigError without this folder's path, for it may be sent."""
        try:
            values = read_yaml(self.settings_file.read_text(), "site.yaml")
            settings = Settings.model_validate(values)
        except OSError as error:
            raise ConfigError(
                f"this site's site.yaml cannot be read: {reason_of(error)}; make a home with `fedmix site init`"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"site.yaml is wrong at {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from None
        # A shard's place is meant from the home, so that the agent may be started anywhere.
        return settings.model_copy(update={"shard": self.folder / settings.shard})

    def policy(self) -> policies.Policy:
        """What policy.yaml says."""
        return policies.read(self.policy_file)

    def approved(self, digest: str) -> Path:
        """Where the plan of this digest is once it is approved."""
        return self.plans / f"{digest}.yaml"

    def denied(self) -> set[str]:
        """Digests of denied plans. Raises ConfigError if the list is there and cannot be read."""
        try:
            return set(self.denied_file.read_text().split())
        except FileNotFoundError:
            return set()
        except (OSError, ValueError) as error:
            raise ConfigError(f"this site's list of denied plans cannot be read: {reason_of(error)}") from None

    @property
    def is_paused(self) -> bool:
        """Whether the kill switch is on; what cannot be looked at counts as on."""
        try:
            self.paused_file.lstat()
        except FileNotFoundError:
            return not self.folder.is_dir()
        except OSError:
            return True
        return True


def create(folder: Path, settings: Settings, ca: bytes) -> Home:
    """Make a new home with a new key pair (ECDSA P-384, which Flower asks for). Raises ConfigError if one is there."""
    home = Home(folder.absolute())
    if home.settings_file.exists() or home.key.exists():
        raise ConfigError(f"{folder} is a site's home already; name another with --home, or go on with this one")
    for each in (home.folder, home.plans, home.state, home.logs, home.flower):
        each.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = ec.generate_private_key(ec.SECP384R1())
    write_whole(
        home.key,
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()),
        mode=0o600,
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_whole(home.public_key, public + f" {settings.name}\n".encode())
    write_whole(home.secret, os.urandom(32), mode=0o600)
    write_whole(home.ca, ca)
    write_whole(home.policy_file, policies.default_text().encode())
    _write_unit(home, settings)
    # Last: a home with settings is whole.
    write_whole(home.settings_file, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False).encode())
    home.ledger().append("created", site=settings.name, key=fingerprint(home.public_key.read_text()))
    return home


def _write_unit(home: Home, settings: Settings) -> None:
    """A systemd unit for the agent, in systemd/; its name tells it from that of another site on this machine."""
    notes = NOTES.format(home=home.folder, coordinator=settings.coordinator, shard=settings.shard).splitlines()
    write_unit(home.folder, f"fedmix-site-{settings.name}", role=f"site {settings.name}", notes=notes, words=["site", "start"])
